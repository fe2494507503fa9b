"""How pictures are drawn, whatever the weights: the settings, what they ask of a model, the scheduler they mean."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, Self, get_args

from PIL import Image

from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.reading import Section
from pixart_ft.config.samplers import CONDITIONS, EVERY_SAMPLER, OPTIONS
from pixart_ft.data.buckets import FAR_RATIO
from pixart_ft.diffusion.intervals import Interval, adapter_interval_faults, guidance_interval_faults
from pixart_ft.diffusion.names import (
    LearnedVariance,
    PredictionType,
    ScheduleChoice,
    TimeConditioning,
    VarianceState,
    unknown_word,
)
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned, named_config
from pixart_ft.errors import UserError
from pixart_ft.schedulers import SCHEDULERS, build_scheduler
from pixart_ft.schedulers.base import PixArtScheduler
from pixart_ft.schedulers.stock import StockScheduler

FAR_AREA = 2.0  # times the training's area, or 1 / that: beyond it, a warning


_DEFAULTS: dict[str, Any] = {key: part.default for key, part in GenerateConfig.model_fields.items()}


@dataclass(frozen=True)
class Settings:
    """How pictures are sampled; together with the model, a prompt and a seed it fixes a picture.

    The defaults are those of the command, by the same names.
    """

    sampler: str = _DEFAULTS["sampler"]
    steps: int | str = _DEFAULTS["steps"]  # a number, or a respacing: "10,10,20", "ddim25"
    guidance: float = _DEFAULTS["guidance"]
    guidance_interval: Interval | None = None  # timesteps between which guidance acts; None: everywhere
    negative_prompt: str = _DEFAULTS["negative_prompt"]  # in place of the null caption, unless empty
    options: Mapping[str, object] = field(default_factory=dict)  # the sampler's own: EVERY_SAMPLER[sampler].options
    schedule: ScheduleChoice = _DEFAULTS["schedule"]  # walked through; base: the one trained on
    time_conditioning: TimeConditioning = _DEFAULTS["time_conditioning"]  # what another schedule tells the network
    image: Path | Image.Image | None = None  # a picture to start from
    strength: float = _DEFAULTS["strength"]  # share of the steps that are run on it
    inversion: bool = _DEFAULTS["inversion"]  # start from the noise that DDIM finds for it, not from a random one
    width: int | None = None  # pixels; None: the size the model was trained at
    height: int | None = None

    @classmethod
    def of(cls, config: Section) -> Self:
        """What a configuration says by the same names; the rest is as by default."""
        said = {part.name: getattr(config, part.name) for part in fields(cls) if hasattr(config, part.name)}
        options = {key: getattr(config, key, None) for key in OPTIONS}
        return cls(**said, options={key: value for key, value in options.items() if value is not None})


@dataclass(frozen=True)
class Abilities:
    """What a model allows.

    schedule, prediction_type, variance   what it was trained on, to predict, and the state of its learned variance
    size, unit                            the side of its pictures, and what sides must be multiples of, pixels
    intervals                             the timesteps that each of its adapters acts at
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType
    variance: VarianceState
    size: int
    unit: int
    intervals: tuple[Interval, ...] = ()


def scheduler_for(settings: Settings, model: Abilities) -> PixArtScheduler | StockScheduler:
    """The scheduler that the settings mean, with its timesteps, at the call that sampling begins with.

    Raises ValueError for what the sampler or the schedule cannot do.
    """
    schedule = model.schedule
    if settings.schedule != "base":
        words = named_config(settings.schedule, schedule.num_steps, rescale=schedule.num_steps != 1000)
        schedule = conditioned(NoiseSchedule.from_diffusers_config(words), schedule, settings.time_conditioning)
    scheduler = build_scheduler(settings.sampler, schedule, model.prediction_type, settings.options)
    steps: Any = settings.steps  # a text is for schedulers on indices alone
    if isinstance(steps, str) and EVERY_SAMPLER[settings.sampler].space == "sigma":
        raise ValueError(
            f"sampler {settings.sampler} steps on noise levels, and steps {steps} are of indices; give a "
            "number, or another sampler, such as ddim or iddpm"
        )
    scheduler.set_timesteps(steps)
    if schedule.num_steps > 1 and scheduler.timesteps[0] <= schedule.timesteps[0]:
        # "leading" and diffusers' "linspace" put a single step there, and "leading" more steps than it can tell apart
        raise ValueError(
            f"sampler {settings.sampler} would begin {settings.steps} steps of this spacing where no noise is left, so "
            "the noise would stay; take another number of steps, or spacing trailing"
        )
    if settings.image is not None:
        begin_late(scheduler, settings.strength)
    return scheduler


def begin_late(scheduler: Any, strength: float) -> None:
    """Let sampling begin with a picture: run this share of the scheduler's steps, the last ones."""
    starts = scheduler.step_starts
    scheduler.set_begin_index(starts[_skipped(len(starts), strength)])


def inversion_calls(settings: Settings, scheduler: PixArtScheduler | StockScheduler) -> int:
    """How many network calls find the noise of the start picture: one less than the steps that lead from it on."""
    return sum(start >= first_call(scheduler) for start in scheduler.step_starts) - 1 if settings.inversion else 0


def settled(settings: Settings, model: Abilities, adapter: str | None = None) -> Settings:
    """The settings with the model's own size and the sampler's own options filled in; `adapter` is for messages.

    Raises UserError with everything that is wrong: an unknown sampler, an option that it does not use or cannot take,
    steps or a size that the model cannot give, a learned variance that is not there or was not trained.
    """
    width, height = settings.width or model.size, settings.height or model.size
    faults = size_faults(width, height, model.unit)
    if not 1 <= settings.guidance < math.inf:
        faults.append(f"guidance must be at least 1, which is off, got {settings.guidance:g}")
    elif settings.guidance == 1:
        faults += [
            f"{key} is unused at guidance 1; raise guidance or remove it"
            for key in ("negative_prompt", "guidance_interval")
            if getattr(settings, key)
        ]
    start_faults = _start_faults(settings)
    faults += [*start_faults, *_idle_options(settings)]
    counted = isinstance(settings.steps, str) or settings.steps >= 1
    if not counted:
        faults.append(f"steps must be at least 1, got {settings.steps}")
    if settings.sampler not in EVERY_SAMPLER:
        faults.append(f"sampler: {unknown_word(settings.sampler, 'sampler', EVERY_SAMPLER)}")
    else:
        if model.variance == "direct" and _learned(settings):  # the only way to read it
            settings = replace(settings, options={"variance": "direct", **settings.options})
        faults += _variance_faults(settings, model.variance, adapter)
    options: dict[str, object] = {}
    if settings.sampler in EVERY_SAMPLER and counted:
        try:
            scheduler = scheduler_for(replace(settings, image=None) if start_faults else settings, model)
            options = {key: scheduler.config[key] for key in EVERY_SAMPLER[settings.sampler].options}
            guided = settings.guidance_interval if settings.guidance > 1 else None
            last = model.schedule.last_timestep
            faults += interval_faults(guided, model.intervals, calls_to_come(scheduler), last)
        except ValueError as error:
            named = str(error).startswith(f"sampler {settings.sampler} ")
            faults.append(str(error) if named else f"sampler {settings.sampler}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    warn_of_size(width, height, model.size)
    return replace(settings, options=options, width=width, height=height)


def size_faults(width: int, height: int, unit: int) -> list[str]:
    """What keeps a picture of this size, in pixels, from having latents."""
    sides = (("width", width), ("height", height))
    return [f"{key} ({side}) {wrong}" for key, side in sides if (wrong := side_fault(side, unit))]


def side_fault(side: int, unit: int) -> str | None:
    """What is wrong with a side, in pixels, that is no multiple of `unit`."""
    if side >= unit and side % unit == 0:
        return None
    return f"must be a multiple of {unit} (patch size times VAE factor); try {max(unit, round(side / unit) * unit)}"


def warn_of_size(width: int, height: int, side: int) -> None:
    """Warn where a picture is far from those of side x side pixels that the model was trained on."""
    area, ratio = width * height / side**2, max(width, height) / min(width, height)
    if not 1 / FAR_AREA <= area <= FAR_AREA or ratio > FAR_RATIO:
        warnings.warn(
            f"{width} x {height} pixels are far from the {side} x {side} that this model was trained on (area times "
            f"{area:.2g}, sides {ratio:.2g} to 1): expect repeated or broken parts; --aspect-ratio keeps the area",
            stacklevel=3,
        )


def image_faults(strength: float, tolerance: object) -> list[str]:
    """What keeps sampling from starting with a picture at this strength, with the sampler's tolerance."""
    faults = []
    if not 0 < strength <= 1:
        faults.append(f"strength must lie above 0 (the picture itself) and at most at 1 (only noise), got {strength:g}")
    if tolerance is not None:
        faults.append("image starts at a step, and pf_ode with a tolerance has none; remove tolerance")
    return faults


def interval_faults(
    guidance: Interval | None, adapters: Sequence[Interval], calls: Sequence[float] | None, last: int
) -> list[str]:
    """What keeps guidance, and adapters, from acting where they should; arguments as in `intervals`."""
    remedy = "give another lora_interval, more steps or more strength"
    return [*guidance_interval_faults(guidance, calls, last), *adapter_interval_faults(adapters, calls, remedy)]


def calls_to_come(scheduler: Any) -> list[float] | None:
    """The timesteps that the network will be called with, after `set_timesteps` of any scheduler.

    None: of a solver to a tolerance, which chooses its own.
    """
    if scheduler.config.get("tolerance") is not None:
        return None
    timesteps: list[float] = scheduler.timesteps.tolist()
    return timesteps[first_call(scheduler) :]


def first_call(scheduler: Any) -> int:
    """The position in `timesteps` that sampling begins at; not all of diffusers' schedulers can begin late."""
    return getattr(scheduler, "begin_index", None) or 0


def size_of(aspect_ratio: str, model: Abilities) -> tuple[int, int]:
    """Width and height, multiples of the model's unit, of a ratio such as "3:2", with about the area it was trained on.

    Raises UserError for anything else.
    """
    try:
        across, down = (float(part) for part in aspect_ratio.split(":"))
        ratio = across / down if across > 0 else 0.0
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 1 / 8 <= ratio <= 8:
        raise UserError(f"aspect_ratio is {aspect_ratio!r}; write width:height, as 3:2, between 1:8 and 8:1")
    width, height = model.size * ratio**0.5, model.size / ratio**0.5
    return tuple(max(model.unit, round(side / model.unit) * model.unit) for side in (width, height))


def recipe_of(settings: Settings) -> dict[str, object]:
    """The settings as plain values, the sampler's options among them."""
    values: dict[str, object] = {part.name: getattr(settings, part.name) for part in fields(settings)}
    image = settings.image
    return values | {"image": "a picture in memory" if isinstance(image, Image.Image) else image and str(image)}


def _learned(settings: Settings) -> bool:
    """Whether the steps are to be taken by the network's own variance."""
    variance = settings.options.get("variance", "learned")
    return EVERY_SAMPLER[settings.sampler].needs_variance and variance in get_args(LearnedVariance)


def _skipped(steps: int, strength: float) -> int:
    """The steps that a start picture saves; at least one is run."""
    return steps - max(1, round(steps * strength))


def _idle_options(settings: Settings) -> list[str]:
    """Options that differ from the sampler's defaults and do nothing beside the others."""
    options, kind = {**settings.options, "steps": settings.steps}, SCHEDULERS.get(settings.sampler)
    defaults = {} if kind is None else {k: p.default for k, p in signature(kind.__init__).parameters.items()}
    return [
        f"{option} is {options[option]!r}, unused while {other} is {options.get(other)!r}; change one"
        for option, other, used in CONDITIONS
        if options.get(option) not in (None, defaults.get(option)) and not used(options.get(other))
    ]


def _start_faults(settings: Settings) -> list[str]:
    if settings.image is None:
        return ["inversion starts from a picture: give image"] if settings.inversion else []
    faults = image_faults(settings.strength, settings.options.get("tolerance"))
    if settings.inversion and (settings.sampler != "ddim" or settings.options.get("eta")):
        faults.append("inversion is DDIM backwards: use sampler ddim with eta 0")
    return faults


def _variance_faults(settings: Settings, state: VarianceState, adapter: str | None) -> list[str]:
    """What keeps the steps from being taken by the network's own variance, where they are to be."""
    variance = settings.options.get("variance", "learned")
    if not _learned(settings) or state == ("direct" if variance == "direct" else "trained"):
        return []
    if state == "none":
        return ["sampler iddpm steps by a learned variance, and this network has no variance channels; use ddpm"]
    by = adapter or "this model"
    if state != "stale":
        return [f"variance {variance} is not how {by} was trained (diffusion.variance); leave variance out"]
    return [
        f"sampler iddpm steps by a learned variance, and {by} was trained by an objective that leaves it stale; use "
        "sampler ddpm, or set variance beta_tilde, or train with diffusion.objective hybrid"
    ]
