"""The forward process q, its posterior, and conversions between everything a network may predict.

All functions take x_t (N, C, H, W) and t (N,) and return tensors of x_t's shape. Every conversion is linear
and inverts exactly, except that at zero SNR (alpha_bar = 0) eps, score and step noise do not determine x0:
asking for it raises ValueError. Symbols: `pixart_ft.diffusion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self, get_args

import torch
from torch import Tensor

from pixart_ft.diffusion.names import (
    FixedVariance,
    PredictionType,
    Quantity,
    StepPrediction,
    Variance,
    unknown,
)
from pixart_ft.diffusion.schedules import LearnedSteps, NoiseSchedule


@dataclass(frozen=True)
class Gaussian:
    """A diagonal normal distribution; the fields broadcast against each other.

    mean          (N, C, H, W)
    variance      zero for the posterior at t = 0
    log_variance  finite everywhere: clipped where the variance is zero
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a network's output says at x_t, at least float32.

    x0             (N, C, H, W) its guess of the data
    eps            (N, C, H, W) its guess of the noise
    variance_half  (N, C, H, W) what `log_variance_of` reads, or None for a network without variance channels
    """

    x0: Tensor
    eps: Tensor
    variance_half: Tensor | None


@dataclass(frozen=True)
class Noised:
    """A batch of data with its noise at indices t.

    x0, eps  (N, C, H, W) data and noise
    t        (N,) int64
    x_t      (N, C, H, W) what they make, `q_sample`
    area     (N, C, H, W) how much each place counts in the mean of a sample's loss; None: all alike
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor
    area: Tensor | None = None

    @classmethod
    def of(cls, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, area: Tensor | None = None) -> Self:
        """The arguments of `q_sample` with its result."""
        return cls(x0, eps, t, q_sample(schedule, x0, t, eps), area)


def promoted(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that already: the least that the arithmetic here is done in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries t (N,) of a float64 table, shaped (N, 1, 1, 1), in the promoted dtype and device of `like`.

    What was moved there is kept by the table itself: give the same one again, not another of the same values.
    """
    moved = _there(table, torch.promote_types(like.dtype, torch.float32), like.device)
    return moved[t].view(-1, *[1] * (like.ndim - 1))


@lru_cache(maxsize=64)
def _there(table: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table in this dtype on a device, moved there once: from memory that is not pinned each copy makes a GPU's host
    wait for all that is queued.

    The one place where tables leave float64; cast before the move, since some devices have no float64.
    """
    return table.to(dtype).to(device)


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4), at least float32."""
    a, s = _signal_and_noise(schedule, t, x0)
    return a * x0 + s * eps


def q_step(schedule: NoiseSchedule, x_before: Tensor, t: Tensor, step_noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha) x_{t-1} + sqrt(beta) e, the single step (Ho et al. 2020, eq. 2; Su, eq. 1.2)."""
    return at(schedule.step_signal, t, x_before) * x_before + at(schedule.step_noise, t, x_before) * step_noise


def q_posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
    """q(x_{t-1} | x_t, x0) (Ho et al. 2020, eqs. 6 and 7). At t = 0 its mean is x0 and its variance 0.

    mean [sqrt(alpha_bar_prev) beta x0 + sqrt(alpha) (1 - alpha_bar_prev) x_t] / (1 - alpha_bar),
    variance beta (1 - alpha_bar_prev) / (1 - alpha_bar)
    """
    weight_x0, weight_xt = _posterior_weights(schedule, t, x_t)
    return Gaussian(
        mean=weight_x0 * x0 + weight_xt * x_t,
        variance=at(schedule.posterior_variance, t, x_t),
        log_variance=at(schedule.posterior_log_variance, t, x_t),
    )


def velocity(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, sec. 4)."""
    a, s = _signal_and_noise(schedule, t, x0)
    return a * eps - s * x0


def network_timesteps(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """What the network receives at indices t (N,): int64, or float32 where the schedule's timesteps are fractional."""
    dtype = torch.int64 if schedule.timesteps.dtype == torch.int64 else torch.float32
    return _there(schedule.timesteps, dtype, t.device)[t]


def x0_from(value: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, kind: PredictionType) -> Tensor:
    """x0 from eps, v, the score or x0 itself at x = a x0 + s eps; else ValueError.

    In any scale, but for v and the score a^2 + s^2 = 1.
    """
    match kind:
        case "score":
            return x0_from(-s * value, x, a, s, "epsilon")
        case "sample":
            return value
        case "v_prediction":
            return a * x - s * value
        case "epsilon":
            return (x - s * value) / a
    raise _needs_step(kind)


def eps_from(value: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, kind: PredictionType) -> Tensor:
    """The noise eps, likewise."""
    match kind:
        case "score":
            return -s * value
        case "epsilon":
            return value
        case "v_prediction":
            return a * value + s * x
        case "sample":
            return (x - a * value) / s
    raise _needs_step(kind)


def to_x0(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """x0 from `value`, a quantity of the given kind at x_t."""
    value, plain = _stepless(schedule, value, x_t, t, kind)
    if plain == "sample":  # asked for no table, which would go to the GPU in vain
        return value
    # Only such schedules are looked into: on a GPU, reading t waits for everything queued before.
    if plain == "epsilon" and schedule.has_zero_snr and bool((t == schedule.num_steps - 1).any()):
        raise ValueError(
            f"{kind} cannot determine x0 at t = {schedule.num_steps - 1}, where this schedule leaves "
            "no signal; use v_prediction or sample"
        )
    return x0_from(value, x_t, *_signal_and_noise(schedule, t, x_t), plain)


def to_eps(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """The accumulated noise eps from `value`, a quantity of the given kind at x_t."""
    value, plain = _stepless(schedule, value, x_t, t, kind)
    if plain == "epsilon":
        return value
    return eps_from(value, x_t, *_signal_and_noise(schedule, t, x_t), plain)


def to_v(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """v from `value`, a quantity of the given kind at x_t."""
    if kind == "v_prediction":
        return promoted(value)
    x0, eps = to_x0(schedule, value, x_t, t, kind), to_eps(schedule, value, x_t, t, kind)
    return velocity(schedule, x0, eps, t)


def to_posterior_mean(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x0) from `value`, a quantity of the given kind at x_t."""
    return q_posterior(schedule, to_x0(schedule, value, x_t, t, kind), x_t, t).mean


def to_score(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """The score -eps / sqrt(1 - alpha_bar) from `value`, a quantity of the given kind at x_t."""
    _, s = _signal_and_noise(schedule, t, x_t)
    return -to_eps(schedule, value, x_t, t, kind) / s


def to_step_noise(schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: Quantity) -> Tensor:
    """Su's step noise sqrt(beta / (1 - alpha_bar)) eps (his eq. 1.15) from a quantity of the given kind."""
    _, s = _signal_and_noise(schedule, t, x_t)
    return at(schedule.step_noise, t, x_t) / s * to_eps(schedule, value, x_t, t, kind)


def merge_noises(schedule: NoiseSchedule, eps_before: Tensor, step_noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the noises of x_{t-1} and of the step to x_t into (eps, w), independent again (Su, eq. 1.11).

    eps is the accumulated noise of x_t; w is the rest, of which x_t says nothing. The rotation is its own
    inverse: given (eps, w) it returns (eps_before, step_noise).
    """
    _, s = _signal_and_noise(schedule, t, eps_before)
    from_before = at(schedule.noise_kept, t, eps_before) / s
    from_step = at(schedule.step_noise, t, eps_before) / s
    return (
        from_before * eps_before + from_step * step_noise,
        from_step * eps_before - from_before * step_noise,
    )


def split_output(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction half and the variance half of a network output (N, C or 2C, H, W) for C = `channels`.

    The second is None for C channels. Raises ValueError for any other number.
    """
    if model_output.shape[1] == channels:
        return model_output, None
    if model_output.shape[1] != 2 * channels:
        raise ValueError(
            f"a network on {channels} channels must give {channels} or {2 * channels}, got {model_output.shape[1]}"
        )
    mean_half, variance_half = model_output.chunk(2, dim=1)
    return mean_half, variance_half


def log_variance_of(
    schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: Tensor, variance: Variance
) -> Tensor:
    """log variance (N, C, H, W) of p(x_{t-1} | x_t): the network's own, or a fixed one.

    Raises ValueError for one of its own that the network has no channels for.
    """
    if variance == "beta_tilde" or variance == "beta":
        return at(fixed_log_variance(schedule, variance), t, x_t).expand_as(x_t)
    read: Callable[[NoiseSchedule, Tensor, Tensor], Tensor]
    if variance == "learned":
        read = learned_log_variance
    elif variance == "learned_range":
        read = learned_range_log_variance
    elif variance == "direct":
        read = direct_log_variance
    else:
        raise unknown(variance, "variance", Variance)
    if prediction.variance_half is None:
        channels = x_t.shape[1]
        raise ValueError(
            f"variance {variance!r} needs a network with variance channels: {2 * channels} output channels, not "
            f"{channels}; choose beta_tilde"
        )
    return read(schedule, prediction.variance_half, t)


def learned_log_variance(schedule: NoiseSchedule, variance_half: Tensor, t: Tensor) -> Tensor:
    """What a network says of these steps by a variance half that it may have learned on others.

    On its own steps that is `learned_range_log_variance`. On a longer one, as of a respaced process, the same fraction
    between beta tilde and beta is another variance: so the error of x0 that it means on its own (`LearnedSteps`) is
    taken to log(beta tilde + w^2 error) of this one, for w the weight of x0 in the posterior's mean (Bao et al. 2022,
    theorem 1). That error is at least 0 and at most sigma^2, as if the noise were read as x0, and the variance at least
    the clipped beta tilde of its own process; what is beyond has no gradient. At the first step of its own process the
    variance is the error and stays as it is.
    """
    if schedule.learned is None:
        return learned_range_log_variance(schedule, variance_half, t)
    own, fraction = schedule.learned, (promoted(variance_half) + 1) / 2
    span, scale, first, top, least = (
        at(table, t, fraction) for table in (own.span, own.scale, own.first, own.top, own.least)
    )
    error = scale * torch.expm1(torch.minimum(fraction.clamp(min=0), top) * span)
    weight_x0 = at(schedule.posterior_x0_weight, t, fraction)
    variance = at(schedule.posterior_variance, t, fraction) + weight_x0**2 * error
    return torch.where(first > 0, scale.log() + fraction * span, torch.maximum(variance, least).log())


def learned_range_log_variance(schedule: NoiseSchedule, learned_range: Tensor, t: Tensor) -> Tensor:
    """f log beta + (1 - f) log beta tilde for f = (r + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

    r is the network's variance half: -1 gives beta tilde (clipped at t = 0), 1 gives beta. It is not clamped:
    outside it extrapolates. On a respaced process these are its own steps, as in the authors' code.
    """
    fraction = (promoted(learned_range) + 1) / 2
    high = at(schedule.log_betas, t, learned_range)
    low = at(schedule.posterior_log_variance, t, learned_range)
    return fraction * high + (1 - fraction) * low


def direct_log_variance(schedule: NoiseSchedule, log_variance: Tensor, t: Tensor) -> Tensor:
    """What a network says whose output is the log variance of its own steps (Nichol & Dhariwal 2021, sec. 3.1).

    On others by the error of x0 that it means there, as `learned_log_variance`.
    """
    log_variance = promoted(log_variance)
    if schedule.learned is None:
        return log_variance
    low, span = (at(table, t, log_variance) for table in (schedule.learned.low, schedule.learned.span))
    return learned_log_variance(schedule, 2 * (log_variance - low) / span - 1, t)


def fixed_log_variance(schedule: NoiseSchedule, variance: FixedVariance) -> Tensor:
    """log variance (T,) float64 of p(x_{t-1} | x_t): beta_tilde clipped, or beta, its first entry that of beta_tilde.

    They are the "small" and "large" of Nichol & Dhariwal's code.
    """
    if variance == "beta_tilde":
        return schedule.posterior_log_variance
    if variance == "beta":
        return schedule.large_log_variance
    raise unknown(variance, "fixed variance", FixedVariance)


def predict(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, prediction_type: PredictionType
) -> Prediction:
    """Read a network's output (N, C or 2C, H, W) at x_t (N, C, H, W), whatever it was trained to predict.

    What it says of a step (`StepPrediction`) is of the one that it was trained on, which on a respaced process is
    shorter than that at hand. Raises ValueError for another number of channels, and for epsilon at zero SNR.
    """
    mean_half, variance_half = split_output(model_output, x_t.shape[1])
    x_t, kind = promoted(x_t), prediction_type
    if schedule.learned is not None and kind in get_args(StepPrediction):
        mean_half, kind = _stepless(schedule, mean_half, x_t, t, kind, schedule.learned)
    return Prediction(
        x0=to_x0(schedule, mean_half, x_t, t, kind),
        eps=to_eps(schedule, mean_half, x_t, t, kind),
        variance_half=variance_half,
    )


def _signal_and_noise(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return at(schedule.signal, t, like), at(schedule.noise, t, like)


def _stepless(
    schedule: NoiseSchedule,
    value: Tensor,
    x_t: Tensor,
    t: Tensor,
    kind: Quantity,
    steps: NoiseSchedule | LearnedSteps | None = None,
) -> tuple[Tensor, PredictionType]:
    """The same as eps, v or x0, which need no step but a level of noise alone, and which of them it is.

    steps: those that the value is of; None: the schedule's.
    """
    value, steps = promoted(value), steps or schedule
    match kind:
        case "epsilon" | "v_prediction" | "sample":
            return value, kind
        case "score":
            return -_signal_and_noise(schedule, t, x_t)[1] * value, "epsilon"
        case "step_noise":
            return value * _signal_and_noise(schedule, t, x_t)[1] / at(steps.step_noise, t, x_t), "epsilon"
        case "posterior_mean":
            weight_x0, weight_xt = _posterior_weights(steps, t, x_t)
            return (value - weight_xt * x_t) / weight_x0, "sample"
    raise unknown(kind, "kind", Quantity)


def _needs_step(kind: str) -> ValueError:
    return ValueError(f"{kind} has no meaning between two steps; only epsilon, v_prediction, sample and score do")


def _posterior_weights(steps: NoiseSchedule | LearnedSteps, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return at(steps.posterior_x0_weight, t, like), at(steps.posterior_x_t_weight, t, like)
