"""Training losses: named terms per sample, each (N,), means over C, H, W. Symbols: `pixart_ft.diffusion`."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from pixart_ft.diffusion.process import PredictionType, predict, promoted, q_posterior, split_output, velocity
from pixart_ft.diffusion.schedules import NoiseSchedule

Decoder = Literal["gaussian", "discretized", "discretized_tanh"]


def simple_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
) -> dict[str, Tensor]:
    """Squared error in the space that the network predicts (Ho et al. 2020, eq. 14, for epsilon).

    model_output is (N, C or 2C, H, W); variance channels get no gradient.
    Returns "simple", and the same as "loss".
    """
    mean_half, _ = split_output(model_output, x_t.shape[1])
    if prediction_type == "epsilon":
        target = promoted(eps)
    elif prediction_type == "sample":
        target = promoted(x0)
    elif prediction_type == "v_prediction":
        target = velocity(schedule, x0, eps, t)
    else:
        raise ValueError(f"unknown prediction type {prediction_type!r}; choose {', '.join(get_args(PredictionType))}")
    simple = _mean_over_sample((promoted(mean_half) - target) ** 2)
    return {"simple": simple, "loss": simple}


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
) -> dict[str, Tensor]:
    """simple + vlb_scale * vlb: trains prediction and variance together (Nichol & Dhariwal 2021, eq. 16).

    vlb_scale is the paper's lambda = 0.001 times T, since one term stands for the sum over T of them: 1 at
    T = 1000, which PixArt-Sigma was trained with. model_output is (N, 2C, H, W); the prediction half is
    detached inside "vlb", so that term moves the variance alone. Returns "simple", "vlb" (bits per dimension)
    and "loss". Raises ValueError for a network without variance channels.
    """
    channels = x_t.shape[1]
    detached = torch.cat([model_output[:, :channels].detach(), model_output[:, channels:]], dim=1)
    simple = simple_loss(schedule, model_output, x0, x_t, eps, t, prediction_type)["simple"]
    vlb = vlb_term(schedule, detached, x0, x_t, t, prediction_type, decoder=decoder)
    return {"simple": simple, "vlb": vlb, "loss": simple + vlb_scale * vlb}


def vlb_term(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    decoder: Decoder = "gaussian",
) -> Tensor:
    """One term (N,) of the variational bound, in bits per dimension (Ho et al. 2020, eq. 5).

    For t > 0 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); at t = 0 the decoder's -log p(x0 | x_1). The
    Gaussian decoder fits latents; the discretized ones (8-bit data in [-1, 1]) are for comparison with
    pixel-space code. Raises ValueError for a network without variance channels.
    """
    prediction = predict(schedule, model_output, x_t, t, prediction_type)
    if prediction.log_variance is None:
        channels = x_t.shape[1]
        raise ValueError(f"the bound needs a learned variance: {2 * channels} output channels, not {channels}")
    x0, x_t, log_variance = promoted(x0), promoted(x_t), prediction.log_variance
    q = q_posterior(schedule, x0, x_t, t)
    mean = q_posterior(schedule, prediction.x0, x_t, t).mean
    # Both branches are finite for every t, so the unused one cannot spoil the gradient.
    kl = _gaussian_kl(q.mean, q.log_variance, mean, log_variance)
    if decoder == "gaussian":
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * torch.exp(-log_variance))
    elif decoder in ("discretized", "discretized_tanh"):
        nll = _discretized_nll(x0, mean, log_variance, tanh_cdf=decoder == "discretized_tanh")
    else:
        raise ValueError(f"unknown decoder {decoder!r}; choose gaussian, discretized or discretized_tanh")
    nats = torch.where(t == 0, _mean_over_sample(nll), _mean_over_sample(kl))
    return nats / math.log(2)


def _gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p))


def _discretized_nll(x: Tensor, mean: Tensor, log_variance: Tensor, *, tanh_cdf: bool) -> Tensor:
    """-log of the probability, at least 1e-12, of x's bin of half width 1/255 (Ho et al. 2020, eq. 13)."""
    cdf = _tanh_cdf if tanh_cdf else _normal_cdf
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
