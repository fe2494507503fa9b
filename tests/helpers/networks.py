"""Networks whose answers are known exactly. Shared."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule

# (x_t (N, C, H, W), a timestep or N of them) -> output
Network = Callable[[Tensor, Tensor], Tensor]
SHAPE = (2, 4, 3, 3)
KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "su_linear": NoiseSchedule.su_linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
}
LINEAR = SCHEDULES["linear"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """torch's, in float64 by a generator of its own, and then in `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def level(native: NoiseSchedule, timestep: Tensor) -> tuple[float, float]:
    """a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) where a network trained on `native` sees this timestep.

    Between two timesteps log sigma goes straight from one to the next.
    """
    told = float(timestep)
    known = (native.timesteps == told).nonzero()
    if len(known):
        alpha_bar = native.alpha_bar[known[0, 0]].item()
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    sigma = math.exp(np.interp(told, native.timesteps.numpy(), native.log_sigmas.numpy()))
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def output(kind: PredictionType, x0: Tensor, eps: Tensor, a: float, s: float) -> Tensor:
    """What a network of this kind says when it means x0 and eps."""
    return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0, "score": -eps / s}[kind]


def gaussian_output(
    kind: PredictionType, x: Tensor, a: float, s: float, mean: Tensor | float, std: Tensor | float
) -> Tensor:
    """What the best network says of data N(mean, std^2) at x = a x0 + s eps."""
    share = (x - a * mean) / (a**2 * std**2 + s**2)
    return output(kind, mean + a * std**2 * share, s * share, a, s)


def left_variance(schedule: NoiseSchedule, std: Tensor) -> Tensor:
    """Var[x0 | x_t] (..., T) of data of deviation std (...)."""
    noise, var = 1 - schedule.alpha_bar, std[..., None] ** 2
    return var * noise / (schedule.alpha_bar * var + noise)


def best_variance(schedule: NoiseSchedule, std: Tensor) -> Tensor:
    """Var[x_{t-1} | x_t] (..., T): beta tilde + w^2 Var[x0 | x_t] for the weight w of x0 in the posterior's mean."""
    weight = schedule.alpha_bar_prev.sqrt() * schedule.betas / (1 - schedule.alpha_bar)
    return schedule.posterior_variance + weight**2 * left_variance(schedule, std)


def best_variance_half(native: NoiseSchedule, std: Tensor) -> Tensor:
    """The variance half (..., T) of a network trained on `native` that says its best variances.

    r = 2 log(best / low) / log(beta / low) - 1 for low = beta tilde, which is clipped at t = 0.
    """
    left, first = left_variance(native, std), native.posterior_log_variance[:1]
    weight = native.alpha_bar_prev.sqrt() * native.betas / (1 - native.alpha_bar)
    over = (weight**2 * left / native.posterior_variance)[..., 1:]  # best / low - 1, and beta / low - 1:
    most = ((native.alpha_bar_prev - native.alpha_bar) / (1 - native.alpha_bar_prev))[1:]
    at_first = (left[..., :1].log() - first) / (native.betas[:1].log() - first)
    return 2 * torch.cat([at_first, over.log1p() / most.log1p()], dim=-1) - 1


def oracle(native: NoiseSchedule, kind: PredictionType, x0: Tensor) -> Network:
    """A network that knows x0 and answers exactly, at the level that its timestep has in `native`; any variance."""

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        a, s = level(native, timestep)
        return torch.cat([output(kind, x0.expand_as(x), (x - a * x0) / s, a, s), torch.sin(x)], dim=1)

    return network


def gaussian(native: NoiseSchedule, mean: float, std: float, kind: PredictionType = "epsilon") -> Network:
    """The exact network of data N(mean, std^2), with any variance."""
    return lambda x, timestep: torch.cat(
        [gaussian_output(kind, x, *level(native, timestep), mean, std), torch.sin(x)], dim=1
    )


def bent(x: Tensor, timestep: Tensor) -> Tensor:
    """A network of no meaning that bends with x and the timestep."""
    return torch.cat([torch.tanh(x * (1 + 0.001 * timestep)) + 0.1, torch.sin(x)], dim=1)


def call(transformer: torch.nn.Module) -> Tensor:
    """What a tiny transformer gives for two fixed pictures and texts, in float32; a peft model's is its base's."""
    draw = torch.Generator().manual_seed(2)
    dtype = next(transformer.parameters()).dtype
    with torch.no_grad():
        output = transformer(
            hidden_states=torch.randn(2, 4, 8, 8, generator=draw).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=draw).to(dtype),
            encoder_attention_mask=torch.ones(2, 5),
            timestep=torch.tensor([10, 700]),
        )
    found: Tensor = output.sample
    return found.float()
