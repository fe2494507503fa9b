"""The probability-flow ODE with error control, and Song's continuous process.

Oracles: Gaussian data, on which (y - mean) / sqrt(std^2 + sigma^2) is constant along the flow; a network that knows x0,
along whose flow the noise is constant; the integral of beta.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.flow import solve_flow, vp_signal
from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned
from pixart_ft.schedulers import ProbabilityFlowScheduler
from tests.helpers.networks import KINDS, SCHEDULES, gaussian, level, oracle, randn

MEAN, STD = 0.3, 0.5
LINEAR = SCHEDULES["linear"]


def exact(y: Tensor, sigma: float, after: float) -> Tensor:
    return MEAN + (y - MEAN) * math.sqrt((STD**2 + after**2) / (STD**2 + sigma**2))


def eps(y: Tensor, sigma: float) -> Tensor:
    return sigma * (y - MEAN) / (STD**2 + sigma**2)


@pytest.mark.parametrize("method", ["RK45", "DOP853"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_flow_meets_its_tolerance_in_both_directions(method: str, tolerance: float) -> None:
    """Down from 157 to 0.01 and up again, where the flow drives errors apart; the bound of a step is not a run's."""
    start = 157 * randn(2, 4, 3, 3)
    down, _ = solve_flow(eps, start, 157.0, 0.01, rtol=tolerance, atol=tolerance, method=method)
    assert (down - exact(start, 157.0, 0.01)).abs().max() < 20 * tolerance
    up, _ = solve_flow(eps, down, 0.01, 157.0, rtol=tolerance, atol=tolerance, method=method)
    assert ((up - exact(down, 0.01, 157.0)) / 157).abs().max() < 200 * tolerance


def test_flow_counts_its_calls_and_keeps_shape_and_dtype() -> None:
    levels: list[float] = []

    def counted(y: Tensor, sigma: float) -> Tensor:
        levels.append(sigma)
        assert y.shape == (2, 4, 3, 3) and y.dtype == torch.float32
        return eps(y, sigma)

    found, calls = solve_flow(counted, randn(2, 4, 3, 3).float(), 10.0, 0.1, rtol=1e-4, atol=1e-4)
    assert calls == len(levels) and found.shape == (2, 4, 3, 3) and found.dtype == torch.float32
    assert max(levels) == pytest.approx(10) and min(levels) == pytest.approx(0.1)
    _, more = solve_flow(counted, randn(2, 4, 3, 3).float(), 10.0, 0.1, rtol=1e-6, atol=1e-6)
    assert more > calls


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda y, sigma: y / 0, "output is not finite at sigma 10"),
        (lambda y, sigma: y.sign() / sigma**2 * (1e300 if sigma < 5 else 0), "not solved|not finite"),
    ],
)
def test_flow_that_cannot_be_followed_is_an_error(bad: Callable[[Tensor, float], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_flow(bad, randn(1, 4, 2, 2), 10.0, 0.1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
def test_adaptive_scheduler_reaches_the_closed_form(name: str, tolerance: float) -> None:
    """x_T to the least noise along the flow, then the guess of x0 there."""
    schedule = SCHEDULES[name]
    scheduler = ProbabilityFlowScheduler.from_schedule(schedule, "epsilon", {"tolerance": tolerance})
    network, told = gaussian(schedule, MEAN, STD), []

    def watched(x: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.shape == (1,) and timestep.dtype == torch.float32
        told.append(timestep.item())
        return network(x, timestep)

    x = randn(1, 4, 3, 3)
    found, calls = scheduler.solve(watched, x)
    first, last = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    y = exact(x * math.sqrt(1 + last**2), last, first)
    expected = MEAN + STD**2 / (STD**2 + first**2) * (y - MEAN)
    assert (found - expected).abs().max() < 20 * tolerance
    assert calls == len(told) and max(told) == 999 and told[-1] == pytest.approx(0, abs=1e-6)
    assert calls < 400


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_scheduler_finds_the_picture_of_a_network_that_knows_it(kind: PredictionType) -> None:
    """Its flow keeps the noise, so any tolerance follows it; also where the network knows another schedule."""
    x0 = randn(1, 4, 3, 3, seed=1)
    for schedule in (LINEAR, conditioned(SCHEDULES["scaled_linear"], LINEAR, "snr_matched")):
        scheduler = ProbabilityFlowScheduler.from_schedule(schedule, kind, {"tolerance": 1e-4})
        found, _ = scheduler.solve(oracle(LINEAR, kind, x0), randn(1, 4, 3, 3))
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-8)


def test_adaptive_and_even_steps_go_to_the_same_place() -> None:
    x = randn(1, 4, 3, 3)
    network = gaussian(LINEAR, MEAN, STD)
    adaptive, _ = ProbabilityFlowScheduler(tolerance=1e-6).solve(network, x)
    scheduler, even = ProbabilityFlowScheduler(), x
    scheduler.set_timesteps(500)
    for timestep in scheduler.timesteps:
        even = scheduler.step(network(even, timestep), timestep, even)[0]
    assert (adaptive - even).abs().max() < 0.01


def test_adaptive_scheduler_names_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="tolerance: give one"):
        ProbabilityFlowScheduler().solve(oracle(LINEAR, "epsilon", randn(1, 4, 2, 2)), randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        ProbabilityFlowScheduler(tolerance=0.0)
    for kind in ("posterior_mean", "step_noise"):
        with pytest.raises(ValueError, match=rf"a prediction of one step \({kind}\) has no meaning"):
            ProbabilityFlowScheduler(tolerance=1e-3, prediction_type=kind)


def test_signal_of_the_continuous_process_is_the_integral_of_its_beta() -> None:
    assert vp_signal(torch.zeros(1)).item() == 1
    times = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for low, high in ((0.1, 20.0), (0.5, 3.0)):
        integral = torch.cumulative_trapezoid(low + times * (high - low), times)
        torch.testing.assert_close(vp_signal(times[1:], low, high), torch.exp(-integral / 2), rtol=1e-9, atol=0)


def test_signal_of_the_continuous_process_is_the_limit_of_the_linear_schedule() -> None:
    """Twice the steps, half the distance."""
    gaps = []
    for count in (500, 1000, 2000):
        schedule = NoiseSchedule.linear(count, beta_start=0.1 / count, beta_end=20 / count)
        times = torch.arange(1, count + 1, dtype=torch.float64) / count
        gaps.append((schedule.alpha_bar.sqrt() - vp_signal(times)).abs().max().item())
    assert [math.log2(a / b) for a, b in pairwise(gaps)] == pytest.approx([1, 1], abs=0.05)


def test_exact_variance_of_the_continuous_process_at_its_last_time() -> None:
    """a^2 std^2 + 1 - a^2 at t = 1e-3, where its samplers stop."""
    alpha_bar = vp_signal(torch.tensor(1e-3, dtype=torch.float64)).item() ** 2
    for std, expected in ((0.5, 0.250082), (1.0, 1.0), (2.0, 3.999670)):
        assert alpha_bar * std**2 + 1 - alpha_bar == pytest.approx(expected, abs=6e-7)


def test_level_of_the_networks_here_is_the_schedules() -> None:
    """The oracles' own reading of a timestep, checked once: the table at whole ones, log sigma between."""
    a, s = level(LINEAR, torch.tensor(500))
    assert (a, s) == pytest.approx((LINEAR.alpha_bar[500].sqrt().item(), (1 - LINEAR.alpha_bar[500]).sqrt().item()))
    a, s = level(LINEAR, torch.tensor([10.5]))
    assert s / a == pytest.approx(math.sqrt(LINEAR.sigmas[10].item() * LINEAR.sigmas[11].item()), rel=1e-12)
