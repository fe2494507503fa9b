"""The learned variance on steps that it was not trained on.

Oracle: Gaussian data, whose best variance is known in closed form at every step of every process (Bao et al. 2022,
theorem 1).
"""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.names import IndexSpacing, LearnedVariance
from pixart_ft.diffusion.objectives import vlb_term
from pixart_ft.diffusion.process import (
    Noised,
    Prediction,
    learned_log_variance,
    learned_range_log_variance,
    log_variance_of,
)
from pixart_ft.diffusion.respacing import spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule
from tests.helpers.networks import best_variance, best_variance_half, left_variance, randn

LINEAR = NoiseSchedule.linear()
PROCESSES = {
    "linear": LINEAR,
    "cosine": NoiseSchedule.cosine(400),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "zero_snr": LINEAR.zero_terminal_snr(),
    "short": NoiseSchedule.linear(2, beta_end=0.5),
    "one step": NoiseSchedule.from_betas([0.3]),
}


def said(process: NoiseSchedule, half: Tensor, variance: LearnedVariance = "learned") -> Tensor:
    """The variance (T,) that the steps of a process get from a variance half (T,)."""
    column, t = half.view(-1, 1, 1, 1), torch.arange(process.num_steps)
    return log_variance_of(process, Prediction(column, column, column), column, t, variance).exp().flatten()


def calibration(c: float, native: NoiseSchedule, kept: list[int], variance: LearnedVariance) -> Tensor:
    """Predicted over best variance at the kept steps, of the best network on `native` for data of variance c."""
    std = torch.tensor(c, dtype=torch.float64).sqrt()
    process = native.respaced(kept)
    return said(process, best_variance_half(native, std)[kept], variance) / best_variance(process, std)


# (variance of the data, the worst ratio by the fraction taken literally at 10, 25, 50, 100 and 250 steps)
LITERAL = [
    (0.25, (0.1957, 0.7676, 0.9465, 0.9875, 0.9983)),
    (0.05, (0.0222, 0.2948, 0.7308, 0.9265, 0.9893)),
    (0.01, (0.0180, 0.0798, 0.3426, 0.7174, 0.9486)),
]


@pytest.mark.parametrize(("c", "literal"), LITERAL)
def test_the_best_network_has_the_best_variance_at_every_respacing(c: float, literal: tuple[float, ...]) -> None:
    for count, worst in zip((10, 25, 50, 100, 250), literal, strict=True):
        kept = spaced_indices(1000, count)
        torch.testing.assert_close(
            calibration(c, LINEAR, kept, "learned"), torch.ones(count).double(), rtol=1e-11, atol=0
        )
        assert calibration(c, LINEAR, kept, "learned_range").min().item() == pytest.approx(worst, abs=5e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "zero_snr"])
@pytest.mark.parametrize("spacing", get_args(IndexSpacing))
def test_whatever_the_process_the_spacing_and_the_data(name: str, spacing: IndexSpacing) -> None:
    """Trailing starts its last step above index 0, where no variance was learned for so long a step either."""
    native = PROCESSES[name]
    for c in (1e-3, 0.3, 1.0, 4.0):
        found = calibration(c, native, spaced_indices(native.num_steps, 20, spacing), "learned")
        torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-10, atol=0)


@pytest.mark.parametrize("c", [0.01, 0.25, 1.0])
def test_a_logarithm_is_itself_where_it_was_learned_and_the_best_at_every_respacing(c: float) -> None:
    std = torch.tensor(c, dtype=torch.float64).sqrt()
    best = best_variance(LINEAR, std)
    torch.testing.assert_close(said(LINEAR, best.log(), "direct"), best, rtol=1e-14, atol=0)
    for count in (10, 25, 250):
        kept = spaced_indices(1000, count)
        few = LINEAR.respaced(kept)
        # best / beta tilde is 1.0000004 where it is least: seven of sixteen digits go, and another three by w^2
        torch.testing.assert_close(said(few, best.log()[kept], "direct"), best_variance(few, std), rtol=1e-6, atol=0)


def test_a_process_respaced_twice_remembers_what_was_trained() -> None:
    once, twice = LINEAR.respaced([0, 40, 500, 999]), LINEAR.respaced(range(0, 1000)).respaced([0, 40, 500, 999])
    half = torch.tensor([-0.3, 0.9, 0.1, -0.8], dtype=torch.float64)
    torch.testing.assert_close(said(twice, half), said(once, half), rtol=1e-12, atol=0)
    again = LINEAR.respaced([0, 7, 40, 500, 900, 999]).respaced([0, 2, 3, 5])
    torch.testing.assert_close(said(again, half), said(once, half), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_on_the_steps_that_were_trained_it_is_the_range_itself(name: str) -> None:
    """To the bit on the process itself, and to rounding through the error of x0, between and at both ends."""
    native = PROCESSES[name]
    t = torch.arange(native.num_steps)
    for value in (-1.0, -0.9, -0.1, 0.4, 1.0):
        half = torch.full((native.num_steps, 1, 1, 1), value, dtype=torch.float64)
        literal = learned_range_log_variance(native, half, t)
        assert torch.equal(learned_log_variance(native, half, t), literal)
        kept = learned_log_variance(native.respaced(range(native.num_steps)), half, t)
        # 1 - alpha_bar, from 1e-4 up, has its digits but for the last four
        torch.testing.assert_close(kept, literal, rtol=0, atol=1e-11)


def test_beyond_the_errors_that_there_are_it_is_the_nearest() -> None:
    """Below, x0 is known: beta tilde. Above, the noise is read as x0: beta tilde + w^2 sigma^2, whose limit is that of
    data ever wider."""
    process, c = LINEAR.respaced(20), torch.tensor(1e9, dtype=torch.float64)
    low, high = (said(process, torch.full((20,), value).double()) for value in (-3.0, 1e7))
    torch.testing.assert_close(low[1:], process.posterior_variance[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(high[1:], best_variance(process, c)[1:], rtol=1e-8, atol=0)
    torch.testing.assert_close(left_variance(process, c), process.sigmas**2, rtol=1e-8, atol=0)
    first, clipped = LINEAR.betas[0].item(), LINEAR.posterior_variance[1].item()
    assert low[0].item() == pytest.approx(clipped**2 / first)  # the range itself, beyond its end
    trailing = LINEAR.respaced(spaced_indices(1000, 20, "trailing"))  # no variance 0, which would be infinitely sure
    assert said(trailing, torch.full((20,), -3.0).double())[0].item() == pytest.approx(clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_than_float64(dtype: torch.dtype) -> None:
    """The arithmetic is in float32: some roundings of 6e-8 between numbers near their own size, none cancels."""
    for native in (LINEAR, LINEAR.zero_terminal_snr()):
        process = native.respaced(30)
        half = torch.linspace(-1.2, 1.2, 30).to(dtype)
        found, exact = said(process, half), said(process, half.double())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "zero_snr"])
def test_training_a_respaced_process_moves_the_half_towards_the_best(name: str) -> None:
    """The term's gradient is finite everywhere, vanishes at the best variance, and points to it from both sides."""
    native, std = PROCESSES[name], torch.tensor(0.5, dtype=torch.float64)
    kept = spaced_indices(native.num_steps, 10)
    process, t, best = native.respaced(kept), torch.arange(10), best_variance_half(native, std)[kept]
    a, s = process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt()
    signs = torch.tensor(
        [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64
    )  # moments of N(0, I)

    def gradient(half: Tensor) -> Tensor:
        half = half.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for x_sign, e_sign in signs:
            x0, eps = (sign * torch.ones(10, 1, 1, 1).double() for sign in (x_sign * std, e_sign))
            noised = Noised.of(process, x0, t, eps)
            guess = (a * std**2 / (a**2 * std**2 + s**2)).view(-1, 1, 1, 1) * noised.x_t
            total = total + vlb_term(process, torch.cat([guess, half.view(-1, 1, 1, 1)], 1), noised, "sample").sum()
        return torch.autograd.grad(total, half)[0]

    here, above, below = gradient(best), gradient(best + 0.05), gradient(best - 0.05)
    assert bool((above > 0).all()) and bool((below < 0).all())
    torch.testing.assert_close(here, torch.zeros_like(here), rtol=0, atol=1e-10)
    for value in (-100.0, -1.0, 1.0, 100.0):
        assert bool(gradient(torch.full((10,), value).double()).isfinite().all())


def test_each_picture_reads_its_own_step() -> None:
    process, half = LINEAR.respaced(10), randn(3, 4, 2, 2)
    t = torch.tensor([7, 0, 3])
    together = learned_log_variance(process, half, t)
    for n in range(3):
        assert torch.equal(together[n : n + 1], learned_log_variance(process, half[n : n + 1], t[n : n + 1]))
    assert math.isfinite(together.sum().item()) and together.shape == half.shape
