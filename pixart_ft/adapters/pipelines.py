"""Adapters in a diffusers pipeline, ours or the stock one: loaded, scaled, unloaded, added to the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel

from pixart_ft.adapters.acting import load_adapter, loaded, merge, scale_adapter
from pixart_ft.adapters.acting import unload as unload_adapter
from pixart_ft.adapters.adopting import assumed, taken_in
from pixart_ft.adapters.files import find_adapter
from pixart_ft.config.train import Weights
from pixart_ft.diffusion.intervals import Interval
from pixart_ft.diffusion.schedules import DIFFUSERS_KEYS, NoiseSchedule, shown_config
from pixart_ft.errors import UserError, insist
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.schedulers.stored import process_of


def load_lora(
    pipeline: DiffusionPipeline,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    *,
    strict: bool = True,
    weights: Weights = "ema",
    interval: Interval | None = None,
    alpha: float | None = None,
    text_preparation: str | None = None,
) -> str:
    """Load an adapter into a PixArt-Sigma pipeline; several LoRAs add up. Returns the name that it has there.

    path       an adapter folder, a run folder, RUN@STEP, or a Hub id, owner/name or owner/name@revision; or a file, or
               folder, of another program
    scale      multiplies its effect, 1 as trained
    name       to scale or unload it by; None: the last part of the path
    strict     refuse another base, way of preparing captions, prediction type or schedule than those it was trained
               with; False warns of each instead. Weights without a place, and places without weights, are always
               refused
    weights    a run's averaged or last ones
    interval   the network's timesteps that it acts at, both ends included; None: where it was trained
    alpha      of another program's adapter whose file says none; text_preparation: how its captions were prepared

    Raises UserError, and the pipeline is then as it was. Warns of what another program's adapter does not say.
    """
    transformer = _transformer(pipeline)
    found = find_adapter(path, weights, interval)
    (adapter,) = taken_in([found], lambda: _trained_as(pipeline), alpha, text_preparation)
    insist(process_faults(adapter.metadata, pipeline.scheduler), strict=strict)
    load_adapter(transformer, adapter, scale=scale, name=name, strict=strict)
    return list(loaded(transformer))[-1]


def set_scale(pipeline: DiffusionPipeline, scale: float, name: str | None = None) -> None:
    """Multiply the effect of one adapter, or of every one, by `scale`; 1 is as trained, 0 the base alone."""
    for one in _named(pipeline, name):
        scale_adapter(_transformer(pipeline), scale, one)


def unload(pipeline: DiffusionPipeline, name: str | None = None) -> None:
    """Take one adapter, or every one, out again: without any the pipeline is as it was before, to the bit."""
    for one in _named(pipeline, name):
        unload_adapter(_transformer(pipeline), one)


def fuse(pipeline: DiffusionPipeline) -> None:
    """Add all adapters, at their scales, to the weights: a plain pipeline again, which saves and runs as any other.

    Raises UserError as `acting.merge` does.
    """
    _named(pipeline, None)
    merge(_transformer(pipeline))


def set_adapters(
    pipeline: DiffusionPipeline, names: str | Sequence[str], scales: float | Sequence[float] = 1.0
) -> None:
    """Let these adapters act, at these scales (one for all, or one for each), and the others at 0."""
    names = [names] if isinstance(names, str) else list(names)
    each = [scales] * len(names) if isinstance(scales, int | float) else list(scales)
    if len(each) != len(names):
        raise UserError(f"adapter: {len(each)} weights for {len(names)} names; give one for each, or one for all")
    chosen = {one: scale for name, scale in zip(names, each, strict=True) for one in _named(pipeline, name)}
    for one in _named(pipeline, None):
        scale_adapter(_transformer(pipeline), chosen.get(one, 0.0), one)


def _trained_as(pipeline: DiffusionPipeline) -> AdapterMetadata:
    """What is taken to be true of another program's adapter: that it was trained as this pipeline's network was."""
    scheduler, settings = pipeline.scheduler, _transformer(pipeline).config
    try:
        process = process_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    except ValueError as error:
        raise UserError(f"adapter: the scheduler of this pipeline is for another process: {error}") from error
    words = {key: process[key] for key in DIFFUSERS_KEYS if key in process}
    has_variance = settings.out_channels == 2 * settings.in_channels
    return assumed("the pipeline's", process["prediction_type"], words, has_variance=has_variance)


def process_faults(metadata: AdapterMetadata, scheduler: Any) -> list[str]:
    """What of a scheduler of a diffusers pipeline is not what an adapter was trained with."""
    remedy = "set pipeline.scheduler to one of its process first, or let it pass (strict=False)"
    try:
        process = process_of({**scheduler.config, "_class_name": type(scheduler).__name__})
    except ValueError as error:
        return [f"adapter: the scheduler of this pipeline is for another process: {error}; {remedy}"]
    faults = []
    if process["prediction_type"] != metadata.prediction_type:
        faults.append(
            f"adapter: it predicts {metadata.prediction_type}, and the scheduler of this pipeline takes it for "
            f"{process['prediction_type']}; {remedy}"
        )
    known, given = (NoiseSchedule.from_diffusers_config(words).alpha_bar for words in (metadata.schedule, process))
    if not torch.equal(known, given):
        faults.append(
            f"adapter: it was trained on the schedule {shown_config(metadata.schedule)}, and the scheduler of this "
            f"pipeline walks through another; {remedy}"
        )
    return faults


def _transformer(pipeline: DiffusionPipeline) -> PixArtTransformer2DModel:
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, PixArtTransformer2DModel):
        raise UserError(
            f"adapter: {type(pipeline).__name__} has no PixArt transformer to put an adapter into; give a "
            "PixArtPipeline or a PixArtSigmaPipeline"
        )
    return transformer


def _named(pipeline: DiffusionPipeline, name: str | None) -> list[str]:
    """The adapter of that name, or all of them. Raises UserError where there is none."""
    names = list(loaded(_transformer(pipeline)))
    if not names:
        raise UserError("adapter: this pipeline has none; load one with load_lora")
    if name is not None and name not in names:
        raise UserError(f"adapter: there is no {name!r} in this pipeline; there are {', '.join(names)}")
    return names if name is None else [name]
