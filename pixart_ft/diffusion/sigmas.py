"""Noise levels sigma: the way between t, sigma and log SNR, and the grids of the sigma-space samplers.

An index into a schedule may be fractional here: between two of its levels, log sigma is interpolated linearly.
Grids are (count,) float64, from the most noise to the least, without the closing 0. Symbols: `pixart_ft.diffusion`.
"""

import math

import torch
from torch import Tensor

from pixart_ft.diffusion.names import Lookup, PredictionType, unknown
from pixart_ft.diffusion.process import eps_from, promoted, split_output, x0_from
from pixart_ft.diffusion.respacing import spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule, interpolate


def sigma_to_log_snr(sigma: Tensor) -> Tensor:
    """log SNR = -2 log sigma, infinite at sigma 0."""
    return -2 * sigma.log()


def log_snr_to_sigma(log_snr: Tensor) -> Tensor:
    """sigma = exp(-log SNR / 2); the inverse of `sigma_to_log_snr`."""
    return torch.exp(-log_snr / 2)


def sigma_to_index(schedule: NoiseSchedule, sigma: Tensor, lookup: Lookup = "interpolated") -> Tensor:
    """The index into `schedule` whose level is `sigma`, float64, of sigma's shape; its ends beyond them.

    interpolated: fractional, linear in log sigma; nearest_log: the nearest level in log sigma; nearest: in sigma
    (Karras et al. 2022, Alg. 1 of their VP experiments). Raises ValueError unless every sigma is positive.
    """
    sigma = sigma.to(torch.float64)
    if not bool((sigma > 0).all()):
        raise ValueError(f"only positive noise levels have an index, got {sigma.min().item():g}")
    if lookup == "interpolated":
        indices = torch.arange(schedule.num_steps, dtype=torch.float64)
        found = interpolate(sigma.log(), schedule.log_sigmas, indices)
        whole = found.round()  # a level of the schedule itself, to the rounding of its logarithm
        return torch.where((found - whole).abs() < 1e-9, whole, found)
    if lookup == "nearest_log":
        levels, wanted = schedule.log_sigmas, sigma.log()
    elif lookup == "nearest":
        levels, wanted = schedule.sigmas, sigma
    else:
        raise unknown(lookup, "lookup", Lookup)
    # An infinite sigma is as far from every finite level: clamped, it meets the last.
    distance = (wanted.clamp(levels[0], levels[-1]).unsqueeze(-1) - levels).abs()
    # inf - inf, a level of no signal met exactly
    return distance.nan_to_num(nan=0.0, posinf=math.inf).argmin(dim=-1).to(torch.float64)


def index_to_sigma(schedule: NoiseSchedule, index: Tensor) -> Tensor:
    """The level at a possibly fractional index, float64; inverts `sigma_to_index` within the schedule."""
    indices = torch.arange(schedule.num_steps, dtype=torch.float64)
    return interpolate(index.to(torch.float64), indices, schedule.log_sigmas).exp()


def index_to_timestep(schedule: NoiseSchedule, index: Tensor) -> Tensor:
    """What the network receives at a possibly fractional index: float64, between the schedule's own timesteps."""
    indices = torch.arange(schedule.num_steps, dtype=torch.float64)
    return interpolate(index.to(torch.float64), indices, schedule.timesteps.to(torch.float64))


def signal_and_noise(sigma: float) -> tuple[float, float]:
    """a = 1 / sqrt(1 + sigma^2) and s = sigma a: what of the unit-variance x = a x0 + s eps is which."""
    a = (1 + sigma**2) ** -0.5
    return a, sigma * a


def eps_at_sigma(model_output: Tensor, x: Tensor, sigma: float, prediction_type: PredictionType) -> Tensor:
    """The noise eps that a network's output (N, C or 2C, H, W) at x says, at any sigma, on a schedule's level or not.

    x = (x0 + sigma eps) / sqrt(1 + sigma^2) is what the network received. Raises ValueError for a `StepPrediction`,
    which has no meaning between two steps.
    """
    value = promoted(split_output(model_output, x.shape[1])[0])
    return eps_from(value, promoted(x), *signal_and_noise(sigma), prediction_type)


def x0_at_sigma(model_output: Tensor, y: Tensor, sigma: float, prediction_type: PredictionType) -> Tensor:
    """The guess of x0 in a network's output (N, C or 2C, H, W) at y = x0 + sigma eps, at any sigma.

    The network received y / sqrt(1 + sigma^2). Raises ValueError for a `StepPrediction`, as `eps_at_sigma`.
    """
    value, y = promoted(split_output(model_output, y.shape[1])[0]), promoted(y)
    if prediction_type not in ("v_prediction", "score"):
        return x0_from(value, y, 1, sigma, prediction_type)
    a, s = signal_and_noise(sigma)
    return x0_from(value, a * y, a, s, prediction_type)


def karras_sigmas(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Even steps in sigma^(1/rho) (Karras et al. 2022, eq. 5); larger rho, more steps at little noise."""
    _check(count, sigma_min, sigma_max)
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho:g}")
    return torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count, dtype=torch.float64) ** rho


def exponential_sigmas(count: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Even steps in log sigma: a constant ratio."""
    _check(count, sigma_min, sigma_max)
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), count, dtype=torch.float64).exp()


def linspace_sigmas(schedule: NoiseSchedule, count: int) -> Tensor:
    """Levels at even steps of the index, T-1 to 0, between the schedule's levels where they fall there."""
    _check_finite(schedule, count)
    return index_to_sigma(schedule, torch.linspace(schedule.num_steps - 1, 0, count, dtype=torch.float64))


def trailing_sigmas(schedule: NoiseSchedule, count: int) -> Tensor:
    """Levels at every (T/count)-th index counted from T-1: `respacing.spaced_indices` with spacing trailing."""
    _check_finite(schedule, count)
    return schedule.sigmas[spaced_indices(schedule.num_steps, count, "trailing")[::-1]]


def _check(count: int, sigma_min: float, sigma_max: float) -> None:
    if count < 1:
        raise ValueError(f"a grid needs at least one noise level, got {count}")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"noise levels must be 0 < sigma_min <= sigma_max < inf, got {sigma_min:g} and {sigma_max:g}")


def _check_finite(schedule: NoiseSchedule, count: int) -> None:
    if schedule.has_zero_snr:
        raise ValueError("a schedule with zero terminal SNR starts at sigma = inf, where no sigma-space grid can")
    _check(count, 1.0, 1.0)
