"""diffusers schedulers: a class for each row of `pixart_ft.config.samplers`, one for all stock ones."""

from collections.abc import Mapping

from pixart_ft.config.samplers import EVERY_SAMPLER, STOCK_SAMPLERS
from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.schedulers.base import PixArtScheduler
from pixart_ft.schedulers.discrete import (
    GreedyDDPMScheduler,
    IDDPMScheduler,
    RespacedDDIMScheduler,
    RespacedDDPMScheduler,
)
from pixart_ft.schedulers.sde import ProbabilityFlowScheduler, ScoreSDEScheduler
from pixart_ft.schedulers.sigma import AnnealedLangevinScheduler, EDMScheduler, EulerAncestralScheduler, EulerScheduler
from pixart_ft.schedulers.stock import StockScheduler

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
) -> PixArtScheduler | StockScheduler:
    """The scheduler of a sampler by name; `settings` are those of its row that differ from the class's defaults.

    Raises ValueError for an unknown sampler, a setting that it does not use, and values that it cannot take.
    """
    if sampler not in EVERY_SAMPLER:
        raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(EVERY_SAMPLER)}")
    if unused := sorted(set(settings or {}) - set(EVERY_SAMPLER[sampler].settings)):
        raise ValueError(f"sampler {sampler} does not use {', '.join(unused)}")
    if sampler in STOCK_SAMPLERS:
        return StockScheduler(STOCK_SAMPLERS[sampler], schedule, prediction_type, settings)
    return SCHEDULERS[sampler].from_schedule(schedule, prediction_type, settings)
