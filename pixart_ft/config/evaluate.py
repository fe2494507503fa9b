"""The configuration of `pixart-ft evaluate`. No torch here: help is instant."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pixart_ft.config.reading import Config
from pixart_ft.config.samplers import Sampler
from pixart_ft.config.train import (
    GUIDANCE,
    HUB_BASE,
    LARGEST_SIDE,
    MOST_PICTURES,
    SEEDS,
    T5_QUANTIZATION,
    Aspect,
    Batch,
    Folder,
    Guidance,
    Precision,
    Quantization,
    SamplerSteps,
    Seed,
    Source,
    Weights,
)

PictureMetric = Literal["fd", "kid", "cmmd", "prdc", "clip", "memorisation"]  # of pictures by the features of a network
Metric = Literal["loss", "bpd", "ode", "calibration", "samples", PictureMetric]
METRICS: dict[Metric, str] = {
    "loss": "error of the noise on held-out pictures",
    "bpd": "the variational bound of their latents, bits per dimension",
    "ode": "the same by the probability-flow ODE: slow",
    "calibration": "the learned variance against the errors it stands for",
    "samples": "pictures of the same prompts side by side",
    "fd": "Frechet distance of drawn to held-out pictures",
    "kid": "kernel distance of them, for fewer pictures",
    "cmmd": "another, made for CLIP's features",
    "prdc": "precision, recall, density, coverage",
    "clip": "fit of drawn pictures to their prompts",
    "memorisation": "whether they are nearer to pictures trained on than to held-out ones",
}


LIKENESS: tuple[PictureMetric, ...] = get_args(PictureMetric)
DRAWN: tuple[Metric, ...] = ("samples", *LIKENESS)  # for which pictures are drawn


def _sees(metrics: Collection[Metric]) -> bool:
    return bool({*LIKENESS} & {*metrics})


def draws(metrics: Collection[Metric]) -> bool:
    """Whether any of them is of pictures that are drawn."""
    return bool({*DRAWN} & {*metrics})


class EvaluateConfig(Config):
    """Everything an evaluation is told."""

    model: Source | None = Field(
        None,
        description=f'the base: "demo", a diffusers folder, or a Hub id; null = what the first run was trained on, '
        f"else {HUB_BASE}",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub base; null = its newest")
    runs: tuple[Source, ...] = Field(
        (), description="what is compared with the base, each by itself: runs, RUN@STEP, adapters, whole models"
    )
    lora: tuple[Folder, ...] | None = Field(
        None, min_length=1, description="adapters that are compared with the base together, as in generate"
    )
    lora_scale: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = Field(
        (1.0,), min_length=1, description="strength of lora, one for all or one for each; 1 = as trained"
    )
    weights: Weights = Field("ema", description="averaged or last weights of the runs")
    data: Source | None = Field(
        None, description='folder of held-out pictures with captions, or "demo"; null = the demo\'s, for the demo alone'
    )
    pictures: int = Field(64, ge=2, le=MOST_PICTURES, description="most held-out pictures used")
    size: int | None = Field(
        None,
        ge=16,
        le=LARGEST_SIDE,
        multiple_of=16,
        description="side of the square pictures, pixels; null = the base's",
    )
    aspect: Aspect = Field(
        "square", description="of held-out pictures; buckets = each at the size of the nearest aspect"
    )
    metrics: tuple[Metric, ...] = Field(
        ("loss", "bpd", "calibration"),
        min_length=1,
        description="; ".join(f"{name}: {what}" for name, what in METRICS.items()),
    )
    timesteps: int = Field(
        20, ge=1, le=1000, description="parts of the whole process, one t of each for every picture; more near t = 0"
    )
    respacings: tuple[Annotated[int, Field(ge=2, le=1000)], ...] = Field(
        (10, 25, 50), description="numbers of sampling steps whose bound and variance are measured too"
    )
    prompts_file: Folder | None = Field(
        None, description="text file with one prompt a line to draw; null = the captions of the held-out pictures"
    )
    samplers: tuple[Sampler, ...] = Field(("ddim",), min_length=1, description="samplers that draw, as in generate")
    steps: tuple[SamplerSteps, ...] = Field((25,), min_length=1, description="sampler steps, each with every sampler")
    guidance: Guidance = GUIDANCE
    images_per_prompt: int = Field(1, ge=1, le=MOST_PICTURES, description="pictures per prompt, of seeds one by one")
    features: Source | None = Field(
        None,
        description="what sees pictures for fd to memorisation: a transformers model's folder or Hub id, such as "
        'facebook/dinov2-base, or "demo", made for emoji; null = that, for the demo alone',
    )
    train_data: Source | None = Field(
        None, description='of memorisation: folder of what was trained on, or "demo"; null = the demo\'s, for it alone'
    )
    ode_pictures: int = Field(8, ge=2, le=MOST_PICTURES, description="pictures of metric ode")
    seed: Seed = Field(0, description="of noise and pictures, the same for all models")
    batch_size: Batch = Field(16, description="pictures at once; does not change the numbers")
    dtype: Precision = Field("auto", description="weights; auto = bfloat16 on a GPU, float32 on a CPU")
    text_encoder_quantization: Quantization = Field("none", description=T5_QUANTIZATION)
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto = the best there is")
    out: Folder = Field(Path("evaluation"), description="folder for report.html and report.json")

    unused = (
        ("revision", "model", lambda model: model not in (None, "demo")),
        ("lora_scale", "lora", lambda lora: lora is not None),
        *((key, "metrics", draws) for key in ("prompts_file", "samplers", "steps", "guidance", "images_per_prompt")),
        ("features", "metrics", _sees),
        ("train_data", "metrics", lambda metrics: "memorisation" in metrics),
        ("ode_pictures", "metrics", lambda metrics: "ode" in metrics),
        ("respacings", "metrics", lambda metrics: bool({"bpd", "calibration"} & set(metrics))),
        ("timesteps", "metrics", lambda metrics: bool({"loss", "bpd", "calibration"} & set(metrics))),
    )
    rules = (
        (
            ("lora_scale", "lora"),
            lambda scales, lora: lora is not None and len(scales) not in (1, len(lora)),
            "lora_scale is {} for the adapters {}; give one number for each, or one for all",
        ),
        (
            ("seed", "images_per_prompt"),
            lambda seed, count: seed + count > SEEDS,
            "seed {} with images_per_prompt {} passes the largest seed, 2**64 - 1; lower one",
        ),
        *(
            ((key,), lambda given: len(set(given)) < len(given), f"{key} {{}} names one twice; name each once")
            for key in ("metrics", "samplers", "steps", "respacings")
        ),
    )

    @classmethod
    def arranged(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With `metrics` and `samplers` in one text, as on the command line, as lists."""
        texts = {key: values[key] for key in ("metrics", "samplers") if isinstance(values.get(key), str)}
        return values | {key: [word.strip() for word in text.split(",")] for key, text in texts.items()}
