"""The training configuration: every key, its type, default and meaning; `rules.py` has the rules between keys.

The command line, the YAML files and the help all read the fields below, so a key is described once.
`reading.py` reads a configuration and reports every mistake in it. No torch here: help is instant.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pixart_ft.config.hub import Hub
from pixart_ft.config.optimizers import EMA_DECAY, OptimizerName
from pixart_ft.config.reading import Config, Rule, Section, load
from pixart_ft.config.rules import NEEDS_PICTURES, RULES, UNUSED
from pixart_ft.config.samplers import Sampler
from pixart_ft.config.sources import PictureSource, Source, Use
from pixart_ft.diffusion.intervals import WHOLE
from pixart_ft.diffusion.names import (
    COSINE_OFFSET,
    LossSpace,
    Norm,
    ObjectiveKind,
    PredictionType,
    ScheduleChoice,
    TimeConditioning,
    TimestepLaw,
    TrainedVariance,
    Weighting,
)

HUB_BASE = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"

Decay = Literal["constant", "linear", "cosine"]  # of the learning rate, after the warm-up
Weights = Literal["ema", "raw"]  # of a run: averaged, or the last
EmaProfile = Literal["constant", "power", "warmup"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Quantization = Literal["none", "nf4", "int8"]
Latents = Literal["sample", "mode"]  # of the VAE's posterior
Kind = Literal["lora", "full", "peft"]  # of what is trained
Init = Literal["default", "pissa", "olora"]  # of a LoRA
Aspect = Literal["square", "buckets"]  # of the pictures that are trained on
Crop = Literal["centre", "random", "none"]  # what is kept of what is too long for its size
SmallBuckets = Literal["repeat", "drop", "merge_nearest"]  # of fewer pictures than a step shows
Attention = Literal["by_shape", "auto", "sdpa", "plain", "headwise", "xformers"]  # kernels, or how they are chosen
ATTENTION = (
    "kernels; by_shape = sdpa, but plain for short bfloat16 in training on a CPU; auto = the fastest, timed once here"
)
COMPILE = "compile one block for all: the first steps take minutes"
T5_QUANTIZATION = "hold T5 in 4 (nf4) or 8 bits, where its 9.5 GB in bfloat16 are too many: extra `quantized`"

# Layers by the ends of their names. The last layer, whose rows make the mean and the variance alike, is among the
# linear ones only where the objective trains the variance.
_ATTENTION, _MLP = ("to_q", "to_k", "to_v", "to_out.0"), ("net.0.proj", "net.2")
LAST_LAYER = "proj_out"
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+mlp": (*_ATTENTION, *_MLP),
    "all-linear": (*_ATTENTION, *_MLP, "linear_1", "linear_2", "adaln_single.linear", LAST_LAYER),
}


def _place(path: Path) -> Path:
    """With the home folder in place of ~; ValueError for what no path can hold."""
    if "\0" in str(path):
        raise ValueError("a zero byte")
    return Path(os.path.expanduser(path))


Folder = Annotated[Path, AfterValidator(_place)]

# Limits that mean something: beyond them a run would not end, fit no machine, or leave what float32 holds.
SEEDS = 2**64  # torch takes the seeds below it
MOST_STEPS = 10**8  # years of steps on any machine
MOST_PICTURES = 10**6  # one by one in memory, or drawn by one command
LARGEST_BATCH = 4096
LARGEST_SIDE = 8192  # pixels; four times the largest PixArt-Sigma
LARGEST_RANK = 4096  # the widest layer of the largest; the layers adapted are asked later
LARGEST_GUIDANCE = 100
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Every = Annotated[int, Field(ge=0, le=MOST_STEPS)]  # 0: not on the way
Batch = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]
SamplerSteps = Annotated[int, Field(ge=1, le=1000)]  # the schedules have a thousand
# A number of steps, or, on the indices of a schedule, counts of equal sections or a stride: `respacing.kept_indices`.
Respacing = Annotated[
    SamplerSteps | Annotated[str, Field(pattern=r"^(ddim\d{1,4}|\d{1,4}(,\d{1,4})+)$")],
    BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, list | tuple) else value),
]
STEPS = (
    "sampler steps; on indices also 10,10,20 = of equal sections, least noise first, or ddim25 = even strides from 0"
)
Guidance = Annotated[float, Field(ge=1, le=LARGEST_GUIDANCE, description="classifier-free guidance scale; 1 = off")]
GUIDANCE = 4.5  # by default, in sampling and in the grids of a training
Timestep = Annotated[float, Field(ge=-1e6, le=1e6)]  # an end of an interval: `intervals` knows the process
Rate = Annotated[float, Field(ge=1e-10, le=1)]  # of learning
DecayRate = Annotated[float, Field(ge=0, le=1)]  # of the weights
Side = Annotated[int, Field(ge=16, le=LARGEST_SIDE, multiple_of=16)]  # of a picture, pixels
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]  # float32 holds it, its square and its inverse beside 1


class Run(Section):
    """where the run lives"""

    name: str = Field("run", description="name of the run")
    folder: Folder = Field(
        default_factory=lambda valid: Path("runs") / valid["name"],
        description="folder of everything the run writes; must not exist yet unless resumed",
    )
    seed: Seed = Field(0, description="seed of every random draw")


class Model(Section):
    """what is fine-tuned"""

    base: Source = Field(HUB_BASE, description='"demo", a diffusers folder, or a Hub id')
    revision: str | None = Field(None, description="branch, tag or commit of a Hub base; null = its newest")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="frozen weights; auto = as train.mixed_precision"
    )
    quantization: Quantization = Field(
        "none", description="hold the base's blocks in 4 (nf4) or 8 bits, and train an adapter: extra `quantized`"
    )
    text_encoder_dtype: Precision = Field("auto", description="T5 while encoding captions; auto likewise")
    text_encoder_quantization: Quantization = Field("none", description=T5_QUANTIZATION)
    gradient_checkpointing: bool | Annotated[int, Field(ge=2, le=1000)] = Field(
        False, description="less memory, about 30 % slower; a number k: of every k-th block alone"
    )
    attention: Attention = Field("by_shape", description=ATTENTION)
    compile: bool = Field(False, description=COMPILE)


class Data(Section):
    """what it learns from"""

    folder: Source | None = Field(None, description='folder of pictures with captions, or "demo"')
    sources: tuple[PictureSource, ...] = Field(
        (), description="more places, or in place of folder: folders, datasets, Parquet, tar files (docs/data.md)"
    )
    mask: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="where data.folder is trained on: alpha = where opaque, or the column of grey pictures' names"
    )
    held_out: Source | None = Field(None, description='folder only measured on, or "demo"')
    held_out_fraction: float = Field(0.0, ge=0, lt=1, description="share of data.folder set aside for it")
    prior: Source | None = Field(
        None, description="folder of what the base must not forget; every second draw is of it (DreamBooth)"
    )
    prior_weight: float = Field(1.0, ge=0.01, le=100, description="what the losses of data.prior are multiplied by")
    strict: bool = Field(False, description="refuse a folder with what cannot be used, else named and left out")
    resolution: tuple[Side, ...] | None = Field(
        None,
        min_length=1,
        description="side of the square pictures, pixels; of several each gets the largest it fills; null = the base's",
    )
    aspect: Aspect = Field(
        "square", description="buckets = sizes of several aspects, of about as many pixels; each picture in the nearest"
    )
    bucket_step: Side | None = Field(
        None, description="what sides of buckets are multiples of; null = PixArt's sizes, or a 16th of the resolution"
    )
    small_buckets: SmallBuckets = Field(
        "repeat", description="sizes of fewer pictures than a step shows: repeat these in it, drop or merge them"
    )
    crop: Crop = Field("centre", description="of what does not fit its size; none = squeezed into it")
    crops: int = Field(4, ge=2, le=64, description="of random: encoded of each picture, and one of them in each draw")
    flip: bool = Field(False, description="mirror images too, unless the caption speaks of sides, writing or numbers")
    live: bool = Field(
        False, description="encode what a draw shows when it is drawn: VAE and T5 stay loaded, nothing of it is kept"
    )
    cache: Folder = Field(Path(".cache/pixart_ft"), description="folder of encoded captions and pictures")
    project_captions: bool = Field(
        False,
        description="keep captions as the base's frozen projection gives them, less than a third of T5's for XL/2",
    )
    latents: Latents = Field(
        "sample", description="of a picture: drawn from the VAE's posterior anew each time, or its most likely"
    )
    max_tokens: int = Field(300, ge=1, le=4096, description="longest caption, tokens; the rest is cut")
    shuffle_tags: bool = Field(
        False, description="captions are tags parted by commas, in an order that each draw chooses, by its index"
    )
    keep_tags: int = Field(0, ge=0, le=1000, description="first tags of a caption that stay where they are")
    caption_variants: int = Field(
        4, ge=2, le=64, description="orders encoded of each caption: so many times the work of T5 and its cache"
    )

    def every_source(self) -> dict[str, PictureSource]:
        """All sources by the keys that name them; folder (with mask), held_out and prior are short forms."""
        short: dict[str, Use] = {"folder": "train", "held_out": "held_out", "prior": "prior"}
        places = {key: getattr(self, key) for key in short}
        masks = {"folder": self.mask}
        found = {
            f"data.{key}": PictureSource(folder=place, use=short[key], mask=masks.get(key))
            for key, place in places.items()
            if place is not None
        }
        return found | {f"data.sources[{number}]": source for number, source in enumerate(self.sources)}


def _paper_scale(beside: Mapping[str, Any]) -> float:
    """lambda T for lambda = 0.001, beside the other keys, which may be wrong."""
    num_steps = beside.get("num_steps")
    return num_steps / 1000 if isinstance(num_steps, int) else 1.0


class Diffusion(Section):
    """the noise and the loss"""

    schedule: ScheduleChoice = Field("base", description="noise of each step; base = the model's own")
    num_steps: int | None = Field(
        None, ge=2, le=10_000, description="of another schedule than the base's; null = as many as the base has"
    )
    rescale: bool = Field(
        True,
        description="of linear and su_linear with num_steps: betas times 1000 / num_steps, as much noise at the end",
    )
    cosine_offset: float = Field(COSINE_OFFSET, ge=1e-4, le=1, description="of cosine: larger = more noise at t = 0")
    zero_snr: bool = Field(False, description="no signal left at the last step; wants v_prediction or sample")
    time_conditioning: TimeConditioning = Field(
        "index",
        description="what another schedule tells the network: its index, that in the base's count of steps, or where "
        "the base saw that noise",
    )
    prediction_type: Literal["base", PredictionType] = Field(
        "base", description="what the network is taught to output; base = as it does"
    )
    objective: ObjectiveKind = Field(
        "hybrid", description="hybrid = simple + learned variance; simple and su_* leave that stale"
    )
    loss_space: Literal["prediction", LossSpace] = Field(
        "prediction", description="whose error the simple term is; prediction = the network's output"
    )
    error: Norm = Field("squared", description="penalty of the simple term")
    huber_delta: Scale = Field(1.0, description="where Huber's penalty turns linear")
    weighting: Weighting = Field(
        "none", description="weight of the simple term by t; the same in every loss_space, none = plain error"
    )
    min_snr_gamma: Scale = Field(5.0, description="cap of min_snr, knee of soft_min_snr")
    p2_gamma: float = Field(1.0, ge=0, le=5, description="exponent of p2")
    variance: TrainedVariance = Field(
        "learned",
        description="of hybrid and vlb; learned = between the two fixed ones, which vlb may have too, direct = its "
        "logarithm, unstable",
    )
    vlb_scale: Scale = Field(
        default_factory=_paper_scale,
        description="weight of the hybrid VLB term, per bit/dim; by default num_steps / 1000 (the paper's 0.001)",
    )
    timestep_law: TimestepLaw = Field(
        "uniform",
        description="law of t; stratified: even over each global batch; importance: by loss, once each t has 10",
    )
    logit_mean: float = Field(0.0, ge=-10, le=10, description="of logit_normal; below 0 = less noise")
    logit_std: float = Field(1.0, ge=1e-3, le=10, description="of logit_normal")
    timestep_range: tuple[Timestep, ...] = Field(
        WHOLE,
        min_length=2,
        max_length=2,
        description="the two network timesteps between which it is trained, measured and acts; 0 1000 = everywhere",
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of draws that see the null caption")


class Adapter(Section):
    """what is trained"""

    kind: Kind = Field("lora", description="full = the network itself; peft = another adapter of that library")
    rank: int = Field(16, ge=1, le=LARGEST_RANK, description="inner width of each pair of matrices")
    alpha: Scale = Field(16.0, description="strength: the update is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description=f"layers to adapt, by the end of their names, or {', '.join(TARGETS)}",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs zeroed in training")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank): the step does not shrink with the rank")
    dora: bool = Field(False, description="train the length of each row of the weights apart from its direction")
    init: Init = Field(
        "default",
        description="default = begins as nothing; pissa, olora = from the weights' own largest or first directions",
    )
    trainable: tuple[str, ...] = Field(
        ("*",), min_length=1, description="of full: the weights, by names in which * is anything; the rest is frozen"
    )
    whole: bool = Field(False, description="of full: save the VAE and the text encoder beside the network too")
    peft_type: str | None = Field(None, description="of peft: LOHA, LOKR, OFT, ... as peft names it")
    options: dict[str, Any] = Field(
        {}, description="of peft: what its configuration takes; in a file they may stand beside peft_type"
    )


class Group(Section):
    """Weights by names in which * is anything, and what they have of their own; null: as all others."""

    pattern: Annotated[str, Field(min_length=1)]
    learning_rate: Rate | None = None
    weight_decay: DecayRate | None = None


class Optim(Section):
    """how it steps"""

    optimizer: OptimizerName = Field("adamw", description="most others than adamw are in the extra `optimizers`")
    learning_rate: Rate = Field(
        default_factory=lambda valid: 1.0 if valid.get("optimizer") == "prodigy" else 1e-4,
        description="peak step size; 1 for prodigy, which finds its own",
    )
    weight_decay: DecayRate = Field(0.01, description="decoupled decay per unit of learning rate")
    groups: tuple[Group, ...] = Field(
        (), description="weights with a learning_rate or weight_decay of their own; a name falls to the first pattern"
    )
    beta1: float = Field(0.9, ge=0, le=0.9999, description="memory of the mean gradient")
    beta2: float = Field(0.999, ge=0, le=0.99999, description="memory of the squared gradient")
    epsilon: float = Field(1e-8, ge=1e-20, le=1, description="added to Adam's denominator")
    stochastic_rounding: bool = Field(
        False, description="trained weights in bfloat16, rounded at random; else in float32"
    )
    in_backward: bool = Field(
        False, description="step each weight when its gradient is there, and drop that: less memory; wants clip_norm 0"
    )
    clip_norm: float = Field(1.0, ge=0, le=1e6, description="largest norm of the gradient; 0 = no clipping")
    warmup_steps: Every = Field(0, description="linear warm-up, steps; a tenth of a shorter run")
    decay: Decay = Field("constant", description="after warm-up")


class Train(Section):
    """how long and how large"""

    steps: Steps = Field(1000, description="length of the run, optimizer steps")
    batch_size: Batch = Field(4, description="pictures per process and forward pass")
    accumulation: int = Field(1, ge=1, le=10_000, description="forward passes per optimizer step")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="no = float32; auto = bf16 where the processor computes in it, else no"
    )
    ema_decay: float = Field(EMA_DECAY, ge=0, lt=1, description="decay of the averaged weights per step; 0 = off")
    ema_profile: EmaProfile = Field(
        "warmup", description="how fast it forgets; power: the average spans the same share of the steps all along"
    )
    ema_width: float = Field(0.1, ge=0.01, le=0.28, description="spread of the power profile, share of the steps done")
    ema_on_cpu: bool = Field(False, description="keep the average in the computer's memory")
    checkpoint_every: Every = Field(250, description="steps between checkpoints; 0 = only the last")
    keep_checkpoints: int = Field(
        2, ge=1, le=10_000, description="newest checkpoints kept; of kind full also models of sample steps"
    )
    give_up_after: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="skipped steps (loss or gradient not finite) in a row that end it; null = 10, fp16 40",
    )


class Validation(Section):
    """what is measured and drawn on the way"""

    every: Every = Field(100, description="steps between held-out losses; 0 = before and after")
    pictures: int = Field(64, ge=1, le=MOST_PICTURES, description="most held-out pictures used")
    timesteps: int = Field(8, ge=1, le=1000, description="size of the fixed grid of timesteps, beside t = 0")
    raw_weights: bool = Field(False, description="held-out loss of the trained weights too, beside their average")
    prompts: tuple[str, ...] = Field((), description="prompts of the sample grid; [] = no samples")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, max_length=64, description="seeds of the sample grid")
    sampler: Sampler = Field("ddim", description="sampler of the grid")
    steps: Respacing = Field(25, description=STEPS)
    guidance: Guidance = GUIDANCE
    samples_every: Every = Field(250, description="steps between sample grids; 0 = before and after")
    report: bool = Field(
        False, description="at the end, compare with the base on the held-out pictures as pixart-ft evaluate does"
    )


class Logging(Section):
    """what is written down"""

    every: Steps = Field(10, description="optimizer steps between log lines")
    trackers: tuple[Tracker, ...] = Field(
        ("tensorboard",), description="where curves and samples go too; [] = nowhere; two are extras by their names"
    )


class TrainConfig(Config):
    """Everything a training run is told."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    diffusion: Diffusion = Diffusion()
    adapter: Adapter = Adapter()
    optim: Optim = Optim()
    train: Train = Train()
    validation: Validation = Validation()
    logging: Logging = Logging()
    hub: Hub = Hub()

    may_be_empty = ("validation.prompts",)
    shipped = True

    @classmethod
    def arranged(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With what a peft configuration says beside its type, in `adapter`, as `adapter.options`."""
        adapter = values.get("adapter")
        if isinstance(adapter, dict) and adapter.get("kind") == "peft" and "options" not in adapter:
            options = dict(adapter)
            own = {key: options.pop(key) for key in ("kind", "peft_type", "targets") if key in options}
            targets = options.pop("target_modules", None)  # peft's own word for them
            return values | {"adapter": own | ({} if targets is None else {"targets": targets}) | {"options": options}}
        return values

    unused = UNUSED
    rules: ClassVar[tuple[Rule, ...]] = (NEEDS_PICTURES, *RULES)


class PlanConfig(TrainConfig):
    """What is told of a training that is only planned: without pictures none are looked at."""

    rules: ClassVar[tuple[Rule, ...]] = RULES


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A training configuration from a YAML file, a shipped name (`quickstart`) or a mapping.

    overrides: dotted key -> value, or its text as on the command line, as {"train.steps": 60}. Raises UserError with
    all mistakes together.
    """
    return load(TrainConfig, source, overrides)
