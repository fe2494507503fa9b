"""The golden trajectories, recomputed by the functions of `diffusion/solvers.py`.

Each `*_value` gives the counterpart of one expected array from the inputs in the same files, or None for a name that it
does not know. Everything runs in the dtype of the inputs; noise levels and times are Python floats throughout.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor

from pixart_ft.diffusion import flow, process, sigmas, solvers
from pixart_ft.diffusion.names import Predictor, StepVariance
from tests.helpers.golden_files import Golden, mixture_denoiser, mixture_eps, mixture_network

LOOKUPS: dict[str, sigmas.Lookup] = {"vp_log": "nearest_log", "vp_interp": "interpolated", "vp_round": "nearest"}
INDEX_METHOD = r"(i?ddpm|ddim)_(encode|eta[\d.]+|tilde_beta|beta|greedy|learned_range)(_clip)?"
VARIANCES: dict[str, StepVariance] = {
    "tilde_beta": "beta_tilde",
    "beta": "beta",
    "greedy": "none",
    "learned_range": "learned_range",
}


def traj_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, array = name.split("/")
    original, schedule = golden.schedules("traj", identifier)
    tables = {
        "timesteps": schedule.timesteps,
        "respaced_betas": schedule.betas,
        "respaced_posterior_log_variance_clipped": schedule.posterior_log_variance,
    }
    method = re.fullmatch(INDEX_METHOD, array)
    if method is None:
        return tables.get(array)

    def predict(x: Tensor, t: Tensor) -> process.Prediction:
        output = mixture_network(golden, original, x, schedule.timesteps[t])
        prediction = process.predict(schedule, output, x, t, "epsilon")
        return dataclasses.replace(prediction, x0=prediction.x0.clamp(-1, 1)) if method[3] else prediction

    def step(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        prediction = predict(x, t)
        if method[2] == "encode":
            return solvers.ddim_encode_step(schedule, prediction, x, t)
        if method[1] == "ddim":
            eta = float(method[2].removeprefix("eta"))
            return solvers.ddim_step(schedule, prediction, x, t, eta=eta, noise=noise)
        return solvers.ddpm_step(schedule, prediction, x, t, variance=VARIANCES[method[2]], noise=noise)

    encode = method[2] == "encode"
    states = [golden.arrays[f"traj/{identifier}/encode_x0" if encode else "traj/x_T"]]
    indices = range(schedule.num_steps - 1) if encode else reversed(range(schedule.num_steps))
    for index, noise in zip(indices, golden.arrays[f"traj/{identifier}/noise"], strict=False):
        states.append(step(states[-1], torch.full((len(states[0]),), index), noise))
    return torch.stack(states)


@dataclass(frozen=True)
class SigmaMethod:
    """How one trajectory of the group sigma is made; without churn, s_churn is 0."""

    heun: bool
    eta: float | None
    churn: tuple[float, float, float, float]  # s_churn, s_min, s_max, s_noise

    @classmethod
    def named(cls, array: str, facts: dict[str, Any]) -> Self | None:
        found = re.fullmatch(r"euler|heun|edm_alg2|euler_churn|euler_ancestral_eta([\d.]+)", array)
        if found is None:
            return None
        churn = tuple(facts["churn"]) if array in ("edm_alg2", "euler_churn") else (0.0, 0.0, math.inf, 1.0)
        return cls(array in ("heun", "edm_alg2"), float(found[1]) if found[1] else None, churn)


def sigma_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, variant, array = name.split("/")
    if variant not in ("exact", *LOOKUPS):
        return None
    facts, (_, schedule) = golden.entry("sigma", identifier), golden.schedules("sigma", identifier)
    lookup, latent = LOOKUPS.get(variant), golden.arrays[f"sigma/{identifier}/latent"]

    def denoised(y: Tensor, sigma: float) -> Tensor:
        if lookup is None:
            return mixture_denoiser(golden, y, 1.0, sigma)[0]
        index = sigmas.sigma_to_index(schedule, torch.tensor([sigma], dtype=torch.float64), lookup)
        output = mixture_network(golden, schedule, y / math.sqrt(1 + sigma**2), index)
        return sigmas.x0_at_sigma(output, y, sigma, "epsilon")

    def snapped(levels: Tensor) -> Tensor:
        if lookup != "nearest":
            return levels
        return sigmas.index_to_sigma(schedule, sigmas.sigma_to_index(schedule, levels, lookup))

    ends = facts["sigma_min"], facts["sigma_max"]
    low, high = ends if lookup is None else (schedule.sigmas[0].item(), schedule.sigmas[-1].item())
    levels = snapped(sigmas.karras_sigmas(facts["N"], low, high, facts["rho"]))
    if array == "sigmas":
        return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    if array in ("check_k", "check_D") and lookup is not None:
        check = golden.arrays[f"{name.removesuffix(array)}check_sigma"]
        if array == "check_k":
            return sigmas.sigma_to_index(schedule, check, lookup)
        return torch.stack([denoised(latent * sigma, sigma) for sigma in check.tolist()])
    method = SigmaMethod.named(array, facts)
    noise = golden.arrays[f"sigma/{identifier}/noise"]
    return None if method is None else sigma_trajectory(method, latent, noise, levels, snapped, denoised)


def sigma_trajectory(
    method: SigmaMethod,
    latent: Tensor,
    noise: Tensor,
    levels: Tensor,
    snapped: Callable[[Tensor], Tensor],
    denoised: Callable[[Tensor, float], Tensor],
) -> Tensor:
    raised = [solvers.churned_sigma(sigma, len(levels), *method.churn[:3]) for sigma in levels.tolist()]
    raised = snapped(torch.tensor(raised, dtype=torch.float64)).tolist()
    states = [latent * levels[0].item()]
    for (sigma, after), hat, z in zip(pairwise([*levels.tolist(), 0.0]), raised, noise, strict=True):
        y = solvers.churn(states[-1], sigma, hat, method.churn[3], z)
        x0 = denoised(y, hat)
        if method.eta is not None:
            y = solvers.euler_ancestral_step(y, x0, hat, after, eta=method.eta, noise=z)
        elif method.heun and after > 0:
            arrived = solvers.euler_step(y, x0, hat, after)
            second = solvers.slope(arrived, denoised(arrived, after), after)
            y = solvers.heun_step(y, solvers.slope(y, x0, hat), second, hat, after)
        else:
            y = solvers.euler_step(y, x0, hat, after)
        states.append(y)
    return torch.stack(states)


class ContinuousProcess:
    """The variance-preserving SDE of one configuration, and where it is evaluated."""

    def __init__(self, golden: Golden, identifier: str) -> None:
        self.golden, facts = golden, golden.entry("sde", identifier)
        self.low, self.high, self.steps = facts["bmin"], facts["bmax"], facts["N"]
        # By numpy: torch's linspace rounds otherwise, and an index is cut from these times.
        self.times: list[float] = np.linspace(1, facts["eps"], self.steps).tolist()
        self.betas: list[float] = np.linspace(self.low / self.steps, self.high / self.steps, self.steps).tolist()

    def marginal(self, time: Tensor) -> tuple[Tensor, Tensor]:
        a = flow.vp_signal(time, self.low, self.high)
        return a, (1 - a**2).sqrt()

    def signal_and_noise(self, time: float) -> tuple[float, float]:
        a, s = self.marginal(torch.tensor(time, dtype=torch.float64))
        return a.item(), s.item()

    def score(self, x: Tensor, time: float) -> Tensor:
        a, s = self.signal_and_noise(time)
        return -mixture_eps(self.golden, x, a, s) / s

    def beta(self, time: float) -> float:
        """Of the continuous process, over one step."""
        return (self.low + time * (self.high - self.low)) / self.steps

    def discrete_beta(self, time: float) -> float:
        return self.betas[int(time * (self.steps - 1))]


def sde_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, *rest = name.split("/")
    vp, x_T = ContinuousProcess(golden, identifier), golden.arrays[f"sde/{identifier}/x_T"]
    if rest == ["marginal_t_a_s"]:
        time = golden.arrays[name][:, 0]
        return torch.stack([time, *vp.marginal(time)], dim=1)
    if rest == ["pf_ode_euler"]:
        states = [x_T]
        for moment in vp.times:
            states.append(solvers.pf_ode_step(states[-1], vp.score(states[-1], moment), vp.beta(moment)))
        return torch.stack(states)
    if rest == ["pf_ode_exact"]:
        return exact_flow(vp, x_T, golden.entry("sde", identifier)["eps"])
    method = re.fullmatch(r"(\w+)/(predictor_only|cp|pc)(_denoised)?", "/".join(rest))
    if method is None or method[1] not in get_args(Predictor):
        return None
    trajectory, mean = predictor_corrector(golden, identifier, method[1], method[2])
    return mean if method[3] else trajectory


def exact_flow(vp: ContinuousProcess, x: Tensor, last: float) -> Tensor:
    """x at the last time, from time 1, along the probability-flow ODE."""

    def eps(y: Tensor, sigma: float) -> Tensor:
        a = 1 / math.sqrt(1 + sigma**2)
        return mixture_eps(vp.golden, a * y, a, sigma * a)

    (a_first, s_first), (a_last, s_last) = vp.signal_and_noise(1.0), vp.signal_and_noise(last)
    # In float32 the network's own rounding bounds what error control can reach.
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
    span = s_first / a_first, s_last / a_last
    y, _ = flow.solve_flow(eps, x / a_first, *span, rtol=tolerance, atol=tolerance, method="DOP853")
    return a_last * y


@functools.cache
def predictor_corrector(golden: Golden, identifier: str, predictor: Any, order: str) -> tuple[Tensor, Tensor]:
    """All states, and the last mean before its noise."""
    facts, vp = golden.entry("sde", identifier), ContinuousProcess(golden, identifier)
    noises = {key: golden.arrays[f"sde/{identifier}/{key}_noise"] for key in ("predictor", "corrector")}

    def corrected(x: Tensor, time: float, noise: Tensor) -> Tensor:
        for z in noise[: facts["corrector_steps"]]:
            score = vp.score(x, time)
            size = solvers.langevin_step_size(score, z, 1 - vp.discrete_beta(time), facts["snr"], norms="batch_mean")
            x = solvers.langevin_step(x, score, size, z)
        return x

    states, mean = [golden.arrays[f"sde/{identifier}/x_T"]], torch.empty(0)
    for i, time in enumerate(vp.times):
        x = corrected(states[-1], time, noises["corrector"][i]) if order == "cp" else states[-1]
        beta = vp.beta(time) if predictor == "euler_maruyama" else vp.discrete_beta(time)
        score = vp.score(x, time)
        mean = solvers.sde_step(predictor, x, score, beta)
        x = solvers.sde_step(predictor, x, score, beta, noises["predictor"][i])
        if order == "pc" and i + 1 < vp.steps:
            x = corrected(x, vp.times[i + 1], noises["corrector"][i])
        states.append(x)
    return torch.stack(states), mean
