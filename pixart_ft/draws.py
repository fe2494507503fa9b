"""Training samples as functions of the draw index, and the numbers of a run that they depend on.

A draw is one training sample; the DRAW INDEX counts draws since the run began, over epochs and processes. Picture,
posterior sample, noise, t and caption dropout are functions of (seed, draw index), so that a resumed run continues
bit for bit, and another number of processes or accumulation steps sees the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_ft.data.cache import CachedPictures
from pixart_ft.data.captions import drop_captions, pad_text
from pixart_ft.diffusion.names import TimestepLaw
from pixart_ft.diffusion.weighting import (
    importance_timesteps,
    logit_normal_timesteps,
    stratified_timesteps,
    uniform_timesteps,
)
from pixart_ft.randomness import epoch_order, normal, uniform
from pixart_ft.vae import LatentScale


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. Steps are optimizer steps; `every` fields of 0 mean never."""

    steps: int
    batch_size: int  # pictures per process and micro-batch
    accumulation: int
    seed: int
    caption_dropout: float
    timestep_law: TimestepLaw
    logit_mean: float
    logit_std: float
    clip_norm: float  # 0: no clipping
    log_every: int
    validate_every: int
    samples_every: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclass(frozen=True)
class TrainingSet:
    """Cached pictures with what is needed to read them."""

    pictures: CachedPictures
    scale: LatentScale
    null_caption: Tensor  # (1, D), takes the place of dropped captions


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU.

    x0, eps, rest  scaled latents, their noise, and a second one for the losses that want it, (N, C, H, W)
    t, weight      (N,) index, and the weight that undoes the law it was drawn by
    embeds, mask   text (N, L, D) and (N, L)
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    embeds: Tensor
    mask: Tensor
    rest: Tensor | None


def draw_batch(
    data: TrainingSet,
    draws: Sequence[int],
    plan: Plan,
    *,
    global_batch: int,
    num_steps: int,
    within: range | None = None,
    law: Tensor | None = None,
    two_noises: bool = False,
) -> Batch:
    """The training samples with these draw indices; each depends on (seed, draw index) alone.

    within are the t to draw from, None for all `num_steps`; law (len(within),) is theirs under importance sampling,
    which thereby depends on the losses before this step too.
    """
    count = len(data.pictures)
    rows = [int(epoch_order(plan.seed, d // count, count)[d % count]) for d in draws]
    mean, std = data.pictures.latents(rows)
    shape = tuple(mean.shape[1:])
    t, weight = _timesteps(draws, plan, global_batch, num_steps, within or range(num_steps), law)
    dropped = uniform(plan.seed, draws, "caption dropout") < plan.caption_dropout
    texts = drop_captions(data.pictures.texts(rows), dropped.tolist(), data.null_caption)
    embeds, mask = pad_text(texts)
    return Batch(
        x0=data.scale.scaled(mean + std * normal(plan.seed, draws, "posterior", shape)),
        eps=normal(plan.seed, draws, "noise", shape),
        t=t,
        weight=weight,
        embeds=embeds,
        mask=mask,
        rest=normal(plan.seed, draws, "second noise", shape) if two_noises else None,
    )


def _timesteps(
    draws: Sequence[int], plan: Plan, global_batch: int, num_steps: int, within: range, law: Tensor | None
) -> tuple[Tensor, Tensor]:
    u, first, count = uniform(plan.seed, draws, "timestep"), within.start, len(within)
    ones = torch.ones(len(draws), dtype=torch.float32)
    if plan.timestep_law == "uniform":
        return first + uniform_timesteps(u, count), ones
    if plan.timestep_law == "stratified":
        return first + stratified_timesteps(u, torch.tensor(draws), global_batch, count), ones
    if plan.timestep_law == "logit_normal":
        return logit_normal_timesteps(u, num_steps, mean=plan.logit_mean, std=plan.logit_std, within=within), ones
    assert law is not None, "importance sampling needs the law of t"
    t, weight = importance_timesteps(u, law)
    return first + t, weight.to(torch.float32)
