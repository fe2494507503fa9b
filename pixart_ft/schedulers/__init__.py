"""diffusers schedulers for every sampler: one class for each row of `pixart_ft.samplers`."""

from collections.abc import Mapping

from pixart_ft.diffusion.process import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.samplers import SAMPLERS
from pixart_ft.schedulers.base import PixArtScheduler
from pixart_ft.schedulers.discrete import (
    GreedyDDPMScheduler,
    IDDPMScheduler,
    RespacedDDIMScheduler,
    RespacedDDPMScheduler,
)
from pixart_ft.schedulers.sde import ProbabilityFlowScheduler, ScoreSDEScheduler
from pixart_ft.schedulers.sigma import (
    AnnealedLangevinScheduler,
    EDMScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
)

SCHEDULERS: dict[str, type[PixArtScheduler]] = {
    kind.sampler: kind
    for kind in (
        RespacedDDPMScheduler,
        GreedyDDPMScheduler,
        IDDPMScheduler,
        RespacedDDIMScheduler,
        EulerScheduler,
        EulerAncestralScheduler,
        EDMScheduler,
        ScoreSDEScheduler,
        AnnealedLangevinScheduler,
        ProbabilityFlowScheduler,
    )
}


def build_scheduler(
    sampler: str,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    settings: Mapping[str, object] | None = None,
) -> PixArtScheduler:
    """The scheduler of a sampler by name; `settings` are those of its row that differ from the class's defaults.

    Raises ValueError for an unknown sampler, a setting that it does not use, and values that it cannot take.
    """
    if sampler not in SCHEDULERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(SCHEDULERS)}")
    if unused := sorted(set(settings or {}) - set(SAMPLERS[sampler].settings)):
        raise ValueError(f"sampler {sampler} does not use {', '.join(unused)}")
    return SCHEDULERS[sampler].from_schedule(schedule, prediction_type, settings)
