"""Draws as functions of (seed, index, purpose). Oracles: properties; a seed worked out with sha256sum."""

import torch

from pixart_ft.randomness import epoch_order, generator, normal, uniform


def test_batch_composition_never_changes_a_draw() -> None:
    whole, parts = (
        normal(0, range(8), "noise", (4, 2, 2)),
        [normal(0, [i], "noise", (4, 2, 2)) for i in range(8)],
    )
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(normal(0, [5, 2], "noise", (4, 2, 2)), whole[[5, 2]])
    assert torch.equal(uniform(0, [3, 1], "t"), uniform(0, range(4), "t")[[3, 1]])


def test_seed_index_and_purpose_each_change_the_draw() -> None:
    draws = torch.cat([uniform(seed, range(3), purpose) for seed in (0, 1) for purpose in ("t", "drop")])
    assert len(set(draws.tolist())) == len(draws)


def test_the_seed_is_the_documented_hash() -> None:
    # First 8 bytes of sha256("0/noise/1"), big-endian, without the last bit, computed with sha256sum.
    assert generator(0, 1, "noise").initial_seed() == 0x570BA99C3CDD0ADE >> 1


def test_distributions_and_types() -> None:
    z, u = normal(0, range(4_000), "z", (1,)), uniform(0, range(4_000), "u")
    assert z.dtype == torch.float32 and z.shape == (4_000, 1) and u.dtype == torch.float64 and u.shape == (4_000,)
    # Four standard errors of mean and variance.
    assert abs(z.mean().item()) < 4 / 4_000**0.5 and abs(z.var().item() - 1) < 4 * (2 / 4_000) ** 0.5
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean().item() - 0.5) < 4 * (1 / 12 / 4_000) ** 0.5


def test_an_epoch_visits_every_sample_once_in_its_own_order() -> None:
    first, second = (epoch_order(0, epoch, 50).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first == epoch_order(0, 0, 50).tolist() and first != epoch_order(1, 0, 50).tolist()


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    normal(0, [0], "noise", (2,)), uniform(0, [0], "t"), epoch_order(0, 0, 5)
    assert torch.equal(before, torch.get_rng_state())
