"""The probability-flow ODE with error control, and Song's continuous process. Symbols: `pixart_ft.diffusion`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def solve_flow(
    eps: Callable[[Tensor, float], Tensor],
    y: Tensor,
    sigma: float,
    next_sigma: float,
    *,
    rtol: float,
    atol: float,
    method: str = "RK45",
) -> tuple[Tensor, int]:
    """y at next_sigma, and the number of calls of `eps`, along dy / d(log sigma) = sigma eps(y, sigma).

    Song et al. 2021b, sec. 4.3, in Karras et al.'s variables, y = x_t / sqrt(alpha_bar) (N, C, H, W) in its own dtype;
    the integrator (scipy's `solve_ivp`: rtol, atol, method) works in float64 and takes the same steps for all of y.
    Raises ValueError when it fails or `eps` is not finite.
    """
    from scipy.integrate import solve_ivp  # type: ignore[import-untyped]

    def drift(log_sigma: float, state: object) -> object:
        level = math.exp(log_sigma)
        moved = level * eps(torch.as_tensor(state).view(y.shape).to(y), level)
        if not bool(moved.isfinite().all()):  # else the integrator goes on to a sigma of NaN
            raise ValueError(f"the network's output is not finite at sigma {level:g}")
        return moved.flatten().to("cpu", torch.float64).numpy()

    span = (math.log(sigma), math.log(next_sigma))
    start = y.flatten().to("cpu", torch.float64).numpy()
    solution = solve_ivp(drift, span, start, method=method, rtol=rtol, atol=atol, t_eval=span[1:])
    if not solution.success:
        raise ValueError(f"the probability-flow ODE was not solved: {solution.message}")
    return torch.from_numpy(solution.y[:, -1].copy()).view(y.shape).to(y), int(solution.nfev)


def vp_signal(time: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """sqrt(alpha_bar) at times in 0..1 of dx = -beta/2 x dt + sqrt(beta) dw, beta = beta_min + t (beta_max - beta_min).

    exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2) (Song et al. 2021b, eq. 29): the limit, for many steps, of
    `NoiseSchedule.linear(N, beta_start=beta_min / N, beta_end=beta_max / N)`.
    """
    return torch.exp(-0.25 * time**2 * (beta_max - beta_min) - 0.5 * time * beta_min)
