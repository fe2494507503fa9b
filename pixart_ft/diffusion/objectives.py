"""Training losses: named terms per sample, each (N,), means over C, H, W. Symbols: `pixart_ft.diffusion`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_ft.diffusion.names import Decoder, LossSpace, Norm, PredictionType, SuForm, Variance, check, unknown
from pixart_ft.diffusion.process import (
    Prediction,
    at,
    fixed_log_variance,
    merge_noises,
    predict,
    promoted,
    q_posterior,
    split_output,
    to_eps,
    to_posterior_mean,
    to_step_noise,
    to_v,
    to_x0,
    velocity,
)
from pixart_ft.diffusion.schedules import NoiseSchedule


def simple_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    space: LossSpace | None = None,
    norm: Norm = "squared",
    huber_delta: float = 1.0,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The error of the prediction (Ho et al. 2020, eq. 14, for epsilon); variance channels get no gradient.

    model_output is (N, C or 2C, H, W). The error is taken in `space`, by default the one the network predicts in;
    in another one its output is converted first. norm: squared, or Huber's, equal to the square up to huber_delta
    and 2 huber_delta |error| - huber_delta^2 beyond. weight (N,) multiplies the error in its space.
    Returns "simple", unweighted, and "loss". Raises ValueError where x0 is asked of epsilon at zero SNR.
    """
    check(prediction_type, "prediction type", PredictionType)
    mean_half, _ = split_output(model_output, x_t.shape[1])
    space = prediction_type if space is None else space
    error = _in_space(schedule, mean_half, x_t, t, prediction_type, space) - _target(schedule, x0, x_t, eps, t, space)
    simple = _mean_over_sample(_penalty(error, norm, huber_delta))
    return {"simple": simple, "loss": _weighted(simple, weight)}


def hybrid_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    vlb_scale: float = 1.0,
    decoder: Decoder = "gaussian",
    space: LossSpace | None = None,
    norm: Norm = "squared",
    huber_delta: float = 1.0,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """simple + vlb_scale * vlb: trains prediction and variance together (Nichol & Dhariwal 2021, eq. 16).

    vlb_scale is the paper's lambda = 0.001 times T, since one term stands for the sum over T of them: 1 at
    T = 1000, which PixArt-Sigma was trained with. model_output is (N, 2C, H, W); the prediction half is
    detached inside "vlb", so that term moves the variance alone. The last four settings are those of
    `simple_loss` and act on that term alone. Returns "simple", "vlb" (bits per dimension) and "loss".
    Raises ValueError for a network without variance channels.
    """
    terms = simple_loss(
        schedule, model_output, x0, x_t, eps, t, prediction_type,
        space=space, norm=norm, huber_delta=huber_delta, weight=weight,
    )  # fmt: skip
    vlb = vlb_term(schedule, _mean_detached(model_output, x_t), x0, x_t, t, prediction_type, decoder=decoder)
    return {"simple": terms["simple"], "vlb": vlb, "loss": terms["loss"] + vlb_scale * vlb}


def vlb_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    variance: Variance = "learned",
    vlb_scale: float = 1.0,
    decoder: Decoder = "gaussian",
) -> dict[str, Tensor]:
    """vlb_scale * vlb, which moves mean and variance (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, L_vlb).

    For t uniform, T times the mean of "vlb" is the bound without its prior term, in bits per dimension.
    Returns "vlb", "loss", and "simple", which takes no part. Raises ValueError when `variance` is learned and
    the network has no variance channels.
    """
    vlb = vlb_term(schedule, model_output, x0, x_t, t, prediction_type, decoder=decoder, variance=variance)
    simple = simple_loss(schedule, model_output.detach(), x0, x_t, eps, t, prediction_type)["simple"]
    return {"simple": simple, "vlb": vlb, "loss": vlb_scale * vlb}


def su_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    eps: Tensor,
    rest: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    form: SuForm,
) -> dict[str, Tensor]:
    """The three forms in which Su derives the loss; e is the noise of one step, e_hat the network's.

    su_raw      ||mu(x_t) - x_{t-1}||^2 (eqs. 1.6 and 1.8)
    su_noises   ||e - e_hat||^2, with both noises drawn (eq. 1.10)
    su_reduced  ||eps - sqrt((1 - alpha_bar) / beta) e_hat||^2, rid of the variance of `rest` (eq. 1.14)

    eps (N, C, H, W) is the accumulated noise in x_t and `rest`, his w, an independent one: together they make the
    noises of x_{t-1} and of the step (eq. 1.11). In expectation the forms are proportional up to a constant:
    `su_factors`. Returns "simple" and the same as "loss".
    """
    mean_half, _ = split_output(model_output, x_t.shape[1])
    eps_before, step_noise = merge_noises(schedule, promoted(eps), promoted(rest), t)  # it is its own inverse
    if form == "su_raw":
        a, s = at(schedule.alpha_bar_prev.sqrt(), t, x0), at((1 - schedule.alpha_bar_prev).sqrt(), t, x0)
        error = to_posterior_mean(schedule, mean_half, x_t, t, prediction_type) - (a * x0 + s * eps_before)
    elif form == "su_noises":
        error = to_step_noise(schedule, mean_half, x_t, t, prediction_type) - step_noise
    elif form == "su_reduced":
        error = to_eps(schedule, mean_half, x_t, t, prediction_type) - promoted(eps)
    else:
        raise unknown(form, "form", SuForm)
    simple = _mean_over_sample(error**2)
    return {"simple": simple, "loss": simple}


def su_factors(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """What `su_loss` leaves out between its forms, each (T,) float64.

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
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    decoder: Decoder = "gaussian",
    variance: Variance = "learned",
) -> Tensor:
    """One term (N,) of the variational bound, in bits per dimension (Ho et al. 2020, eq. 5).

    For t > 0 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); at t = 0 the decoder's -log p(x0 | x_1). The
    Gaussian decoder fits latents; the discretized ones (8-bit data in [-1, 1]) are for comparison with
    pixel-space code. variance is that of p: the network's own or a fixed one (`process.fixed_log_variance`).
    Raises ValueError when it is learned and the network has no variance channels.
    """
    prediction = predict(schedule, model_output, x_t, t, prediction_type)
    x0, x_t = promoted(x0), promoted(x_t)
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
    nats = torch.where(t == 0, _mean_over_sample(nll), _mean_over_sample(kl))
    return nats / math.log(2)


def log_variance_of(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: Tensor,
    t: Tensor,
    variance: Variance,
) -> Tensor:
    """log variance (N, C, H, W) of p(x_{t-1} | x_t): the network's own, or a fixed one.

    Raises ValueError when it is learned and the network has no variance channels.
    """
    if variance != "learned":
        return at(fixed_log_variance(schedule, variance), t, x_t).expand_as(x_t)
    if prediction.log_variance is None:
        channels = x_t.shape[1]
        raise ValueError(f"the bound needs a learned variance: {2 * channels} output channels, not {channels}")
    return prediction.log_variance


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
    raise unknown(space, "loss space", LossSpace)


def _target(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, space: LossSpace) -> Tensor:
    if space == "epsilon":
        return promoted(eps)
    if space == "sample":
        return promoted(x0)
    if space == "v_prediction":
        return velocity(schedule, promoted(x0), promoted(eps), t)
    if space == "posterior_mean":
        return q_posterior(schedule, promoted(x0), promoted(x_t), t).mean
    raise unknown(space, "loss space", LossSpace)


def _penalty(error: Tensor, norm: Norm, delta: float) -> Tensor:
    if norm == "squared":
        return error**2
    if norm == "huber":
        return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    raise unknown(norm, "norm", Norm)


def _weighted(simple: Tensor, weight: Tensor | None) -> Tensor:
    return simple if weight is None else weight.to(simple) * simple


def _mean_detached(model_output: Tensor, x_t: Tensor) -> Tensor:
    channels = x_t.shape[1]
    return torch.cat([model_output[:, :channels].detach(), model_output[:, channels:]], dim=1)


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


def _mean_over_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)
