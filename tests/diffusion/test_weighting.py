"""Laws of t and loss weights. Oracles: counts that come out exactly on an even grid of uniforms, closed forms."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import weighting
from pixart_ft.diffusion.names import LossSpace, Weighting
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.weighting import (
    LossHistory,
    importance_timesteps,
    logit_normal_timesteps,
    loss_weights,
    stratified_timesteps,
    timestep_probabilities,
    uniform_timesteps,
)

LINEAR = NoiseSchedule.linear()
ZERO_SNR = LINEAR.zero_terminal_snr()
WEIGHTINGS: list[Weighting] = ["constant", "min_snr", "soft_min_snr", "p2", "debiased", "elbo"]


def even_grid(count: int) -> Tensor:
    """(count,) uniforms, one in the middle of each equal part of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_uniform_reaches_every_index_equally_often_and_no_other() -> None:
    assert torch.equal(torch.bincount(uniform_timesteps(even_grid(4000), 1000)), torch.full((1000,), 4))
    assert uniform_timesteps(numbers(0.0, 1 - 2**-53), 1000).tolist() == [0, 999]


def test_a_global_batch_has_one_t_in_each_stratum() -> None:
    u = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = stratified_timesteps(u, torch.arange(16, 24), 8, 1000)
    assert (t // 125).tolist() == list(range(8))
    # The largest u below 1 rounds up to the end of its stratum; the last one must not leave the process.
    assert stratified_timesteps(numbers(1 - 2**-53), torch.tensor([7]), 8, 1000).item() == 999


def test_strata_do_not_depend_on_how_ranks_share_the_batch() -> None:
    u = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.arange(8, 16)
    shares = [stratified_timesteps(u[rank::2], draws[rank::2], 8, 1000) for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(), stratified_timesteps(u, draws, 8, 1000))


def test_strata_that_do_not_divide_the_process_stay_uniform() -> None:
    # 3 strata over 10 indices: on an even grid of 30 (stratum, u) pairs every index is hit 3 times.
    t = stratified_timesteps(even_grid(10).repeat_interleave(3), torch.arange(30), 3, 10)
    assert torch.equal(torch.bincount(t), torch.full((10,), 3))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5), (1.0, 2.0)])
def test_logit_normal_has_the_closed_form_distribution(mean: float, std: float) -> None:
    """P(t < k) = Phi((logit(k/T) - mean) / std), met on an even grid to one part of it."""
    t = logit_normal_timesteps(even_grid(10_000), 50, mean=mean, std=std)
    ours = torch.bincount(t, minlength=50).cumsum(0)[:-1] / 10_000
    expected = [0.5 * math.erfc(-(math.log(k / (50 - k)) - mean) / std / math.sqrt(2)) for k in range(1, 50)]
    torch.testing.assert_close(ours.double(), numbers(*expected), rtol=0, atol=1e-4)
    first, last = logit_normal_timesteps(numbers(0.0, 1 - 2**-53), 50, mean=mean, std=std).tolist()
    assert first == 0 and 48 <= last <= 49


def test_history_keeps_the_newest_in_order_and_leaves_out_what_is_not_finite() -> None:
    empty = LossHistory.empty(3, kept=2)
    t = torch.tensor([1, 1, 0, 1, 1, 2])
    losses = torch.tensor([1.0, 2.0, 5.0, math.nan, 3.0, math.inf])
    history = empty.updated(t, losses)
    assert history.losses.tolist() == [[5, 0], [2, 3], [0, 0]] and history.counts.tolist() == [1, 2, 0]
    # In one batch or in several, it is the same history; the old one is untouched.
    in_two = empty.updated(t[:2], losses[:2]).updated(t[2:], losses[2:])
    assert torch.equal(in_two.losses, history.losses) and torch.equal(in_two.counts, history.counts)
    assert empty.counts.tolist() == [0, 0, 0] and not empty.losses.any()


def test_history_is_uniform_until_full_and_then_goes_by_the_root_of_the_second_moment() -> None:
    history = LossHistory.empty(3, kept=2).updated(torch.tensor([0, 0, 1, 1, 2]), numbers(3, 4, 0, 1, 1))
    assert history.probabilities().tolist() == [1 / 3] * 3
    full = history.updated(torch.tensor([2]), numbers(-7))  # a decoder term may be negative
    root = numbers(math.sqrt(12.5), math.sqrt(0.5), 5)
    torch.testing.assert_close(full.probabilities(0.0), root / root.sum())
    torch.testing.assert_close(full.probabilities(0.3), 0.7 * root / root.sum() + 0.1)
    assert full.probabilities().sum().item() == pytest.approx(1, abs=1e-15)
    # Losses that say nothing leave the law uniform.
    flat = LossHistory.empty(2, kept=1).updated(torch.tensor([0, 1]), numbers(0, 0))
    assert flat.probabilities().tolist() == [0.5, 0.5]


def test_importance_draws_have_the_law_and_weights_undo_it_exactly() -> None:
    probabilities = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    probabilities = probabilities / probabilities.sum()
    t, weights = importance_timesteps(even_grid(100_000), probabilities)
    # Within one part of the grid at each end of its interval.
    difference = torch.bincount(t, minlength=40) - 100_000 * probabilities
    assert difference.abs().max() < 1
    torch.testing.assert_close(weights, 1 / (40 * probabilities[t]), rtol=1e-14, atol=0)
    # One u in each interval draws every t once: sum of p_t weight_t f_t is the plain mean, whatever f.
    once, weight = importance_timesteps(probabilities.cumsum(0) - probabilities / 2, probabilities)
    assert once.tolist() == list(range(40))
    f = torch.arange(40, dtype=torch.float64) ** 2
    assert (probabilities * weight * f).sum().item() == pytest.approx(f.mean().item(), rel=1e-14)


def test_importance_draws_at_the_edges() -> None:
    probabilities = numbers(0, 0.5, 0, 0.5, 0)
    t, weights = importance_timesteps(numbers(0, 0.25, 0.5, 1 - 2**-53), probabilities)
    assert t.tolist() == [1, 1, 3, 3] and weights.tolist() == [0.4] * 4
    # Ten tenths add up to a little less than 1: the largest u must not fall off the end.
    assert importance_timesteps(numbers(1 - 2**-53), torch.full((10,), 0.1))[0].item() == 9


def test_weights_on_the_eps_error() -> None:
    snr = LINEAR.snr
    expected = {
        "constant": torch.ones(1000, dtype=torch.float64),
        "min_snr": torch.where(snr > 3, 3 / snr, 1.0),
        "soft_min_snr": 3 / (snr + 3),
        "p2": (1 - LINEAR.alpha_bar) ** 0.7,  # 1 + snr = 1 / (1 - alpha_bar)
        "debiased": LINEAR.sigmas,
    }
    for name, weights in expected.items():
        ours = loss_weights(LINEAR, name, "epsilon", min_snr_gamma=3.0, p2_gamma=0.7)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, weights, rtol=1e-12, atol=0)
    capped = loss_weights(NoiseSchedule.cosine(), "debiased", "epsilon")
    assert capped[-1] == weighting.MAX_DEBIASED and capped[-2] == NoiseSchedule.cosine().snr[-2].rsqrt()


@pytest.mark.parametrize("within", [None, range(20, 70)])
def test_probabilities_of_t_are_the_shares_that_the_laws_draw(within: range | None) -> None:
    """Of even numbers in place of random ones: a t gets its share to within one of them."""
    count, some = 20_000, within or range(100)
    drawn = logit_normal_timesteps(even_grid(count), 100, mean=-0.7, std=0.8, within=within)
    law = timestep_probabilities("logit_normal", 100, mean=-0.7, std=0.8, within=within)
    assert (drawn.bincount(minlength=100) / count - law).abs().max() <= 1 / count
    for even in ("uniform", "stratified", "importance"):
        law = timestep_probabilities(even, 100, within=within)
        assert law.nonzero().flatten().tolist() == list(some) and law.max().item() == pytest.approx(1 / len(some))


def test_min_snr_on_v_and_x0_as_published() -> None:
    snr = ZERO_SNR.snr
    torch.testing.assert_close(loss_weights(ZERO_SNR, "min_snr", "sample"), snr.clamp(max=5), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        loss_weights(ZERO_SNR, "min_snr", "v_prediction"), snr.clamp(max=5) / (snr + 1), rtol=1e-12, atol=0
    )


def test_elbo_weight_on_x0_is_half_the_loss_of_snr_and_at_0_the_decoders() -> None:
    ours = loss_weights(LINEAR, "elbo", "sample")
    torch.testing.assert_close(ours[1:], -LINEAR.snr.diff() / 2, rtol=1e-12, atol=0)
    assert ours[0].item() == pytest.approx(0.5 / LINEAR.posterior_variance[1].item(), rel=1e-12)
    # errata B4: its value at index 300
    assert ours[300].item() == pytest.approx(0.0032926, rel=1e-4)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(), ZERO_SNR], ids=["linear", "cosine", "zero_snr"])
def test_weights_are_finite_and_the_same_for_one_prediction_in_every_space(
    schedule: NoiseSchedule, name: Weighting
) -> None:
    """An error d of x0 is one of d / s in v, of d a / s in eps, of d times its weight of x0 in the posterior's mean.

    One of eps is 1 / s times as much in the score, sqrt(beta) / s in the step's noise.
    """
    on_x0 = loss_weights(schedule, name, "sample")
    a, s = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    weight_x0 = schedule.alpha_bar_prev.sqrt() * schedule.betas / (1 - schedule.alpha_bar)
    factors: dict[LossSpace, Tensor] = {"v_prediction": 1 / s, "posterior_mean": weight_x0}
    if not (schedule.has_zero_snr and name == "elbo"):
        factors |= {"epsilon": a / s, "score": a / s**2, "step_noise": a / s**2 * schedule.betas.sqrt()}
    for space, factor in factors.items():
        weights = loss_weights(schedule, name, space)
        assert bool(weights.isfinite().all()) and bool((weights >= 0).all())
        torch.testing.assert_close(weights * factor**2, on_x0, rtol=1e-9, atol=0)
    assert bool(on_x0.isfinite().all()) and on_x0[0] > 0


def test_no_weighting_is_1_in_every_space() -> None:
    for space in get_args(LossSpace):
        assert bool((loss_weights(ZERO_SNR, "none", space) == 1).all())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="elbo is infinite on the epsilon error where this schedule leaves no signal"):
        loss_weights(ZERO_SNR, "elbo", "epsilon")
    with pytest.raises(ValueError, match="unknown weighting 'snr'; choose none, constant"):
        loss_weights(LINEAR, "snr", "epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown loss space 'eps'; choose epsilon"):
        loss_weights(LINEAR, "constant", "eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma of min-SNR must be positive, got 0"):
        loss_weights(LINEAR, "min_snr", "epsilon", min_snr_gamma=0.0)
    with pytest.raises(ValueError, match="logit-normal law must be positive, got -1"):
        logit_normal_timesteps(even_grid(2), 10, std=-1.0)
