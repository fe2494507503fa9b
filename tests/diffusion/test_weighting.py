"""The law of t. Oracle: counts that must come out exactly on an even grid of uniforms."""

import torch

from pixart_ft.diffusion.weighting import stratified_timesteps, uniform_timesteps


def test_uniform_reaches_every_index_equally_often_and_no_other() -> None:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert torch.equal(torch.bincount(uniform_timesteps(u, 1000)), torch.full((1000,), 4))
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert uniform_timesteps(ends, 1000).tolist() == [0, 999]


def test_a_global_batch_has_one_t_in_each_stratum() -> None:
    u = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = stratified_timesteps(u, torch.arange(16, 24), 8, 1000)
    assert (t // 125).tolist() == list(range(8))
    # The largest u below 1 rounds up to the end of its stratum; the last one must not leave the process.
    largest = torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    assert stratified_timesteps(largest, torch.tensor([7]), 8, 1000).item() == 999


def test_strata_do_not_depend_on_how_ranks_share_the_batch() -> None:
    u = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.arange(8, 16)
    shares = [stratified_timesteps(u[rank::2], draws[rank::2], 8, 1000) for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(), stratified_timesteps(u, draws, 8, 1000))


def test_strata_that_do_not_divide_the_process_stay_uniform() -> None:
    # 3 strata over 10 indices: on an even grid of 30 (stratum, u) pairs every index is hit 3 times.
    u = ((torch.arange(10, dtype=torch.float64) + 0.5) / 10).repeat_interleave(3)
    t = stratified_timesteps(u, torch.arange(30), 3, 10)
    assert torch.equal(torch.bincount(t), torch.full((10,), 3))
