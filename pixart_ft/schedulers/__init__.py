"""diffusers schedulers: a class for each row of `pixart_ft.config.samplers`, one for all stock ones."""

from collections.abc import Mapping

from pixart_ft.config.samplers import EVERY_SAMPLER, STOCK_SAMPLERS, Sampler
from pixart_ft.diffusion.names import PredictionType, check
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
    options: Mapping[str, object] | None = None,
) -> PixArtScheduler | StockScheduler:
    """The scheduler of a sampler by name; `options` are those of its row that differ from the class's defaults.

    Raises ValueError for an unknown sampler, an option that it does not use, and values that it cannot take.
    """
    check(sampler, "sampler", Sampler)
    if unused := sorted(set(options or {}) - set(EVERY_SAMPLER[sampler].options)):
        raise ValueError(f"sampler {sampler} does not use {', '.join(unused)}")
    if sampler in STOCK_SAMPLERS:
        return StockScheduler(STOCK_SAMPLERS[sampler], schedule, prediction_type, options)
    return SCHEDULERS[sampler].from_schedule(schedule, prediction_type, options)
