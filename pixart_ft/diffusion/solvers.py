"""One sampling step each of the six systems. The noise is an argument. Symbols: `pixart_ft.diffusion`.

On indices (DDPM, DDIM): from x_t to x_{t-1} of the given schedule. To take fewer steps, respace the schedule
(`NoiseSchedule.respaced`): t then indexes the kept steps. The mean is made from `prediction.x0` alone, so a caller
that clips x0 needs to change nothing else.

On noise levels (Euler, EDM): y = x0 + sigma eps = x_t / sqrt(alpha_bar), sigma a number, down to 0 at the end.

On the SDE: dx = -beta/2 x dt + sqrt(beta) dw, and `beta` of a step is a number: the integral of beta over it for
Euler-Maruyama and the ODE, 1 - alpha_bar / alpha_bar_prev for the others (Song et al. 2021b).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from pixart_ft.diffusion.names import CorrectorNorms, Predictor, StepVariance, unknown
from pixart_ft.diffusion.process import Prediction, at, log_variance_of, q_posterior, to_eps
from pixart_ft.diffusion.schedules import NoiseSchedule


def ddim_sigma(schedule: NoiseSchedule, eta: float) -> Tensor:
    """Standard deviation (T,) float64 of the noise that a DDIM step adds; 0 at t = 0.

    eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev), which is eta times
    the square root of beta tilde (Song et al. 2021a, eq. 16). Raises ValueError for an eta that asks for more
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

    Song et al. 2021a, eq. 12, with sigma from `ddim_sigma`; eps is what x_t holds beside x0. eta = 0 is
    deterministic, eta = 1 is DDPM with beta tilde. Raises ValueError when eta > 0 comes without noise.
    """
    direction, sigma = _ddim_weights(schedule, eta)
    eps = to_eps(schedule, prediction.x0, x_t, t, "sample")
    mean = at(schedule.signal_before, t, x_t) * prediction.x0 + at(direction, t, x_t) * eps
    if eta == 0:
        return mean
    return mean + at(sigma, t, x_t) * _required(noise, f"eta {eta:g}")


@lru_cache(maxsize=8)
def _ddim_weights(schedule: NoiseSchedule, eta: float) -> tuple[Tensor, Tensor]:
    """What multiplies eps and the fresh noise, each (T,)."""
    sigma = ddim_sigma(schedule, eta)
    return (1 - schedule.alpha_bar_prev - sigma**2).sqrt(), sigma


def ddim_encode_step(schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
    """The DDIM step backwards, from x_t to x_{t+1} (Song et al. 2021a, sec. 4.3); from T-1 to pure noise.

    It undoes `ddim_step` with eta = 0, to first order in the size of the step.
    """
    signal, noise = _one_step_noisier(schedule)
    eps = to_eps(schedule, prediction.x0, x_t, t, "sample")
    return at(signal, t, x_t) * prediction.x0 + at(noise, t, x_t) * eps


@lru_cache(maxsize=8)
def _one_step_noisier(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    alpha_bar_next = torch.cat([schedule.alpha_bar[1:], torch.zeros(1, dtype=torch.float64)])
    return alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt()


def ddpm_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Tensor,
    t: Tensor,
    *,
    variance: StepVariance = "beta_tilde",
    noise: Tensor | None = None,
) -> Tensor:
    """The posterior's mean plus noise of the chosen variance (Ho et al. 2020, Alg. 2); no noise at t = 0.

    variance: beta_tilde (the posterior's), beta (the forward step's), learned or learned_range (the network's own, see
    `process.learned_log_variance`: iDDPM, Nichol & Dhariwal 2021) or none (the mean alone: Su's greedy form). Raises
    ValueError when the noise or the learned variance is missing.
    """
    mean = q_posterior(schedule, prediction.x0, x_t, t).mean
    if variance == "none":
        return mean
    log_variance = log_variance_of(schedule, prediction, x_t, t, variance)
    is_last = (t == 0).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
    std = torch.exp(0.5 * log_variance).masked_fill(is_last, 0)
    return mean + std * _required(noise, f"variance {variance!r}")


def euler_step(y: Tensor, x0: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """y + (next_sigma - sigma) (y - x0) / sigma: one step of dy/dsigma = eps (Karras et al. 2022, eq. 3).

    It is `ddim_step` with eta = 0 in these variables. To next_sigma = 0 it gives x0 itself.
    """
    return x0 if next_sigma == 0 else y + (next_sigma - sigma) * slope(y, x0, sigma)


def slope(y: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """dy/dsigma = (y - x0) / sigma, which is the predicted eps (Karras et al. 2022, Alg. 1, line 3)."""
    return (y - x0) / sigma


def heun_step(y: Tensor, first: Tensor, second: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """y moved by the mean of the slopes at both ends of the step (Karras et al. 2022, Alg. 1, lines 6 to 8).

    first: the slope at (y, sigma); second: at (where Euler's step arrived, next_sigma), which must not be 0.
    """
    return y + (next_sigma - sigma) * 0.5 * (first + second)


def churned_sigma(sigma: float, steps: int, s_churn: float, s_min: float, s_max: float) -> float:
    """sigma_hat, the level that churn raises sigma to: (1 + gamma) sigma (Karras et al. 2022, Alg. 2, lines 4 and 5).

    gamma = min(s_churn / steps, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0.
    """
    return sigma * (1 + min(s_churn / steps, math.sqrt(2) - 1)) if s_min <= sigma <= s_max else sigma


def churn(y: Tensor, sigma: float, sigma_hat: float, s_noise: float, noise: Tensor) -> Tensor:
    """y at sigma_hat: y + sqrt(sigma_hat^2 - sigma^2) s_noise noise (Karras et al. 2022, Alg. 2, line 6)."""
    return y + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * noise


def ancestral_split(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): where the Euler step goes, and the noise that is then added, back up to next_sigma.

    sigma_up = min(next_sigma, eta next_sigma sqrt(1 - next_sigma^2 / sigma^2)), which is `ddim_sigma` in these
    variables; sigma_down^2 = next_sigma^2 - sigma_up^2.
    """
    sigma_up = min(next_sigma, eta * next_sigma * math.sqrt(max(0.0, 1 - (next_sigma / sigma) ** 2)))
    return math.sqrt(next_sigma**2 - sigma_up**2), sigma_up


def euler_ancestral_step(
    y: Tensor, x0: Tensor, sigma: float, next_sigma: float, *, eta: float = 1.0, noise: Tensor | None = None
) -> Tensor:
    """An Euler step below next_sigma, and noise back up to it. With eta = 1 it is DDPM with beta tilde.

    Raises ValueError when noise is to be added and there is none.
    """
    sigma_down, sigma_up = ancestral_split(sigma, next_sigma, eta)
    y = euler_step(y, x0, sigma, sigma_down)
    return y + sigma_up * _required(noise, f"eta {eta:g}") if sigma_up > 0 else y


def sde_step(predictor: Predictor, x: Tensor, score: Tensor, beta: float, noise: Tensor | None = None) -> Tensor:
    """One step of the reverse SDE; without noise its mean, which is what the last step returns.

    euler_maruyama     x + beta (x/2 + score) + sqrt(beta) noise
    reverse_diffusion  (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) noise (Song et al. 2021b, eq. 46)
    ancestral          (x + beta score) / sqrt(1 - beta) + sqrt(beta) noise (their eq. 4)
    """
    if predictor == "euler_maruyama":
        mean = x + beta * (0.5 * x + score)
    elif predictor == "reverse_diffusion":
        mean = (2 - math.sqrt(1 - beta)) * x + beta * score
    elif predictor == "ancestral":
        mean = (x + beta * score) / math.sqrt(1 - beta)
    else:
        raise unknown(predictor, "predictor", Predictor)
    return mean if noise is None else mean + math.sqrt(beta) * noise


def pf_ode_step(x: Tensor, score: Tensor, beta: float) -> Tensor:
    """x + beta/2 (x + score): Euler's step of the probability-flow ODE (Song et al. 2021b, eq. 13)."""
    return x + 0.5 * beta * (x + score)


def langevin_step(x: Tensor, score: Tensor, step_size: Tensor | float, noise: Tensor) -> Tensor:
    """x + step_size score + sqrt(2 step_size) noise (Song et al. 2021b, Algs. 4 and 5, where it is epsilon; in Song &
    Ermon 2019 alpha / 2).
    """
    root = (2 * step_size).sqrt() if isinstance(step_size, Tensor) else math.sqrt(2 * step_size)
    return x + step_size * score + root * noise


def langevin_step_size(
    score: Tensor, noise: Tensor, alpha: float, snr: float, norms: CorrectorNorms = "per_sample"
) -> Tensor:
    """2 alpha (snr |noise| / |score|)^2 (Song et al. 2021b, Alg. 5), shaped to multiply the score; 0 where that is 0.

    norms: of each sample, so that no batch-mate changes a picture; or their means over the batch, as in the authors'
    code.
    """
    lengths = [x.flatten(1).norm(dim=1) for x in (noise, score)]
    if norms == "batch_mean":
        lengths = [x.mean().expand(len(score)) for x in lengths]
    elif norms != "per_sample":
        raise unknown(norms, "norms", CorrectorNorms)
    ratio = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
    return (2 * alpha * (snr * ratio) ** 2).view(-1, *[1] * (score.ndim - 1))


def _required(noise: Tensor | None, reason: str) -> Tensor:
    if noise is None:
        raise ValueError(f"{reason} adds noise at every step: pass noise of x_t's shape")
    return noise
