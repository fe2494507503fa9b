"""What is known of a training before a weight is loaded: whether it can begin, what it costs, how long it is."""

import os
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from pixart_ft.config.text import numbered
from pixart_ft.config.train import Data, TrainConfig
from pixart_ft.data.buckets import Shapes, Sized, counted, settled, square, table, view_count, whole_fit
from pixart_ft.data.rows import Row, distinct, listed
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.engine import check_engine
from pixart_ft.model.projection import check_projection, projected_width
from pixart_ft.model.quantized import check_quantization
from pixart_ft.runs.folder import RunFolder
from pixart_ft.sampling.settings import side_fault
from pixart_ft.training.batches import DrawLaws
from pixart_ft.training.encode import Pictures, compute_dtype, read_pictures, warn_of_copies
from pixart_ft.training.kinds import Kind, count, kind_of
from pixart_ft.training.learning_rate import LearningRate, fitting_warmup
from pixart_ft.training.objective import build_objective
from pixart_ft.training.optimizers import check_trained
from pixart_ft.training.overview import Overview
from pixart_ft.training.processes import asked_for, join, shards_asked_for
from pixart_ft.training.trainer import Plan

# Steps in a row that are not finite before a training gives up. A gradient scaler needs 17 to come down from 65536 to
# 1/2, so under float16 some are part of a healthy start.
GIVE_UP_AFTER = {False: 10, True: 40}


@dataclass(frozen=True)
class Start:
    """What a training begins with."""

    base: Base
    resolution: int
    objective: Objective
    schedule_config: dict[str, object]
    plan: Plan
    laws: DrawLaws
    learning_rate: LearningRate
    checkpoint: Path | None  # to continue from
    pictures: Pictures  # of which are used, in the order of their sizes:
    train: Sized
    prior: Sized
    held: Sized
    shapes: Shapes  # those sizes
    kind: Kind
    parameters: int  # that are trained

    @property
    def learned(self) -> Sized:
        """What is trained on and the prior after it."""
        one, other = self.train, self.prior
        return Sized([*one.rows, *other.rows], [*one.sizes, *other.sizes], [*one.own, *other.own])

    @property
    def several_sizes(self) -> bool:
        """Whether what is learned from is of more than one size."""
        return len(self.train.counts | self.prior.counts) > 1

    def overview(self, data: Data) -> Overview:
        """What its pictures and captions are like."""
        try:
            tokenizer = loading.load_tokenizer(self.base.whole)
        except UserError:  # told of where it is needed, if it is
            tokenizer = None
        rows = distinct([*self.pictures.learned, *self.pictures.held])
        seen, max_tokens = self.pictures.seen, data.max_tokens
        return Overview.of(seen, rows, lambda own: whole_fit(self.shapes.of(own), data.crop), tokenizer, max_tokens)

    def warn(self, overview: Overview, config: TrainConfig) -> None:
        """Warn of what is held out and trained on, of what teaches nothing, and of what is not read as it may seem."""
        warn_of_copies(self.pictures.learned, self.pictures.held, self.pictures.digests)
        learned, seen = self.learned, self.pictures.seen
        each = zip(learned.rows, learned.own, learned.views(config.data), strict=True)
        boxes = [(row, own, seen[row].shown, fits) for row, own, fits in each]
        empty = {
            row.name: None for row, own, box, fits in boxes if box and not any(fit.keeps(own, box) for fit in fits)
        }
        if empty:
            told = (
                "pictures of whose masks the crop leaves nothing, so they teach nothing (data.aspect buckets cuts less)"
            )
            warnings.warn(listed(told, list(empty), 3), stacklevel=2)
        overview.warn(self.pictures.seen, config.hub.trigger_words)

    def facts(self, config: TrainConfig, device: str, processes: int) -> list[str]:
        """Where it trains, how much, and how often it sees its pictures, a line each."""
        pictures, places = len(distinct(self.train.rows)), len(self.train.rows)
        batch = self.plan.batch_size * self.plan.accumulation * processes
        where = device if processes == 1 else f"{device}, {processes} processes"
        where += ", the network in shards" if processes > 1 and shards_asked_for(os.environ) else ""
        draws = batch / 2 if self.prior.rows else batch  # of the pictures, in a step
        epochs = self.plan.steps * draws / places
        times = f"{epochs:,.0f}" if epochs >= 1000 else f"{epochs:.4g}"
        often = (
            f"each picture {numbered(times, 'time')}"
            if places == pictures
            else f"{numbered(times, 'epoch')} of {places:,} places"
        )
        turn = "step" if self.several_sizes else "draw"
        others = len(distinct(self.prior.rows))
        prior = f", and {others:,} of the prior in every second {turn}" if others else ""
        held_out = f", {len(self.held.rows)} held out" if self.held.rows else ""
        views, counts = view_count(config.data), self.learned.counts
        one, other = next(iter(counts))
        several = f"of {len(counts)} sizes up to the pixels of {self.resolution} x {self.resolution}"
        sizes = several if self.several_sizes else f"{one} x {other} pixels"
        part = self.objective.where
        return [
            f"device             {where}, precision {config.train.mixed_precision}",
            f"trained            {self.parameters:,} parameters of {self.kind.words}",
            f"pictures           {pictures:,}{prior}{held_out}, {sizes}",
            *(self.train.table(batch, config.data.crop) if self.several_sizes else []),
            *(self.prior.table(batch, config.data.crop, "prior ") if self.several_sizes else []),
            *([f"shown as           one of {views} crops and mirror images of each"] if views > 1 else []),
            *([f"captions           kept {self._projected()}"] if config.data.project_captions else []),
            f"steps per epoch    {places / draws:.4g}, of {numbered(batch, 'picture')} each",
            f"length             {numbered(self.plan.steps, 'step')}: {often}",
            *([f"trained at         {part} alone; there it is measured, and acts"] if part else []),
            *self.pictures.facts(),
        ]

    def _projected(self) -> str:
        """How captions are kept, in words."""
        width, before = projected_width(self.base), self.base.transformer["caption_channels"]
        return f"projected, {width:,} numbers a token in place of {before:,}"


def dry_run(config: TrainConfig, resume: str | None = None) -> list[str]:
    """What `train` would begin with; raises UserError as it does before it loads a weight. Writes nothing."""
    config = with_precision(config)
    accelerator = accelerator_for(config)
    start = look(config, resume, progress=accelerator.is_main_process)
    if not accelerator.is_main_process:
        return []
    RunFolder(config.run.folder).probe()
    overview = start.overview(config.data)
    start.warn(overview, config)
    going_on = [] if start.checkpoint is None else [f"continues          {start.checkpoint}"]
    facts = start.facts(config, str(accelerator.device), accelerator.num_processes)
    return [*facts, *overview.facts(), *going_on]


def look(
    config: TrainConfig, resume: str | None, accelerator: Accelerator | None = None, *, progress: bool = True
) -> Start:
    """Check all that can be checked without weights, once `check_training` found no fault. Raises UserError.

    accelerator   of a run: its main process decodes the pictures, and remembers that for the others and the next run
    """
    base = Base.read(config.model.base, config.model.revision)
    resolution = resolution_of(config, base)
    objective, schedule_config = build_objective(config, base)
    for key in ("quantization", "text_encoder_quantization"):
        check_quantization(f"model.{key}", getattr(config.model, key))
    kind = kind_of(config, base, objective)
    trained = kind.trained(loading.skeleton(base))
    check_trained(config.optim, trained)
    if config.data.project_captions:
        check_projection(base, trained)
    checkpoint = None if resume is None else RunFolder(config.run.folder).resolve_resume(resume)
    with accelerator.main_process_first() if accelerator else nullcontext():
        remember = accelerator is not None and accelerator.is_main_process
        pictures = read_pictures(config, remember=remember, progress=progress)
    train, prior, held, shapes = _sized(config, base, pictures)
    return Start(
        base=base,
        resolution=resolution,
        objective=objective,
        schedule_config=schedule_config,
        plan=_plan(config),
        laws=_draw_laws(config),
        learning_rate=learning_rate_of(config),
        checkpoint=checkpoint,
        pictures=replace(pictures, train=train.rows, prior=prior.rows, held=held.rows),
        train=train,
        prior=prior,
        held=held,
        shapes=shapes,
        kind=kind,
        parameters=count(trained),
    )


def with_precision(config: TrainConfig) -> TrainConfig:
    """The configuration with train.mixed_precision auto settled for this machine; what a run records."""
    if config.train.mixed_precision != "auto":
        return config
    settled = config.train.model_copy(update={"mixed_precision": "bf16" if _computes_in_bfloat16() else "no"})
    return config.model_copy(update={"train": settled})


def _computes_in_bfloat16() -> bool:
    """Whether the device has instructions for bfloat16: without them a processor takes several times float32's time."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask is not None and ask() for ask in asked)


def accelerator_for(config: TrainConfig) -> Accelerator:
    """accelerate as the run wants it; UserError for what this machine or accelerate's own configuration cannot give."""
    precision, mistakes = config.train.mixed_precision, Mistakes()
    if precision == "fp16" and not torch.cuda.is_available():
        mistakes.add("train.mixed_precision fp16 needs a CUDA GPU; use bf16 or no")
    if config.optim.stochastic_rounding and precision != "bf16":
        mistakes.add(
            f"optim.stochastic_rounding keeps weights in bfloat16, and train.mixed_precision {precision} computes in "
            "another type; set train.mixed_precision bf16, or leave the rounding out"
        )
    if config.optim.in_backward and precision == "fp16":
        mistakes.add(
            "optim.in_backward with train.mixed_precision fp16: whether its loss scale is too high shows only after "
            "the last gradient; use bf16 or no"
        )
    if shards_asked_for(os.environ) and (fault := _no_shards(config)):
        mistakes.add(f"FSDP does not go with {fault}; leave one of them out")
    mistakes.raise_if_any()
    accelerator = join(os.environ, mixed_precision=precision)
    if config.optim.in_backward and accelerator.num_processes > 1:
        raise UserError(
            f"optim.in_backward steps by a gradient before the {accelerator.num_processes} processes have put theirs "
            "together; train in one process, or leave it out"
        )
    check_engine(config.model.attention, config.model.compile, accelerator.device, compute_dtype(config), "model.")
    return accelerator


def _no_shards(config: TrainConfig) -> str | None:
    """The first setting that was not seen to work with the network in shards."""
    if config.train.mixed_precision == "fp16":
        return "train.mixed_precision fp16"
    if config.optim.optimizer != "adamw":
        return f"optim.optimizer {config.optim.optimizer}"
    if config.optim.stochastic_rounding:
        return "optim.stochastic_rounding"
    if config.optim.in_backward:
        return "optim.in_backward"
    if config.model.compile:
        return "model.compile"
    if config.model.quantization != "none":
        return f"model.quantization {config.model.quantization}"
    return "train.ema_on_cpu" if config.train.ema_on_cpu else None


def resolution_of(config: TrainConfig, base: Base) -> int:
    """The side of the pictures, of the largest: of no size are more pixels. UserError for one the base cannot have."""
    return max(_resolutions(config, base))


def _resolutions(config: TrainConfig, base: Base) -> list[int]:
    found, mistakes = sorted(set(config.data.resolution or [base.native_size])), Mistakes()
    for side in found:
        if wrong := side_fault(side, base.size_unit):
            mistakes.add(f"data.resolution {side} does not fit {config.model.base}: it {wrong}")
    mistakes.raise_if_any()
    return found


def _sized(config: TrainConfig, base: Base, pictures: Pictures) -> tuple[Sized, Sized, Sized, Shapes]:
    """Trained on, of the prior, measured; and the sizes that there are."""
    data, unit, buckets = config.data, base.size_unit, config.data.aspect == "buckets"
    kept = [row.name for row in distinct(pictures.learned) if not row.may_be_mirrored]
    if data.flip and kept:
        told = "pictures that are not mirrored: their captions speak of sides, writing or numbers"
        warnings.warn(listed(told, kept, 3), stacklevel=2)
    try:
        sides = _resolutions(config, base)
        shapes = Shapes(tuple(table(side, unit, data.bucket_step) if buckets else square(side) for side in sides))
    except ValueError as error:
        raise UserError(f"data.bucket_step {data.bucket_step} {error}") from None
    if buckets and len(shapes) == len(sides):
        step = f"data.bucket_step {data.bucket_step}" if data.bucket_step else f"this base's step of {unit} pixels"
        raise UserError(
            f"data.aspect buckets: {step} leaves no size but squares of {sides}; choose a larger resolution"
        )
    train, final = _dealt(config, shapes, pictures.train, pictures)
    prior, _ = _dealt(config, shapes, pictures.prior, pictures)
    return train, prior, Sized.by(final, pictures.held, [pictures.seen[row].size for row in pictures.held]), final


def _dealt(config: TrainConfig, shapes: Shapes, rows: list[Row], pictures: Pictures) -> tuple[Sized, Shapes]:
    """The rows in their sizes, and those sizes; warns of sizes of fewer pictures than a step shows."""
    policy, own = config.data.small_buckets, [pictures.seen[row].size for row in rows]
    if len(shapes) == 1 or not rows:
        return Sized.by(shapes, rows, own), shapes
    together, sizes = config.train.batch_size * config.train.accumulation * asked_for(os.environ), Counter(own)
    before = counted(shapes, sizes)
    final, left_out = settled(shapes, sizes, together, policy)
    if small := {size: count for size, count in before.items() if count < together}:
        what = {
            "repeat": "shown several times in a step, which comes as much more rarely",
            "drop": "left out of the training",
            "merge_nearest": "brought to the nearest other size, and cropped to it",
        }
        items = [
            f"{width} x {height}: {numbered(count, 'picture')}" for (width, height), count in sorted(small.items())
        ]
        told = f"sizes of fewer pictures than the {together} that a step shows ({policy}), {what[policy]}"
        warnings.warn(listed(told, items), stacklevel=2)
    return Sized.by(final, rows, own, left_out), final


def learning_rate_of(config: TrainConfig) -> LearningRate:
    """That of the run; a warm-up that would not end within it, such as a recipe's in a short try, is cut: a warning."""
    asked, steps = config.optim.warmup_steps, config.train.steps
    used = fitting_warmup(asked, steps)
    if used != asked:
        warnings.warn(
            f"optim.warmup_steps {asked} would not end within train.steps {steps}: {used} are used, a tenth of them",
            stacklevel=2,
        )
    return LearningRate(config.optim.learning_rate, used, config.optim.decay, steps)


def _plan(config: TrainConfig) -> Plan:
    return Plan(
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        clip_norm=config.optim.clip_norm,
        in_backward=config.optim.in_backward,
        give_up_after=config.train.give_up_after or GIVE_UP_AFTER[config.train.mixed_precision == "fp16"],
        log_every=config.logging.every,
        validate_every=config.validation.every,
        samples_every=config.validation.samples_every,
        checkpoint_every=config.train.checkpoint_every,
        keep_checkpoints=config.train.keep_checkpoints,
    )


def _draw_laws(config: TrainConfig) -> DrawLaws:
    return DrawLaws(
        seed=config.run.seed,
        caption_dropout=config.diffusion.caption_dropout,
        timestep_law=config.diffusion.timestep_law,
        logit_mean=config.diffusion.logit_mean,
        logit_std=config.diffusion.logit_std,
        latents=config.data.latents,
    )
