"""Schedulers driven call by call, as a pipeline drives them. Shared."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.schedulers import SCHEDULERS, PixArtScheduler
from tests.helpers.networks import LINEAR, Network

Case = tuple[str, dict[str, Any]]  # a sampler and its options
EVERY: list[Case] = [(name, {}) for name in SAMPLERS] + [
    ("ddim", {"eta": 1.0}),
    ("edm", {"s_churn": 4.0}),
    ("euler", {"s_churn": 4.0}),
]


def run(
    scheduler: PixArtScheduler,
    network: Network,
    x: Tensor,
    generator: Any = None,
    noise: Callable[[int], Tensor] | None = None,
    first: int = 0,
) -> list[Tensor]:
    """Every sample, from `x` at the call number `first` to the last; `noise` of each call by its number."""
    path = [x]
    for call in range(first, len(scheduler.timesteps)):
        timestep = scheduler.timesteps[call]
        output = network(scheduler.scale_model_input(path[-1], timestep), timestep)
        given = None if noise is None else noise(call)
        path.append(scheduler.step(output, timestep, path[-1], generator, noise=given)[0])
    return path


def made(case: Case, steps: Any, schedule: NoiseSchedule = LINEAR, kind: Any = "epsilon") -> PixArtScheduler:
    scheduler = SCHEDULERS[case[0]].from_schedule(schedule, kind, case[1])
    scheduler.set_timesteps(steps)
    return scheduler


def name_of(case: Case) -> str:
    return "-".join([case[0], *map(str, case[1].values())])
