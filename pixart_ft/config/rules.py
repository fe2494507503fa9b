"""The rules between keys of a training: which are unused beside which others, and which do not go together.

`unused` and `rules` of `reading.Config` say how they are read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pixart_ft.config.hub import Publication
from pixart_ft.config.optimizers import EMA_DECAY, takes
from pixart_ft.config.reading import Rule, Unused
from pixart_ft.config.sources import Use
from pixart_ft.diffusion.names import FixedVariance


def _has_simple_term(objective: str) -> bool:
    return objective in ("hybrid", "simple")


def _of_use(sources: Sequence[Mapping[str, Any]], use: Use) -> list[Mapping[str, Any]]:
    return [source for source in sources if source.get("use", "train") == use]


def _partly_weighed(short: str | None, sources: Sequence[Mapping[str, Any]], use: Use) -> bool:
    """Whether some sources of a use have a weight and others none."""
    weights = [source.get("weight") for source in _of_use(sources, use)] + ([None] if short is not None else [])
    return len({weight is None for weight in weights}) > 1


NEEDS_PICTURES: Rule = (
    ("data.folder", "data.sources"),
    lambda folder, sources: folder is None and not _of_use(sources, "train"),
    'data.folder is required: folder of pictures with captions, or "demo"; or data.sources with some to train on',
)


UNUSED: tuple[Unused, ...] = (
    ("model.revision", "model.base", lambda base: base != "demo"),
    *((f"data.{key}", "data.shuffle_tags", bool) for key in ("keep_tags", "caption_variants")),
    ("model.quantization", "adapter.kind", lambda kind: kind != "full"),
    *((f"adapter.{key}", "adapter.kind", lambda kind: kind == "lora") for key in ("rank", "alpha", "dropout")),
    *((f"adapter.{key}", "adapter.kind", lambda kind: kind == "lora") for key in ("rslora", "dora", "init")),
    *((f"adapter.{key}", "adapter.kind", lambda kind: kind == "full") for key in ("trainable", "whole")),
    *((f"adapter.{key}", "adapter.kind", lambda kind: kind == "peft") for key in ("peft_type", "options")),
    ("adapter.targets", "adapter.kind", lambda kind: kind != "full"),
    ("data.mask", "data.folder", lambda folder: folder is not None),
    ("data.held_out_fraction", "data.held_out", lambda folder: folder is None),
    ("diffusion.num_steps", "diffusion.schedule", lambda schedule: schedule != "base"),
    ("diffusion.rescale", "diffusion.schedule", lambda schedule: schedule in ("linear", "su_linear")),
    ("diffusion.rescale", "diffusion.num_steps", lambda num_steps: num_steps is not None),
    ("diffusion.cosine_offset", "diffusion.schedule", lambda schedule: schedule == "cosine"),
    ("data.bucket_step", "data.aspect", lambda aspect: aspect == "buckets"),
    ("data.project_captions", "data.live", lambda live: not live),
    ("data.crops", "data.crop", lambda crop: crop == "random"),
    ("diffusion.vlb_scale", "diffusion.objective", lambda objective: objective == "hybrid"),
    ("diffusion.variance", "diffusion.objective", lambda objective: objective in ("hybrid", "vlb")),
    ("diffusion.loss_space", "diffusion.objective", _has_simple_term),
    ("diffusion.error", "diffusion.objective", _has_simple_term),
    ("diffusion.weighting", "diffusion.objective", _has_simple_term),
    ("diffusion.huber_delta", "diffusion.error", lambda error: error == "huber"),
    ("diffusion.min_snr_gamma", "diffusion.weighting", lambda weighting: "min_snr" in weighting),
    ("diffusion.p2_gamma", "diffusion.weighting", lambda weighting: weighting == "p2"),
    ("diffusion.logit_mean", "diffusion.timestep_law", lambda law: law == "logit_normal"),
    ("diffusion.logit_std", "diffusion.timestep_law", lambda law: law == "logit_normal"),
    ("train.ema_decay", "train.ema_profile", lambda profile: profile != "power"),
    ("train.ema_profile", "train.ema_decay", lambda decay: decay > 0),
    ("train.ema_on_cpu", "train.ema_decay", lambda decay: decay > 0),
    ("train.ema_width", "train.ema_profile", lambda profile: profile == "power"),
    ("optim.beta1", "optim.optimizer", lambda optimizer: takes(optimizer, "beta1")),
    ("optim.beta2", "optim.optimizer", lambda optimizer: takes(optimizer, "beta2")),
    ("optim.epsilon", "optim.optimizer", lambda optimizer: takes(optimizer, "epsilon")),
    ("optim.decay", "optim.optimizer", lambda optimizer: takes(optimizer, "decay")),
    ("optim.in_backward", "optim.optimizer", lambda optimizer: takes(optimizer, "in_backward")),
    ("optim.stochastic_rounding", "optim.optimizer", lambda optimizer: takes(optimizer, "stochastic_rounding")),
    *((f"hub.{key}", "hub.repo", lambda repo: repo is not None) for key in Publication.model_fields),
)

RULES: tuple[Rule, ...] = (
    (
        ("data.crop", "data.aspect"),
        lambda crop, aspect: crop == "none" and aspect == "square",
        "data.crop {} with aspect {} would squeeze every picture into a square; set data.aspect buckets",
    ),
    (
        ("data.small_buckets", "data.aspect", "data.resolution"),
        lambda small, aspect, sides: small != "repeat" and aspect == "square" and len(sides or ()) < 2,
        "data.small_buckets {} with aspect {} and resolution {}: all pictures are of one size; leave it out, or "
        "set data.aspect buckets",
    ),
    (
        ("data.prior_weight", "data.prior", "data.sources"),
        lambda weight, folder, sources: weight != 1 and folder is None and not _of_use(sources, "prior"),
        "data.prior_weight is {}, unused while data.prior is {}; change one",
    ),
    (
        ("data.held_out_fraction", "data.sources"),
        lambda fraction, sources: fraction > 0 and bool(_of_use(sources, "held_out")),
        "data.held_out_fraction is {}, unused while one of data.sources is held out; change one",
    ),
    (
        ("data.folder", "data.prior", "data.sources"),
        lambda folder, prior, sources: (
            _partly_weighed(folder, sources, "train") or _partly_weighed(prior, sources, "prior")
        ),
        "data.folder {}, data.prior {} and data.sources {}: of one use some have a weight and others none; give "
        "one to each, or to none",
    ),
    (
        ("diffusion.time_conditioning", "diffusion.schedule", "diffusion.zero_snr"),
        lambda conditioning, schedule, zero_snr: conditioning != "index" and schedule == "base" and not zero_snr,
        "diffusion.time_conditioning is {} with schedule {} (zero_snr {}): the base's own schedule needs no match; "
        "choose another schedule, or leave it at index",
    ),
    (
        ("diffusion.variance", "diffusion.objective"),
        lambda variance, objective: objective == "hybrid" and variance in get_args(FixedVariance),
        "diffusion.variance is {} with objective {}, whose second term trains a learned one; use objective simple "
        "or vlb, or variance learned or direct",
    ),
    (
        ("diffusion.objective", "diffusion.timestep_law"),
        lambda objective, law: objective == "vlb" and law == "logit_normal",
        "diffusion.objective {} with timestep_law {}: the bound is a sum over all t alike; use uniform, stratified "
        "or importance, which undoes its own law",
    ),
    (
        ("adapter.kind", "adapter.peft_type"),
        lambda kind, peft_type: kind == "peft" and peft_type is None,
        "adapter.kind {} needs adapter.peft_type (it is {}): the adapter as peft names it, such as LOKR",
    ),
    (
        ("model.quantization", "adapter.dora"),
        lambda quantization, dora: quantization == "int8" and dora,
        "model.quantization {} with adapter.dora {}: peft has no DoRA on weights of 8 bits; use nf4, or no DoRA",
    ),
    (
        ("adapter.dora", "adapter.init"),
        lambda dora, init: dora and init != "default",
        "adapter.dora {} with adapter.init {}: what DoRA makes of that start is no plain adapter of the base; "
        "choose one of them",
    ),
    (
        ("adapter.init", "optim.stochastic_rounding"),
        lambda init, rounded: init != "default" and rounded,
        "adapter.init {} with optim.stochastic_rounding {}: what is taken away again would no longer be what was "
        "begun with; leave the rounding off, which saves an adapter nothing",
    ),
    (
        ("diffusion.timestep_range",),
        lambda ends: ends[0] > ends[1],
        "diffusion.timestep_range {} ends before it begins; give the lower timestep (less noise) first",
    ),
    (
        ("optim.in_backward", "optim.clip_norm"),
        lambda in_backward, clip_norm: in_backward and clip_norm > 0,
        "optim.in_backward {} with clip_norm {}: the norm is known only when the last gradient is there; set "
        "optim.clip_norm 0 (adafactor bounds each weight's step by itself)",
    ),
    (
        ("optim.in_backward", "train.accumulation"),
        lambda in_backward, accumulation: in_backward and accumulation > 1,
        "optim.in_backward {} with train.accumulation {}: accumulating keeps the gradients that it drops; set "
        "train.accumulation 1",
    ),
    (
        ("optim.learning_rate", "optim.optimizer"),
        lambda rate, optimizer: optimizer == "prodigy" and rate < 0.1,
        "optim.learning_rate {} with optimizer {}: it finds the step size itself, and multiplies it by this; leave "
        "it at 1",
    ),
    (
        ("optim.groups", "optim.optimizer"),
        lambda groups, optimizer: optimizer == "prodigy" and any(g.get("learning_rate") for g in groups),
        "optim.groups {} with optimizer {}: it finds one step size for all weights; leave learning_rate out",
    ),
    (
        ("optim.beta1", "optim.optimizer"),
        lambda beta1, optimizer: optimizer == "schedule_free" and beta1 == 0,
        "optim.beta1 {} with optimizer {}: it is how near the gradient is taken to the average; give 0.9",
    ),
    (
        ("validation.report", "data.held_out", "data.held_out_fraction", "data.sources"),
        lambda report, folder, fraction, sources: (
            report and folder is None and not fraction and not _of_use(sources, "held_out")
        ),
        "validation.report {} with data.held_out {}, held_out_fraction {} and sources {}: there is nothing to "
        "measure on; give one of them",
    ),
    (
        ("validation.report", "validation.pictures"),
        lambda report, pictures: report and pictures < 2,
        "validation.report {} with validation.pictures {}: it compares means over pictures; give 2 or more",
    ),
    (
        ("validation.report", "validation.steps"),
        lambda report, steps: report and isinstance(steps, str),
        "validation.report {} with validation.steps {}: it draws with a number of steps; give one",
    ),
    (
        ("validation.raw_weights", "train.ema_decay", "optim.optimizer"),
        lambda raw, decay, optimizer: raw and not decay and optimizer != "schedule_free",
        "validation.raw_weights {} with train.ema_decay {} and optimizer {}: there is no average beside; leave it out",
    ),
    (
        ("train.ema_decay", "train.ema_profile", "train.ema_on_cpu", "optim.optimizer"),
        lambda decay, profile, on_cpu, optimizer: (
            optimizer == "schedule_free" and (decay not in (0, EMA_DECAY) or profile != "warmup" or on_cpu)
        ),
        "train.ema_decay {}, ema_profile {} and ema_on_cpu {} with optimizer {}, which averages by itself; leave "
        "them out",
    ),
)
