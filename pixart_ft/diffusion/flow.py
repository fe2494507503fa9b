"""The probability-flow ODE with error control, and Song's continuous process. Symbols: `pixart_ft.diffusion`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.sigmas import eps_at_sigma, index_to_timestep, sigma_to_index, signal_and_noise

# (x (N, C, H, W) of unit variance, what the time embedding receives (N,)) -> output (N, C or 2C, H, W)
Network = Callable[[Tensor, Tensor], Tensor]
Eps = Callable[[Tensor, float], Tensor]  # (y = x0 + sigma eps (N, C, H, W), sigma) -> eps


def eps_of(schedule: NoiseSchedule, network: Network, prediction_type: PredictionType) -> Eps:
    """What a network says is noise at y = x0 + sigma eps, at any sigma of the schedule, between its levels too.

    It receives y / sqrt(1 + sigma^2) and a fractional timestep in float32. Raises ValueError when called if the
    network's is a `StepPrediction`, which has no meaning between two steps.
    """

    def eps(y: Tensor, sigma: float) -> Tensor:
        index = sigma_to_index(schedule, torch.tensor([sigma], dtype=torch.float64))
        timestep = index_to_timestep(schedule, index).to(torch.float32).to(y.device)
        x = y * signal_and_noise(sigma)[0]
        return eps_at_sigma(network(x, timestep.expand(len(y))), x, sigma, prediction_type)

    return eps


def drift(eps: Eps, y: Tensor, log_sigma: float) -> Tensor:
    """dy / d(log sigma) = sigma eps(y, sigma): Song et al. 2021b, sec. 4.3, in Karras et al.'s variables.

    Raises ValueError when it is not finite: an integrator would go on to a sigma of NaN.
    """
    sigma = math.exp(log_sigma)
    moved = sigma * eps(y, sigma)
    if not bool(moved.isfinite().all()):
        raise ValueError(f"the network's output is not finite at sigma {sigma:g}")
    return moved


def integrate(
    derivative: Callable[[float, Tensor], Tensor],
    start: Tensor,
    span: tuple[float, float],
    *,
    rtol: float,
    atol: float,
    method: str,
) -> tuple[Tensor, int]:
    """The state (M,) at the end of a span of log sigma, float64 on the CPU, and the calls of its `derivative`.

    By scipy's `solve_ivp`, which works in float64 and takes the same steps for all of it. ValueError when it fails.
    """
    from scipy.integrate import solve_ivp  # type: ignore[import-untyped]

    def in_numpy(log_sigma: float, state: object) -> object:
        return derivative(log_sigma, torch.as_tensor(state)).detach().to("cpu", torch.float64).numpy()

    first = start.to("cpu", torch.float64).numpy()
    solution = solve_ivp(in_numpy, span, first, method=method, rtol=rtol, atol=atol, t_eval=span[1:])
    if not solution.success:
        raise ValueError(f"the probability-flow ODE was not solved: {solution.message}")
    return torch.from_numpy(solution.y[:, -1].copy()), int(solution.nfev)


def solve_flow(
    eps: Eps, y: Tensor, sigma: float, next_sigma: float, *, rtol: float, atol: float, method: str = "RK45"
) -> tuple[Tensor, int]:
    """y (N, C, H, W) at next_sigma, in its own dtype, and the number of calls of `eps`, along the flow.

    Raises ValueError as `drift` and `integrate` do.
    """

    def derivative(log_sigma: float, state: Tensor) -> Tensor:
        return drift(eps, state.view(y.shape).to(y), log_sigma).flatten()

    span = (math.log(sigma), math.log(next_sigma))
    end, calls = integrate(derivative, y.flatten(), span, rtol=rtol, atol=atol, method=method)
    return end.view(y.shape).to(y), calls


def vp_signal(time: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """sqrt(alpha_bar) at times in 0..1 of dx = -beta/2 x dt + sqrt(beta) dw, beta = beta_min + t (beta_max - beta_min).

    exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2) (Song et al. 2021b, eq. 29): the limit, for many steps, of
    `NoiseSchedule.linear(N, beta_start=beta_min / N, beta_end=beta_max / N)`.
    """
    return torch.exp(-0.25 * time**2 * (beta_max - beta_min) - 0.5 * time * beta_min)
