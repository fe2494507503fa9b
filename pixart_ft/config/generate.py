"""The configuration of `pixart-ft generate`: every key, its type, default, meaning, and the rules between keys.

Which sampler uses which key is read from the table in `samplers.py`. No torch here: help is instant.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from pixart_ft.config.reading import Config
from pixart_ft.config.samplers import CONDITIONS, EVERY_SAMPLER, OPTIONS, Sampler, users_of
from pixart_ft.config.train import (
    ATTENTION,
    COMPILE,
    GUIDANCE,
    HUB_BASE,
    LARGEST_SIDE,
    MOST_PICTURES,
    SEEDS,
    STEPS,
    T5_QUANTIZATION,
    Attention,
    Batch,
    Folder,
    Guidance,
    Precision,
    Quantization,
    Respacing,
    SamplerSteps,
    Scale,
    Seed,
    Source,
    Timestep,
    Weights,
)
from pixart_ft.diffusion.names import LearnedVariance, Predictor, ScheduleChoice, Spacing, TimeConditioning, Variance

_SAMPLERS = "; ".join(f"{facts.name}: {facts.summary}" for facts in EVERY_SAMPLER.values())


def _uses(option: str, sampler: str) -> bool:
    return option in EVERY_SAMPLER[sampler].options


def _of(option: str) -> str:
    return f"of {', '.join(users_of(option))}: "


class GenerateConfig(Config):
    """Everything a generation is told."""

    may_be_empty = ("prompts", "negative_prompt")

    model: Source | None = Field(
        None,
        description=f'"demo", a diffusers folder, or a Hub id; null = what the adapter was trained on, else {HUB_BASE}',
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub base; null = its newest")
    lora: tuple[Folder, ...] | None = Field(
        None,
        min_length=1,
        description="adapter or run folder, RUN@STEP, a Hub id, or another program's file; again for more, which add "
        "up; null = the base alone",
    )
    lora_scale: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = Field(
        (1.0,), min_length=1, description="strength of the adapters, one for all or one for each; 1 = as trained"
    )
    lora_alpha: Scale | None = Field(
        None, description="alpha of another program's adapter whose file says none; null = as such programs take it"
    )
    lora_interval: tuple[Timestep, ...] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="the two network timesteps between which the adapters act; null = where each was trained, "
        "0 1000 = everywhere",
    )
    weights: Weights = Field("ema", description="averaged or last weights of the run")
    prompts: tuple[str, ...] = Field((), description="what to draw")
    prompts_file: Folder | None = Field(None, description="text file with one prompt a line")
    negative_prompt: str = Field("", description="what to steer away from")
    seed: Seed = Field(0, description="seed of the first picture of each prompt; the next has seed + 1")
    images_per_prompt: int = Field(1, ge=1, le=MOST_PICTURES, description="pictures per prompt")
    width: int | None = Field(
        None, ge=16, le=LARGEST_SIDE, multiple_of=16, description="pixels; null = the model's own"
    )
    height: int | None = Field(
        None, ge=16, le=LARGEST_SIDE, multiple_of=16, description="pixels; null = the model's own"
    )
    aspect_ratio: str | None = Field(None, description="such as 3:2, with the area the model was trained on")
    image: Folder | None = Field(None, description="picture to start from, cropped to the size; null = noise")
    strength: float = Field(
        0.6, gt=0, le=1, description="share of the steps run on image; 1 = only noise is left of it"
    )
    inversion: bool = Field(False, description="start from the noise that DDIM finds for image, not from a random one")
    sampler: Sampler = Field("ddim", description=_SAMPLERS)
    steps: Respacing = Field(30, description=STEPS)
    guidance: Guidance = GUIDANCE
    guidance_interval: tuple[Timestep, ...] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="the two network timesteps, 0 to 999, between which guidance acts; null = all",
    )
    schedule: ScheduleChoice = Field("base", description="noise levels to walk through; base = those of the training")
    time_conditioning: TimeConditioning = Field(
        "snr_matched",
        description="what another schedule tells the network: where it knows that noise, or the index (rescaled: for "
        "another count of steps alone)",
    )
    spacing: Spacing | None = Field(
        None,
        description="how the steps are spread; null = iddpm on indices and SDE, karras on levels, else linspace",
    )
    clip_x0: float | None = Field(
        None,
        ge=0.1,
        le=1e6,
        description=_of("clip_x0") + "largest value of the guess of the latents, for much guidance; null = any",
    )
    variance: Variance | None = Field(
        None,
        description=_of("variance")
        + "of each step; null = beta_tilde for ddpm, learned for iddpm; learned_range = as others read that",
    )
    eta: float | None = Field(None, ge=0, le=1, description=_of("eta") + "noise added back; null = 0 for ddim, else 1")
    rho: float | None = Field(
        None, ge=0.5, le=100, description=_of("rho") + "of karras; null = 7, larger = more steps at the end"
    )
    sigma_min: float | None = Field(
        None, ge=1e-6, le=1e6, description=_of("sigma_min") + "last level; null = the schedule's"
    )
    sigma_max: float | None = Field(
        None, ge=1e-6, le=1e6, description=_of("sigma_max") + "first level; null = the schedule's"
    )
    s_churn: float | None = Field(
        None, ge=0, le=1e6, description=_of("s_churn") + "noise added before each step; null = 0"
    )
    s_min: float | None = Field(None, ge=0, le=1e6, description=_of("s_min") + "least level with churn; null = 0")
    s_max: float | None = Field(
        None, ge=1e-6, le=1e6, description=_of("s_max") + "last level with churn; null = no limit"
    )
    s_noise: float | None = Field(
        None, ge=1e-6, le=100, description=_of("s_noise") + "strength of churn's noise; null = 1"
    )
    predictor: Predictor | None = Field(None, description=_of("predictor") + "null = reverse_diffusion")
    corrector_steps: int | None = Field(None, ge=0, le=100, description=_of("corrector_steps") + "per step; null = 1")
    corrector_snr: float | None = Field(
        None, ge=1e-6, le=100, description=_of("corrector_snr") + "size of its step; null = 0.16"
    )
    corrector_first: bool | None = Field(
        None, description=_of("corrector_first") + "before the predictor, as the authors' code; null = after it"
    )
    langevin_steps: int | None = Field(
        None, ge=1, le=1000, description=_of("langevin_steps") + "at each level; null = 3"
    )
    langevin_step_size: float | None = Field(
        None, ge=1e-6, lt=2, description=_of("langevin_step_size") + "in units of the level's variance; null = 0.3"
    )
    tolerance: float | None = Field(
        None, ge=1e-8, le=1, description=_of("tolerance") + "error allowed an adaptive solver; null = even steps"
    )
    compare: bool = Field(False, description="a sheet of compare_samplers times compare_steps instead, with their cost")
    compare_samplers: tuple[Sampler, ...] = Field(
        ("ddpm", "iddpm", "ddim", "euler", "edm", "score_sde"), min_length=1, description="rows of that sheet"
    )
    compare_steps: tuple[SamplerSteps, ...] = Field(
        (10, 25, 50), min_length=1, max_length=32, description="columns of that sheet"
    )
    captions: bool = Field(
        False,
        description="a .txt with its prompt beside each picture, and no grid: a folder to train on, as data.prior",
    )
    batch_size: Batch = Field(4, description="pictures drawn at once; does not change them")
    tiling: bool = Field(False, description="decode in overlapping tiles: less memory for large pictures")
    attention: Attention = Field("by_shape", description=ATTENTION)
    compile: bool = Field(False, description=COMPILE)
    dtype: Precision = Field("auto", description="weights; auto = bfloat16 on a GPU, float32 on a CPU")
    text_encoder_quantization: Quantization = Field("none", description=T5_QUANTIZATION)
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto = the best there is")
    out: Folder = Field(Path("pictures"), description="folder for the pictures and their grid")

    unused = (
        ("revision", "model", lambda model: model != "demo"),
        ("lora_scale", "lora", lambda lora: lora is not None),
        ("lora_alpha", "lora", lambda lora: lora is not None),
        ("lora_interval", "lora", lambda lora: lora is not None),
        ("negative_prompt", "guidance", lambda guidance: guidance > 1),
        ("guidance_interval", "guidance", lambda guidance: guidance > 1),
        ("strength", "image", lambda image: image is not None),
        ("inversion", "image", lambda image: image is not None),
        ("time_conditioning", "schedule", lambda schedule: schedule != "base"),
        ("steps", "tolerance", lambda tolerance: tolerance is None),
        ("width", "aspect_ratio", lambda ratio: ratio is None),
        ("height", "aspect_ratio", lambda ratio: ratio is None),
        ("compare_samplers", "compare", lambda compare: compare),
        ("compare_steps", "compare", lambda compare: compare),
        *(
            (key, "compare", lambda compare: not compare)
            for key in ("sampler", "steps", "images_per_prompt", "captions", *OPTIONS)
        ),
        *((key, "sampler", partial(_uses, key)) for key in OPTIONS),
        *CONDITIONS,
    )
    rules = (
        (
            ("weights", "lora", "model"),
            lambda weights, lora, model: weights != "ema" and lora is None and model is None,
            "weights is {}, unused while lora is {} and model is {}; change one",
        ),
        (
            ("lora_scale", "lora"),
            lambda scales, lora: lora is not None and len(scales) not in (1, len(lora)),
            "lora_scale is {} for the adapters {}; give one number for each, or one for all",
        ),
        (
            ("prompts", "prompts_file"),
            lambda prompts, file: not prompts and file is None,
            'nothing to draw: give --prompt "..." (as often as you like) or --prompts-file FILE',
        ),
        (
            ("seed", "images_per_prompt"),
            lambda seed, count: seed + count > SEEDS,
            "seed {} with images_per_prompt {} passes the largest seed, 2**64 - 1; lower one",
        ),
        (
            ("spacing", "sampler"),
            lambda spacing, sampler: spacing is not None and spacing not in EVERY_SAMPLER[sampler].spacings,
            "spacing {} is not for sampler {}: iddpm, trailing and leading are for indices and the SDE, karras, "
            "exponential, linspace and trailing for noise levels, linspace, trailing, leading and mostly karras for "
            "diffusers' samplers",
        ),
        (
            ("sampler", "variance"),
            lambda sampler, variance: sampler == "ddpm" and variance in get_args(LearnedVariance),
            "sampler {} takes variance beta_tilde or beta, not {}; the sampler that steps by the learned one is iddpm",
        ),
    )
