"""The golden trajectories, recomputed by the scheduler classes: the files' noise in, the network called as they say.

Each `*_value` is a counterpart of the one in `tests/helpers/golden_samplers.py`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.schedulers import (
    EDMScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    GreedyDDPMScheduler,
    IDDPMScheduler,
    RespacedDDIMScheduler,
    RespacedDDPMScheduler,
)
from pixart_ft.schedulers.base import PixArtScheduler, StepOutput
from pixart_ft.schedulers.discrete import IndexScheduler
from pixart_ft.schedulers.sigma import SigmaScheduler
from tests.helpers.golden_files import Golden, mixture_network
from tests.helpers.golden_samplers import INDEX_METHOD, LOOKUPS, VARIANCES, SigmaMethod


def scheduled_traj_value(golden: Golden, name: str) -> Tensor | None:
    """As `traj_value` by the scheduler classes, which find the steps themselves where the file gives their number."""
    _, identifier, array = name.split("/")
    facts, (original, _) = golden.entry("traj", identifier), golden.schedules("traj", identifier)
    method = re.fullmatch(INDEX_METHOD, array)
    kind, options = _index_scheduler(method[1], method[2]) if method else (RespacedDDIMScheduler, {})
    scheduler = kind.from_schedule(original, "epsilon", options)
    spec = facts.get("respacing", str(facts["T"]))
    if spec.isdigit() and spec != "1":  # of which the schedulers make T-1
        scheduler.set_timesteps(int(spec))
    else:
        scheduler.set_timesteps(timesteps=golden.arrays[f"traj/{identifier}/timesteps"].long().flip(0).tolist())
    if method is None:
        tables = {
            "timesteps": scheduler.timesteps.flip(0),
            "respaced_betas": scheduler.respaced.betas,
            "respaced_posterior_log_variance_clipped": scheduler.respaced.posterior_log_variance,
        }
        return tables.get(array)
    if method[2] == "encode":
        states = [golden.arrays[f"traj/{identifier}/encode_x0"]]
        for index, timestep in enumerate(scheduler.timesteps.flip(0)[:-1]):
            output = mixture_network(golden, original, states[-1], timestep.expand(len(states[-1])))
            states.append(scheduler.encode(output, index, states[-1]))
        return torch.stack(states)
    network = functools.partial(mixture_network, golden, original)
    return driven(scheduler, network, golden.arrays["traj/x_T"], golden.arrays[f"traj/{identifier}/noise"])


def _index_scheduler(family: str, variant: str) -> tuple[type[IndexScheduler], dict[str, Any]]:
    if family == "ddim":
        return RespacedDDIMScheduler, {} if variant == "encode" else {"eta": float(variant.removeprefix("eta"))}
    if variant == "greedy":
        return GreedyDDPMScheduler, {}
    return IDDPMScheduler if family == "iddpm" else RespacedDDPMScheduler, {"variance": VARIANCES[variant]}


def scheduled_sigma_value(golden: Golden, name: str) -> Tensor | None:
    """As `sigma_value` by the scheduler classes, on the Karras grid that they make between the schedule's own ends.

    They hold each state at the level to which churn will raise it; here that noise is taken off again, as the files
    have it. In float64 the network is called at the exact fractional timestep, of which the scheduler lists the float32
    rounding; in float32 as the scheduler says.
    """
    _, identifier, variant, array = name.split("/")
    facts, (_, schedule) = golden.entry("sigma", identifier), golden.schedules("sigma", identifier)
    method = SigmaMethod.named("euler" if array == "sigmas" else array, facts)
    if variant not in LOOKUPS or method is None:
        return None
    scheduler = sigma_scheduler(method, schedule, facts["rho"], LOOKUPS[variant])
    scheduler.set_timesteps(facts["N"])
    if array == "sigmas":
        return scheduler.sigmas

    levels = golden.arrays[f"{name.removesuffix(array)}sigmas"].numpy()[:-1]
    levels = snapped_levels(levels, schedule) if variant == "vp_round" else levels  # to the last bit
    hats = raised_levels(levels, method.churn, schedule, variant)
    called = np.append(np.stack([hats[:-1], levels[1:]], axis=1), hats[-1]) if method.heun else hats
    told = indices_of(called, schedule, variant)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), told, rtol=2e-7, atol=1e-12, err_msg=name)

    latent, noise = (golden.arrays[f"sigma/{identifier}/{key}"] for key in ("latent", "noise"))
    stds = torch.from_numpy(method.churn[3] * np.sqrt(hats**2 - levels**2)).to(noise)
    added = torch.cat([stds.view(-1, 1, 1, 1, 1) * noise, torch.zeros_like(noise[:1])])
    np.testing.assert_allclose(scheduler.init_noise_sigma, math.hypot(levels[0], stds[0].item()), rtol=1e-6)
    exact = iter(told.tolist()) if latent.dtype == torch.float64 else None

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        timestep = timestep if exact is None else torch.full((len(x),), next(exact), dtype=torch.float64)
        return mixture_network(golden, schedule, x, timestep)

    # What is added at the end of a step: if ancestral its own noise, if churned the next step's.
    noise = noise if method.eta is not None else noise.roll(-1, dims=0)
    return driven(scheduler, network, latent * scheduler.sigmas[0].item() + added[0], noise) - added


def sigma_scheduler(method: SigmaMethod, schedule: NoiseSchedule, rho: float, lookup: str) -> SigmaScheduler:
    options: dict[str, Any] = {"spacing": "karras", "rho": rho, "lookup": lookup}
    if method.eta is not None:
        return EulerAncestralScheduler.from_schedule(schedule, "epsilon", options | {"eta": method.eta})
    options |= zip(("s_churn", "s_min", "s_max", "s_noise"), method.churn, strict=True)
    return (EDMScheduler if method.heun else EulerScheduler).from_schedule(schedule, "epsilon", options)


def indices_of(called: np.ndarray, schedule: NoiseSchedule, variant: str) -> np.ndarray:
    """The indices of levels, by numpy."""
    table = schedule.sigmas.numpy()
    if variant == "vp_interp":
        return np.interp(np.log(called), np.log(table), np.arange(len(table)))
    scale = np.log if variant == "vp_log" else np.positive
    return np.abs(scale(called)[:, None] - scale(table)).argmin(axis=1).astype(float)


def raised_levels(levels: np.ndarray, churn: Sequence[float], schedule: NoiseSchedule, variant: str) -> np.ndarray:
    """Where Karras et al. 2022, Alg. 2 raises levels to, by numpy."""
    s_churn, s_min, s_max, _ = churn
    gamma = np.where((s_min <= levels) & (levels <= s_max), min(s_churn / len(levels), math.sqrt(2) - 1), 0)
    raised = levels * (1 + gamma)
    return snapped_levels(raised, schedule) if variant == "vp_round" else raised


def snapped_levels(levels: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    return schedule.sigmas.numpy()[indices_of(levels, schedule, "vp_round").astype(int)]


def driven(
    scheduler: PixArtScheduler, network: Callable[[Tensor, Tensor], Tensor], start: Tensor, noise: Tensor
) -> Tensor:
    """The samples at the start and after each step, whose noise is given."""
    states, sample = [start], start
    ends = {*scheduler.step_starts[1:], len(scheduler.timesteps)}
    for call, timestep in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(sample, timestep), timestep.expand(len(sample)))
        stepped = scheduler.step(output, timestep, sample, noise=noise[len(states) - 1])
        assert isinstance(stepped, StepOutput)
        sample = stepped.prev_sample
        if call + 1 in ends:
            states.append(sample)
    return torch.stack(states)
