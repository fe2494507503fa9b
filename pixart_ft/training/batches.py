"""Training samples as functions of the draw index.

A draw is one training sample; the DRAW INDEX counts draws since the run began, over epochs and processes. Picture,
posterior sample, noise, t and caption dropout are functions of (seed, draw index), so that a resumed run continues
bit for bit, and another number of processes or accumulation steps sees the same samples.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from pixart_ft.config.train import Latents
from pixart_ft.data.buckets import Order
from pixart_ft.data.cache import CachedPictures
from pixart_ft.data.live import LivePictures
from pixart_ft.diffusion.names import TimestepLaw, unknown
from pixart_ft.diffusion.weighting import (
    importance_timesteps,
    logit_normal_timesteps,
    stratified_timesteps,
    uniform_timesteps,
)
from pixart_ft.errors import UserError
from pixart_ft.model.text import drop_captions, pad_text
from pixart_ft.model.vae import LatentScale
from pixart_ft.randomness import normal, uniform

ORDER = "a keyed permutation"
"""Names how the pictures of an epoch follow each other; a run that began in another order is not the same run."""


@dataclass(frozen=True)
class DrawLaws:
    """By which laws the random parts of a draw follow from its index."""

    seed: int
    caption_dropout: float
    timestep_law: TimestepLaw
    logit_mean: float
    logit_std: float
    latents: Latents = "sample"


@dataclass(frozen=True)
class TrainingSet:
    """Encoded pictures with what is needed to read them.

    null_caption   (1, D), takes the place of dropped captions
    prior          how many of the pictures, the last ones, are of what the base must not forget (Ruiz et al. 2023): of
                   each two draws one is of them then, at random which; with several sizes of each two steps one
    prior_weight   what their losses are multiplied by
    names          of the pictures, for messages
    captions       of each picture that has several: the numbers of their texts, and the share of the draws that each
                   has; of the others the text has the picture's number
    buckets        how many of the pictures are of each size, size after size; empty: all are of one
    prior_buckets  the same of the prior's
    together       draws that must be of one size: a step's, or 1 where there is one size
    masked         whether pictures have masks, by which their losses are means
    """

    pictures: CachedPictures | LivePictures
    scale: LatentScale
    null_caption: Tensor
    prior: int = 0
    prior_weight: float = 1.0
    names: Sequence[str] = ()
    captions: Mapping[int, tuple[Sequence[int], Sequence[float]]] = field(default_factory=dict)
    buckets: tuple[int, ...] = ()
    prior_buckets: tuple[int, ...] = ()
    together: int = 1
    masked: bool = False

    def row(self, seed: int, draw: int) -> int:
        """The number of the picture that a draw shows: of one that has no latents, the next of its size that has.

        Raises UserError where none of that size has.
        """
        row = self._drawn(seed, draw)
        if row not in self.pictures.lost:
            return row
        count = len(self.pictures) - self.prior
        counts = [*(self.buckets or (count,)), *(self.prior_buckets or (self.prior,))]
        end, size = next(pair for pair in zip(accumulate(counts), counts, strict=True) if row < pair[0])
        found = next(
            (one for one in (*range(row, end), *range(end - size, row)) if one not in self.pictures.lost), None
        )
        if found is None:
            raise UserError(
                f"the VAE gives NaN or infinity for every picture of the size of {self._called(row)}; train on a base "
                "(model.base) whose VAE is whole"
            )
        return found

    def _drawn(self, seed: int, draw: int) -> int:
        """The same whether it has latents or not."""
        count = len(self.pictures) - self.prior
        own = Order(self.buckets or (count,), self.together)
        if not self.prior:
            return own.sample(seed, draw)
        group, inside = divmod(draw, self.together)
        pair, second = divmod(group, 2)
        prior_is_second = bool(uniform(seed, [pair], "prior") < 0.5)
        draw = pair * self.together + inside
        if second == prior_is_second:
            return count + Order(self.prior_buckets or (self.prior,), self.together).sample(seed, draw)
        return own.sample(seed, draw)

    def name_of(self, seed: int, draw: int) -> str:
        """The name of that picture."""
        return self._called(self.row(seed, draw))

    def _called(self, row: int) -> str:
        return self.names[row] if self.names else f"picture {row}"

    def text(self, seed: int, draw: int, row: int) -> int:
        """The number of the text that a draw shows with this picture."""
        if row not in self.captions:
            return row
        numbers, shares = self.captions[row]
        ends = list(accumulate(shares))[:-1]
        return numbers[bisect(ends, float(uniform(seed, [draw], "caption")))]

    def weights(self, rows: Sequence[int]) -> Tensor:
        """What the losses of these pictures are multiplied by, (N,) float32."""
        is_prior = torch.tensor(rows) >= len(self.pictures) - self.prior
        return torch.where(is_prior, self.prior_weight, 1.0)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU.

    x0, eps, rest  scaled latents, their noise, and a second one for the losses that want it, (N, C, H, W)
    t, weight      (N,) index, and what its losses are multiplied by: the weight that undoes the law of t, the prior's
    embeds, mask   text (N, L, D) and (N, L)
    area           see `Noised`
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    embeds: Tensor
    mask: Tensor
    rest: Tensor | None
    area: Tensor | None = None

    def pinned(self) -> Self:
        """The same in memory that a GPU copies from by itself, while the host goes on."""
        given: dict[str, Tensor | None] = vars(self)
        return replace(self, **{name: x.pin_memory() for name, x in given.items() if x is not None})


def draw_batch(
    data: TrainingSet,
    draws: Sequence[int],
    laws: DrawLaws,
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
    views = [0] * len(draws)
    if data.pictures.views > 1:
        views = (uniform(laws.seed, draws, "view") * data.pictures.views).int().tolist()
    while True:  # at most once more for each picture that turns out to have no latents
        rows = [data.row(laws.seed, draw) for draw in draws]
        mean, std = data.pictures.latents(rows, views)
        if data.pictures.lost.isdisjoint(rows):
            break
    shape = tuple(mean.shape[1:])
    t, weight = _timesteps(draws, laws, global_batch, num_steps, within or range(num_steps), law)
    dropped = uniform(laws.seed, draws, "caption dropout") < laws.caption_dropout
    captions = data.pictures.texts([data.text(laws.seed, draw, row) for draw, row in zip(draws, rows, strict=True)])
    texts = drop_captions(captions, dropped.tolist(), data.null_caption)
    embeds, mask = pad_text(texts)
    z = mean if laws.latents == "mode" else mean + std * normal(laws.seed, draws, "posterior", shape)
    return Batch(
        x0=data.scale.scaled(z),
        eps=normal(laws.seed, draws, "noise", shape),
        t=t,
        weight=weight * data.weights(rows),
        embeds=embeds,
        mask=mask,
        rest=normal(laws.seed, draws, "second noise", shape) if two_noises else None,
        area=data.pictures.areas(rows, views) if data.masked else None,
    )


def _timesteps(
    draws: Sequence[int], laws: DrawLaws, global_batch: int, num_steps: int, within: range, law: Tensor | None
) -> tuple[Tensor, Tensor]:
    u, first, count = uniform(laws.seed, draws, "timestep"), within.start, len(within)
    ones = torch.ones(len(draws), dtype=torch.float32)
    if laws.timestep_law == "uniform":
        return first + uniform_timesteps(u, count), ones
    if laws.timestep_law == "stratified":
        return first + stratified_timesteps(u, torch.tensor(draws), global_batch, count), ones
    if laws.timestep_law == "logit_normal":
        return logit_normal_timesteps(u, num_steps, mean=laws.logit_mean, std=laws.logit_std, within=within), ones
    if laws.timestep_law == "importance":
        assert law is not None, "importance sampling needs the law of t"
        t, weight = importance_timesteps(u, law)
        return first + t, weight.to(torch.float32)
    raise unknown(laws.timestep_law, "timestep_law", TimestepLaw)
