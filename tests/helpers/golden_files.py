"""The golden files as data, and the network of their trajectories: the closed-form denoiser of a Gaussian mixture.

With PIXART_FT_GOLDEN=PREFIX, PREFIX.json and PREFIX.npz are read instead of tests/golden/golden_dev.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart_ft.diffusion.schedules import NoiseSchedule

PREFIX = os.environ.get("PIXART_FT_GOLDEN", str(Path(__file__).parents[1] / "golden" / "golden_dev"))


@dataclass(frozen=True, eq=False, repr=False)
class Golden:
    """One pair of files: parts of the JSON, the role of each array by name, the arrays as tensors."""

    config: dict[str, Any]
    respacing: list[dict[str, Any]]
    roles: dict[str, str]
    arrays: dict[str, Tensor]

    @property
    def groups(self) -> set[str]:
        """The groups that have expected arrays."""
        return {name.split("/")[0] for name, role in self.roles.items() if role == "expected"}

    def expected(self, group: str) -> list[str]:
        return [name for name, role in self.roles.items() if role == "expected" and name.startswith(f"{group}/")]

    def entry(self, group: str, identifier: str) -> dict[str, Any]:
        """The configuration of a group with this id."""
        entries = self.config["schedules" if group == "schedule" else group]
        (entry,) = (entry for entry in entries if entry["id"] == identifier)
        return entry

    def schedules(self, group: str, identifier: str) -> tuple[NoiseSchedule, NoiseSchedule]:
        """The original process of one configuration, and the (possibly respaced) one in use."""
        entry = self.entry(group, identifier)
        original = build_schedule(entry)
        return original, original.respaced(entry["respacing"]) if "respacing" in entry else original


def build_schedule(entry: dict[str, Any]) -> NoiseSchedule:
    names = {"b0": "beta_start", "b1": "beta_end", "s": "offset", "cap": "max_beta", "rescale": "rescale"}
    arguments = {names[key]: value for key, value in entry.get("args", {}).items()}
    schedule = getattr(NoiseSchedule, entry["name"])(entry["T"], **arguments)
    return schedule.zero_terminal_snr() if entry.get("zero_snr") else schedule


def load_golden() -> Golden:
    content = json.loads(Path(f"{PREFIX}.json").read_text())
    roles = {name: facts["role"] for name, facts in content["arrays"].items()}
    arrays = {name: torch.from_numpy(array) for name, array in np.load(f"{PREFIX}.npz").items()}
    return Golden(content["config"], content["respacing"], roles, arrays)


def mixture_denoiser(golden: Golden, x: Tensor, a: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and log p(x) of x = a x0 + s eps for the file's mixture."""
    weights, means, variances = (golden.arrays[f"gmm/{key}"] for key in ("weights", "means", "variances"))
    noised = a**2 * variances + s**2
    distance = x.unsqueeze(1) - a * means
    log_each = weights.log() - 0.5 * (distance**2 / noised + torch.log(2 * torch.pi * noised)).flatten(2).sum(dim=2)
    share = torch.softmax(log_each, dim=1).view(len(x), -1, 1, 1, 1)
    return (share * (means + a * variances * distance / noised)).sum(dim=1), torch.logsumexp(log_each, dim=1)


def mixture_eps(golden: Golden, x: Tensor, a: Tensor | float, s: Tensor | float) -> Tensor:
    """What of x = a x0 + s eps is noise, in expectation."""
    return (x - a * mixture_denoiser(golden, x, a, s)[0]) / s


def mixture_network(golden: Golden, original: NoiseSchedule, x: Tensor, timesteps: Tensor) -> Tensor:
    """The network of trajectories and bounds: [eps of the mixture, sin(x + 0.01 timestep)].

    timesteps (N,): original indices, all the same; between two of them log sigma is interpolated.
    """
    timestep = timesteps[0].item()
    log_sigmas = original.alpha_bar.reciprocal().sub(1).log().div(2).numpy()
    sigma = math.exp(np.interp(timestep, np.arange(len(log_sigmas)), log_sigmas))
    a, s = 1 / math.sqrt(1 + sigma**2), 1 / math.sqrt(1 + sigma**-2)
    return torch.cat([mixture_eps(golden, x, a, s), torch.sin(x + 0.01 * timestep)], dim=1)
