"""How well a network models data: the variational bound, the probability-flow likelihood, variance calibration.

Bits per dimension of whatever x0 is, here latents: not comparable with those of 8-bit pixels. Symbols:
`pixart_ft.diffusion`; d is the number of dimensions C * H * W of one sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from pixart_ft.diffusion.flow import Network, drift, eps_of, integrate
from pixart_ft.diffusion.names import Decoder, PredictionType, Variance
from pixart_ft.diffusion.process import Noised, network_timesteps, promoted
from pixart_ft.diffusion.readings import Readings
from pixart_ft.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Bound:
    """The variational bound of N samples and what it is made of; T columns, from t = 0 (the least noise) up.

    terms               (N, T) bits per dimension: the decoder at t = 0, divergences after it
    prior               (N,) bits per dimension: what q(x_T | x0) and N(0, I) differ by
    x0_mse, eps_mse     (N, T) mean squared errors of the prediction
    predicted_variance  (N, T) mean of p's variance
    empirical_variance  (N, T) expected squared distance of x_{t-1} from p's mean, given x_t and x0; at t = 0 that of
                        x0. A calibrated variance equals it on average
    noise_error         (N,) standard error of `total` over the noises that it is the mean of; NaN of one alone
    """

    terms: Tensor
    prior: Tensor
    x0_mse: Tensor
    eps_mse: Tensor
    predicted_variance: Tensor
    empirical_variance: Tensor
    noise_error: Tensor

    @property
    def total(self) -> Tensor:
        """The bound (N,) on -log2 p(x0) / d: the terms and the prior."""
        return self.terms.sum(dim=1) + self.prior

    @classmethod
    def averaged(cls, bounds: Sequence[Self]) -> Self:
        """The Monte-Carlo mean of bounds of the same samples, each by noises of its own."""
        if len(bounds) == 1:
            return bounds[0]
        mean = cls(*(torch.stack([getattr(bound, f.name) for bound in bounds]).mean(dim=0) for f in fields(cls)))
        totals = torch.stack([bound.total for bound in bounds])
        return replace(mean, noise_error=totals.std(dim=0, correction=1) / len(bounds) ** 0.5)


@torch.no_grad()
def variational_bound(
    schedule: NoiseSchedule,
    network: Network,
    x0: Tensor,
    prediction_type: PredictionType,
    *,
    noise: Callable[[int], Tensor],
    variance: Variance = "learned",
    decoder: Decoder = "gaussian",
) -> Bound:
    """-log2 p(x0) / d is at most `total` (Ho et al. 2020, eq. 5), one sample of x_t for each t; T network calls.

    noise(t) is eps (N, C, H, W) for index t; `Bound.averaged` makes one of several. With a respaced schedule it is the
    bound of that shorter process. Raises ValueError when `variance` is learned and the network has no variance
    channels.
    """
    found = []
    for index in range(schedule.num_steps):
        t = torch.full((len(x0),), index, device=x0.device)
        noised = Noised.of(schedule, x0, t, noise(index))
        output = network(noised.x_t, network_timesteps(schedule, t))
        found.append(Readings.of(schedule, output, noised, prediction_type, variance, decoder))
    terms, x0_mse, eps_mse, predicted, empirical, _ = (
        torch.stack([getattr(one, field.name) for one in found], dim=1) for field in fields(Readings)
    )
    alone = torch.full_like(terms[:, 0], math.nan)
    return Bound(terms, prior_bits(schedule, x0), x0_mse, eps_mse, predicted, empirical, alone)


def prior_bits(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, I)) (N,) in bits per dimension; 0 at zero terminal SNR."""
    signal = schedule.alpha_bar[-1].item()
    nats = 0.5 * (signal * promoted(x0) ** 2 - signal - math.log1p(-signal))
    return nats.flatten(1).mean(dim=1) / math.log(2)


@dataclass(frozen=True)
class OdeLikelihood:
    """What `ode_likelihood` found for N samples, in float64 on the CPU.

    log_density   (N,) nats
    bits_per_dim  (N,) -log2 of the density / d
    latent        (N, C, H, W) the noise that the samples flow to, at the schedule's last level
    calls         of the network
    """

    log_density: Tensor
    bits_per_dim: Tensor
    latent: Tensor
    calls: int


@torch.no_grad()
def ode_likelihood(
    schedule: NoiseSchedule,
    network: Network,
    x0: Tensor,
    prediction_type: PredictionType,
    *,
    probe: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
) -> OdeLikelihood:
    """The density at x0 of the data smoothed by noise of the schedule's least sigma, by the probability-flow ODE.

    Song et al. 2021b, sec. 4.3, in Karras et al.'s variables: y = x_t / sqrt(alpha_bar) moves by
    dy / d(log sigma) = sigma eps, and log p changes along it by minus the divergence of that. The smoothing is not
    undone: at x0 this is the density of x0 + sigma_0 noise, not that of the data. The last level is taken for
    N(0, I). probe: (N, C, H, W) of +-1 for Hutchinson's unbiased estimate of the divergence; None for the exact one,
    which takes d backward passes. rtol, atol and method are those of scipy's `solve_ivp`, which takes the same steps
    for all samples; between the schedule's levels the network receives fractional timesteps, in float32.
    Raises ValueError at zero terminal SNR, for a `StepPrediction`, which has no meaning between two steps, and for a
    network whose output is not finite or cannot be differentiated.
    """
    if schedule.has_zero_snr:
        raise ValueError("the probability-flow likelihood ends at the schedule's last sigma, which is infinite here")
    x0 = promoted(x0)
    count, size = len(x0), x0[0].numel()

    def differentiable(x: Tensor, timesteps: Tensor) -> Tensor:
        output = network(x, timesteps)
        if not output.requires_grad:
            raise ValueError("the divergence needs the network's gradient; call it without torch.no_grad")
        return output

    eps = eps_of(schedule, differentiable, prediction_type)

    @torch.enable_grad()
    def derivative(log_sigma: float, state: Tensor) -> Tensor:
        y = state[: count * size].view(x0.shape).to(x0).requires_grad_()
        moved = drift(eps, y, log_sigma)
        divergence = _trace(moved, y) if probe is None else _probed_trace(moved, y, probe.to(x0))
        return torch.cat([moved.flatten(), divergence])

    start = torch.cat([x0.flatten(), x0.new_zeros(count)])
    span = (schedule.log_sigmas[0].item(), schedule.log_sigmas[-1].item())
    end, calls = integrate(derivative, start, span, rtol=rtol, atol=atol, method=method)
    log_a = 0.5 * math.log(schedule.alpha_bar[-1].item())
    latent = end[: count * size].view(x0.shape) * math.exp(log_a)
    log_prior = -0.5 * (latent**2 + math.log(2 * math.pi)).flatten(1).sum(dim=1)
    log_density = log_prior + size * log_a + end[count * size :]
    return OdeLikelihood(log_density, -log_density / (size * math.log(2)), latent, calls)


def _probed_trace(moved: Tensor, y: Tensor, probe: Tensor) -> Tensor:
    """probe J probe (N,) for J the Jacobian of moved with respect to y: on average over the signs, J's trace."""
    (pulled,) = torch.autograd.grad((moved * probe).sum(), y)
    return (pulled * probe).flatten(1).sum(dim=1)


def _trace(moved: Tensor, y: Tensor) -> Tensor:
    """The divergence (N,) of moved with respect to y, exactly: samples do not influence each other."""
    columns = moved.flatten(1)
    total = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    for i in range(columns.shape[1]):
        (gradient,) = torch.autograd.grad(columns[:, i].sum(), y, retain_graph=True)
        total += gradient.flatten(1)[:, i]
    return total
