"""Terms of the training losses, per sample (N,): means over C, H, W, weighted by an area. Symbols:
`pixart_ft.diffusion`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_ft.diffusion.names import Decoder, LossSpace, Norm, PredictionType, SuForm, Variance, check, unknown
from pixart_ft.diffusion.process import (
    Noised,
    at,
    log_variance_of,
    merge_noises,
    predict,
    promoted,
    q_posterior,
    split_output,
    to_eps,
    to_posterior_mean,
    to_score,
    to_step_noise,
    to_v,
    to_x0,
    velocity,
)
from pixart_ft.diffusion.schedules import NoiseSchedule


def simple_term(
    schedule: NoiseSchedule,
    model_output: Tensor,
    noised: Noised,
    prediction_type: PredictionType,
    *,
    space: LossSpace | None = None,
    norm: Norm = "squared",
    huber_delta: float = 1.0,
) -> Tensor:
    """The error of the prediction (Ho et al. 2020, eq. 14, for epsilon); variance channels get no gradient.

    model_output is (N, C or 2C, H, W) at x_t. The error is taken in `space`, by default the one the network predicts
    in; in another one its output is converted first. norm: squared, or Huber's, equal to the square up to huber_delta
    and 2 huber_delta |error| - huber_delta^2 beyond. Raises ValueError where x0 is asked of epsilon at zero SNR.
    """
    check(prediction_type, "prediction type", PredictionType)
    mean_half, _ = split_output(model_output, noised.x_t.shape[1])
    space = prediction_type if space is None else space
    predicted = _in_space(schedule, mean_half, noised.x_t, noised.t, prediction_type, space)
    return _mean_over_sample(_penalty(predicted - _target(schedule, noised, space), norm, huber_delta), noised.area)


def su_term(
    schedule: NoiseSchedule,
    model_output: Tensor,
    noised: Noised,
    rest: Tensor,
    prediction_type: PredictionType,
    form: SuForm,
) -> Tensor:
    """The three forms in which Su derives the loss; e is the noise of one step, e_hat the network's.

    su_raw      ||mu(x_t) - x_{t-1}||^2 (eqs. 1.6 and 1.8)
    su_noises   ||e - e_hat||^2, with both noises sampled (eq. 1.10)
    su_reduced  ||eps - sqrt((1 - alpha_bar) / beta) e_hat||^2, rid of the variance of `rest` (eq. 1.14)

    `rest` (N, C, H, W), his w, is independent of eps, the accumulated noise in x_t: together they make the noises of
    x_{t-1} and of the step (eq. 1.11). In expectation the forms are proportional up to a constant: `su_factors`.
    """
    x0, eps, t, x_t = noised.x0, noised.eps, noised.t, noised.x_t
    mean_half, _ = split_output(model_output, x_t.shape[1])
    eps_before, step_noise = merge_noises(schedule, promoted(eps), promoted(rest), t)  # it is its own inverse
    if form == "su_raw":
        a, s = at(schedule.signal_before, t, x0), at(schedule.noise_before, t, x0)
        error = to_posterior_mean(schedule, mean_half, x_t, t, prediction_type) - (a * x0 + s * eps_before)
    elif form == "su_noises":
        error = to_step_noise(schedule, mean_half, x_t, t, prediction_type) - step_noise
    elif form == "su_reduced":
        error = to_eps(schedule, mean_half, x_t, t, prediction_type) - promoted(eps)
    else:
        raise unknown(form, "form", SuForm)
    return _mean_over_sample(error**2, noised.area)


def su_factors(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """What `su_term` leaves out between its forms, each (T,) float64.

    E[su_raw] = raw_per_noises E[su_noises] and E[su_noises] = noises_per_reduced E[su_reduced] + constant, where
    raw_per_noises = beta / alpha, noises_per_reduced = beta / (1 - alpha_bar) and
    constant = alpha (1 - alpha_bar_prev) / (1 - alpha_bar) (his eqs. 1.8 and 1.13).
    """
    return {
        "raw_per_noises": schedule.betas / schedule.alphas,
        "noises_per_reduced": schedule.betas / (1 - schedule.alpha_bar),
        "constant": schedule.alphas * (1 - schedule.alpha_bar_prev) / (1 - schedule.alpha_bar),
    }


def vlb_term(
    schedule: NoiseSchedule,
    model_output: Tensor,
    noised: Noised,
    prediction_type: PredictionType,
    *,
    decoder: Decoder = "gaussian",
    variance: Variance = "learned",
) -> Tensor:
    """One term of the variational bound, in bits per dimension (Ho et al. 2020, eq. 5).

    For t > 0 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); at t = 0 the decoder's -log p(x0 | x_1). The
    Gaussian decoder fits latents; the discretized ones (8-bit data in [-1, 1]) are for comparison with
    pixel-space code. variance is that of p: the network's own or a fixed one (`process.log_variance_of`).
    For t uniform, T times its mean is the bound without its prior term. Raises ValueError when the variance
    is learned and the network has no variance channels.
    """
    t, x_t = noised.t, noised.x_t
    prediction = predict(schedule, model_output, x_t, t, prediction_type)
    x0, x_t = promoted(noised.x0), promoted(x_t)
    log_variance = log_variance_of(schedule, prediction, x_t, t, variance)
    q = q_posterior(schedule, x0, x_t, t)
    mean = q_posterior(schedule, prediction.x0, x_t, t).mean
    # Both branches are finite for every t, so the unused one cannot spoil the gradient.
    kl = _gaussian_kl(q.mean, q.log_variance, mean, log_variance)
    if decoder == "gaussian":
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * torch.exp(-log_variance))
    elif decoder == "discretized":
        nll = _discretized_nll(x0, mean, log_variance, _normal_cdf)
    elif decoder == "discretized_tanh":
        nll = _discretized_nll(x0, mean, log_variance, _tanh_cdf)
    else:
        raise unknown(decoder, "decoder", Decoder)
    nats = torch.where(t == 0, _mean_over_sample(nll, noised.area), _mean_over_sample(kl, noised.area))
    return nats / math.log(2)


def variance_alone(model_output: Tensor) -> Tensor:
    """An output (N, 2C, H, W) whose prediction half is detached: a loss of it moves the variance alone."""
    mean_half, variance_half = model_output.chunk(2, dim=1)
    return torch.cat([mean_half.detach(), variance_half], dim=1)


def _in_space(
    schedule: NoiseSchedule, value: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType, space: LossSpace
) -> Tensor:
    """The network's prediction as a quantity of another kind."""
    if kind == space:
        return promoted(value)
    if space == "epsilon":
        return to_eps(schedule, value, x_t, t, kind)
    if space == "sample":
        return to_x0(schedule, value, x_t, t, kind)
    if space == "v_prediction":
        return to_v(schedule, value, x_t, t, kind)
    if space == "posterior_mean":
        return to_posterior_mean(schedule, value, x_t, t, kind)
    if space == "score":
        return to_score(schedule, value, x_t, t, kind)
    if space == "step_noise":
        return to_step_noise(schedule, value, x_t, t, kind)
    raise unknown(space, "loss space", LossSpace)


def _target(schedule: NoiseSchedule, noised: Noised, space: LossSpace) -> Tensor:
    x0, eps = promoted(noised.x0), promoted(noised.eps)
    if space == "epsilon":
        return eps
    if space == "sample":
        return x0
    if space == "v_prediction":
        return velocity(schedule, x0, eps, noised.t)
    if space == "posterior_mean":
        return q_posterior(schedule, x0, promoted(noised.x_t), noised.t).mean
    if space == "score" or space == "step_noise":
        return _in_space(schedule, eps, noised.x_t, noised.t, "epsilon", space)
    raise unknown(space, "loss space", LossSpace)


def _penalty(error: Tensor, norm: Norm, delta: float) -> Tensor:
    if norm == "squared":
        return error**2
    if norm == "huber":
        return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    raise unknown(norm, "norm", Norm)


def _gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p))


def _discretized_nll(x: Tensor, mean: Tensor, log_variance: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """-log of the probability, at least 1e-12, of x's bin of half width 1/255 (Ho et al. 2020, eq. 13)."""
    inverse_std = torch.exp(-0.5 * log_variance)
    low, high = (x - mean - 1 / 255) * inverse_std, (x - mean + 1 / 255) * inverse_std
    # In the upper tail both CDFs are near 1 and cancel; mirrored to the lower tail they keep their digits.
    mirrored = x > mean
    inside = torch.where(mirrored, cdf(-low) - cdf(-high), cdf(high) - cdf(low))
    probability = torch.where(x < -0.999, cdf(high), torch.where(x > 0.999, cdf(-low), inside))
    return -torch.log(probability.clamp(min=1e-12))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z * math.sqrt(0.5))


def _tanh_cdf(z: Tensor) -> Tensor:
    """The approximation that the published code uses in place of the normal CDF; off by up to 1.8e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _mean_over_sample(x: Tensor, area: Tensor | None) -> Tensor:
    if area is None:
        return x.flatten(1).mean(dim=1)
    whole = area.flatten(1).sum(dim=1).clamp(min=torch.finfo(area.dtype).tiny)  # of a crop that shows nothing of it
    return (x * area).flatten(1).sum(dim=1) / whole
