"""One sampling step each, from x_t to x_{t-1} of the given schedule. The noise is an argument.

To take fewer steps, respace the schedule (`NoiseSchedule.respaced`): t then indexes the kept steps. The mean
is made from `prediction.x0` alone, so a caller that clips x0 needs to change nothing else.
Symbols: `pixart_ft.diffusion`.
"""

from typing import Literal

import torch
from torch import Tensor

from pixart_ft.diffusion.process import Prediction, at, q_posterior, to_eps
from pixart_ft.diffusion.schedules import NoiseSchedule

Variance = Literal["beta_tilde", "beta", "learned", "none"]


def ddim_sigma(schedule: NoiseSchedule, eta: float) -> Tensor:
    """Standard deviation (T,) float64 of the noise that a DDIM step adds; 0 at t = 0.

    eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev), which is eta times
    the square root of beta tilde (Song et al. 2021, eq. 16). Raises ValueError for an eta that asks for more
    noise than x_{t-1} has.
    """
    sigma = eta * schedule.posterior_variance.sqrt()
    if eta < 0 or bool((sigma**2 > 1 - schedule.alpha_bar_prev).any()):
        raise ValueError(f"eta must be 0 (no noise) to 1 (as much as DDPM), got {eta:g}")
    return sigma


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Tensor,
    t: Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma noise.

    Song et al. 2021, eq. 12, with sigma from `ddim_sigma`; eps is what x_t holds beside x0. eta = 0 is
    deterministic, eta = 1 is DDPM with beta tilde. Raises ValueError when eta > 0 comes without noise.
    """
    sigma = ddim_sigma(schedule, eta)
    eps = to_eps(schedule, prediction.x0, x_t, t, "sample")
    direction = (1 - schedule.alpha_bar_prev - sigma**2).sqrt()
    mean = at(schedule.alpha_bar_prev.sqrt(), t, x_t) * prediction.x0 + at(direction, t, x_t) * eps
    if eta == 0:
        return mean
    return mean + at(sigma, t, x_t) * _required(noise, f"eta {eta:g}")


def ddim_encode_step(schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
    """The DDIM step backwards, from x_t to x_{t+1} (Song et al. 2021, sec. 4.3); from T-1 to pure noise.

    It undoes `ddim_step` with eta = 0, to first order in the size of the step.
    """
    alpha_bar_next = torch.cat([schedule.alpha_bar[1:], torch.zeros(1, dtype=torch.float64)])
    eps = to_eps(schedule, prediction.x0, x_t, t, "sample")
    return at(alpha_bar_next.sqrt(), t, x_t) * prediction.x0 + at((1 - alpha_bar_next).sqrt(), t, x_t) * eps


def ddpm_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Tensor,
    t: Tensor,
    *,
    variance: Variance = "beta_tilde",
    noise: Tensor | None = None,
) -> Tensor:
    """The posterior's mean plus noise of the chosen variance (Ho et al. 2020, Alg. 2); no noise at t = 0.

    variance: beta_tilde (the posterior's), beta (the forward step's), learned (the network's own: iDDPM,
    Nichol & Dhariwal 2021) or none (the mean alone: Su's greedy form). Raises ValueError when the noise or
    the learned variance is missing.
    """
    mean = q_posterior(schedule, prediction.x0, x_t, t).mean
    if variance == "none":
        return mean
    if variance == "learned":
        if prediction.log_variance is None:
            raise ValueError("variance 'learned' needs a network with variance channels; choose beta_tilde")
        log_variance = prediction.log_variance
    elif variance == "beta_tilde":
        log_variance = at(schedule.posterior_log_variance, t, x_t)
    elif variance == "beta":
        log_variance = at(schedule.betas.log(), t, x_t)
    else:
        raise ValueError(f"unknown variance {variance!r}; choose beta_tilde, beta, learned or none")
    is_last = (t == 0).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
    std = torch.exp(0.5 * log_variance).masked_fill(is_last, 0)
    return mean + std * _required(noise, f"variance {variance!r}")


def _required(noise: Tensor | None, reason: str) -> Tensor:
    if noise is None:
        raise ValueError(f"{reason} adds noise at every step: pass noise of x_t's shape")
    return noise
