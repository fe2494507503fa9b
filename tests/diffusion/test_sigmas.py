"""Noise levels and their grids. Oracles: inverses, closed forms, diffusers (float32). See also test_golden.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from pixart_ft.diffusion import process, sigmas
from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
LOW, HIGH = LINEAR.sigmas[0].item(), LINEAR.sigmas[-1].item()


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sigma_and_log_snr_are_each_others_inverse() -> None:
    torch.testing.assert_close(sigmas.sigma_to_log_snr(LINEAR.sigmas), LINEAR.snr.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigmas.log_snr_to_sigma(LINEAR.snr.log()), LINEAR.sigmas, rtol=1e-12, atol=0)
    assert sigmas.sigma_to_log_snr(numbers(0, torch.inf)).tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, LINEAR.respaced(7)], ids=["linear", "cosine", "respaced"])
def test_index_and_sigma_are_each_others_inverse_between_the_levels_too(schedule: NoiseSchedule) -> None:
    index = torch.linspace(0, schedule.num_steps - 1, 3001, dtype=torch.float64)
    found = sigmas.sigma_to_index(schedule, sigmas.index_to_sigma(schedule, index))
    # log sigma moves by as little as 0.003 per index, which costs three of the sixteen digits.
    torch.testing.assert_close(found, index, rtol=0, atol=1e-10)
    sigma = torch.logspace(-1.5, 1.5, 301, dtype=torch.float64)
    back = sigmas.index_to_sigma(schedule, sigmas.sigma_to_index(schedule, sigma))
    torch.testing.assert_close(back, sigma.clamp(schedule.sigmas[0], schedule.sigmas[-1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("lookup", ["interpolated", "nearest_log", "nearest"])
def test_every_lookup_finds_the_levels_themselves_and_the_ends_beyond_them(lookup: sigmas.Lookup) -> None:
    for schedule in (LINEAR, LINEAR.zero_terminal_snr(), NoiseSchedule.from_betas([0.5])):
        last = schedule.num_steps - 1
        found = sigmas.sigma_to_index(schedule, schedule.sigmas, lookup)
        assert torch.equal(found, torch.arange(last + 1, dtype=torch.float64))
        beyond = numbers(1e-300, LOW / 2, torch.inf)
        assert sigmas.sigma_to_index(schedule, beyond, lookup).tolist() == [0, 0, last]
    assert sigmas.sigma_to_index(LINEAR, numbers(1e6), lookup).tolist() == [999]
    assert sigmas.sigma_to_index(LINEAR, LINEAR.sigmas[:6].view(2, 3), lookup).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_three_lookups_differ_between_two_levels() -> None:
    """Levels 1 and 4: their arithmetic middle is 2.5, their geometric one 2; 2.2 lies between the two."""
    schedule = NoiseSchedule.from_betas([0.5, 1 - 2 / 17])
    torch.testing.assert_close(schedule.sigmas, numbers(1, 4))
    sigma = numbers(1.9, 2.2, 2.6)
    assert sigmas.sigma_to_index(schedule, sigma, "nearest_log").tolist() == [0, 1, 1]
    assert sigmas.sigma_to_index(schedule, sigma, "nearest").tolist() == [0, 0, 1]
    torch.testing.assert_close(sigmas.sigma_to_index(schedule, sigma), sigma.log() / math.log(4))


def test_timesteps_between_two_kept_ones() -> None:
    respaced = LINEAR.respaced([0, 100, 999])
    assert sigmas.index_to_timestep(respaced, numbers(0, 0.5, 1, 1.5, 2, 7)).tolist() == [0, 50, 100, 549.5, 999, 999]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
def test_the_noise_read_at_a_schedules_level_is_the_one_that_process_reads(
    prediction_type: PredictionType,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)
    output = torch.randn(1, 8, 2, 2, generator=generator, dtype=torch.float64)
    for index in (0, 500, 999):
        expected = process.predict(LINEAR, output, x, torch.tensor([index]), prediction_type).eps
        ours = sigmas.eps_at_sigma(output, x, LINEAR.sigmas[index].item(), prediction_type)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        a = LINEAR.alpha_bar[index].sqrt().item()
        x0 = sigmas.x0_at_sigma(output, x / a, LINEAR.sigmas[index].item(), prediction_type)
        noise = (1 - LINEAR.alpha_bar[index]).sqrt()
        torch.testing.assert_close(a * x0 + noise * ours, x, rtol=1e-10, atol=1e-9)


def test_karras_grid_is_even_in_the_root_and_has_its_ends() -> None:
    for rho in (1.0, 3.0, 7.0):
        grid = sigmas.karras_sigmas(18, 0.002, 80.0, rho)
        steps = (grid ** (1 / rho)).diff()
        torch.testing.assert_close(steps, steps[0].expand(17), rtol=1e-9, atol=0)
        torch.testing.assert_close(grid[[0, -1]], numbers(80, 0.002), rtol=1e-12, atol=0)
    # Written out with rho 2: 3, then 2, then 1 squared.
    torch.testing.assert_close(sigmas.karras_sigmas(3, 1.0, 9.0, 2.0), numbers(9, 4, 1))


def test_exponential_grid_has_a_constant_ratio() -> None:
    torch.testing.assert_close(sigmas.exponential_sigmas(4, 0.01, 10.0), numbers(10, 1, 0.1, 0.01), rtol=1e-12, atol=0)


def test_linspace_and_trailing_grids_are_the_schedules_own_levels() -> None:
    torch.testing.assert_close(sigmas.linspace_sigmas(LINEAR, 1000), LINEAR.sigmas.flip(0), rtol=1e-12, atol=0)
    # 999 = 27 * 37, so 38 even steps of the index hit whole ones.
    torch.testing.assert_close(sigmas.linspace_sigmas(LINEAR, 38), LINEAR.sigmas[::27].flip(0), rtol=1e-12, atol=0)
    # With 21 they do not: between two levels, the geometric mean by distance.
    between = LINEAR.sigmas[949] ** 0.95 * LINEAR.sigmas[950] ** 0.05
    assert sigmas.linspace_sigmas(LINEAR, 21)[1].item() == pytest.approx(between.item(), rel=1e-12)
    assert torch.equal(sigmas.trailing_sigmas(LINEAR, 20), LINEAR.sigmas[49::50].flip(0))


GRIDS: dict[str, Callable[[int], torch.Tensor]] = {
    "karras": lambda count: sigmas.karras_sigmas(count, LOW, HIGH),
    "exponential": lambda count: sigmas.exponential_sigmas(count, LOW, HIGH),
    "linspace": lambda count: sigmas.linspace_sigmas(LINEAR, count),
    "trailing": lambda count: sigmas.trailing_sigmas(LINEAR, count),
}
# diffusers interpolates sigma itself between two levels, so its linspace agrees where the steps hit whole indices.
DIFFUSERS: dict[str, tuple[dict[str, Any], int]] = {
    "karras": ({"use_karras_sigmas": True}, 20),
    "exponential": ({"use_exponential_sigmas": True}, 20),
    "linspace": ({"timestep_spacing": "linspace"}, 38),
    "trailing": ({"timestep_spacing": "trailing"}, 28),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_and_their_indices_are_those_of_diffusers(name: str) -> None:
    settings, count = DIFFUSERS[name]
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **settings)
    scheduler.set_timesteps(count)
    ours = GRIDS[name](count)
    # diffusers works in float32, in which 1 - alpha_bar = 1e-4 at index 0 has four digits fewer.
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ours, rtol=1e-4, atol=0)
    index = sigmas.sigma_to_index(LINEAR, ours)
    torch.testing.assert_close(scheduler.timesteps.double(), index, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_fall_from_the_most_noise_and_end_before_0(name: str) -> None:
    for count in (1, 2, 10, 333):
        grid = GRIDS[name](count)
        assert grid.shape == (count,) and grid.dtype == torch.float64
        assert bool((grid.diff() < 0).all()) and grid[-1] > 0
        assert grid[0].item() == pytest.approx(HIGH, rel=1e-12)
        assert name == "trailing" or count == 1 or grid[-1].item() == pytest.approx(LOW, rel=1e-12)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: sigmas.sigma_to_index(LINEAR, numbers(1, 0)), "only positive noise levels .* got 0"),
        (lambda: sigmas.sigma_to_index(LINEAR, numbers(math.nan)), "only positive noise levels"),
        (lambda: sigmas.sigma_to_index(LINEAR, numbers(1), "log"), "'log'; choose interp"),  # type: ignore[arg-type]
        (lambda: sigmas.karras_sigmas(0, 0.1, 1.0), "at least one noise level, got 0"),
        (lambda: sigmas.karras_sigmas(5, 1.0, 0.1), "sigma_min <= sigma_max < inf, got 1 and 0.1"),
        (lambda: sigmas.exponential_sigmas(5, 0.0, 1.0), "0 < sigma_min .* got 0 and 1"),
        (lambda: sigmas.exponential_sigmas(5, 1.0, math.inf), "< inf, got 1 and inf"),
        (lambda: sigmas.karras_sigmas(5, 0.1, 1.0, rho=0), "rho must be positive, got 0"),
        (lambda: sigmas.linspace_sigmas(LINEAR.zero_terminal_snr(), 5), "zero terminal SNR starts at sigma = inf"),
        (lambda: sigmas.trailing_sigmas(LINEAR.zero_terminal_snr(), 5), "zero terminal SNR starts at sigma = inf"),
        (
            lambda: sigmas.eps_at_sigma(torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1), 1.0, "posterior_mean"),
            "posterior_mean has no meaning between two steps",
        ),
    ],
)
def test_mistakes_are_named(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize("steps", [1, 2, 7, 18, 50, 999, 1000])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.scaled_linear()])
def test_a_level_of_the_schedule_has_its_own_index(schedule: NoiseSchedule, steps: int) -> None:
    """Whole, and 0 at the least noise: not 2e-15, which the logarithm's rounding makes of it."""
    low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    grids = (sigmas.karras_sigmas(steps, low, high), sigmas.exponential_sigmas(steps, low, high))
    for grid in (*grids, sigmas.linspace_sigmas(schedule, steps)):
        index = sigmas.sigma_to_index(schedule, grid)
        assert index[0] == schedule.num_steps - 1 and (steps == 1 or index[-1] == 0)
    whole = torch.arange(schedule.num_steps, dtype=torch.float64)
    assert torch.equal(sigmas.sigma_to_index(schedule, schedule.sigmas), whole)
    near = schedule.sigmas[3] * (schedule.sigmas[4] / schedule.sigmas[3]) ** 1e-6
    assert sigmas.sigma_to_index(schedule, near).item() == pytest.approx(3 + 1e-6, abs=1e-9)
