"""The training loss and the variational bound on held-out pictures, at fixed timesteps and fixed noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from typing import Self

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.config.train import SEEDS
from pixart_ft.diffusion.likelihood import Bound, variational_bound
from pixart_ft.diffusion.names import PredictionType, Variance
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.network import network_output
from pixart_ft.model.text import pad_text
from pixart_ft.randomness import normal


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, each submodule's own mode restored after."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out pictures as the loss sees them: scaled posterior means (P, C, H, W) and texts [(L_i, D)]."""

    x0: Tensor
    texts: Sequence[Tensor]
    timestep_count: int  # size of the fixed grid of t
    seed: int

    @classmethod
    def of_sizes(cls, x0: Sequence[Tensor], texts: Sequence[Tensor], timestep_count: int, seed: int) -> list[Self]:
        """One for each size, of latents (C, H, W) of which those of one size follow each other."""
        found, first = list[Self](), 0
        for number, (_, part) in enumerate(groupby(x0, key=lambda one: one.shape)):
            one = torch.stack(list(part))
            of_seed = seed + number * SEEDS  # noise of its own for each size
            found.append(cls(one, texts[first : first + len(one)], timestep_count, of_seed))
            first += len(one)
        return found

    def first(self, count: int) -> Self:
        """That of the first pictures."""
        return replace(self, x0=self.x0[:count], texts=self.texts[:count])


def timestep_grid(within: range, count: int) -> Tensor:
    """`count` indices in the middles of equal strata of `within`, (count,) int64."""
    return within.start + ((torch.arange(count, dtype=torch.float64) + 0.5) * len(within) / count).long()


def held_out_loss(
    transformer: PixArtTransformer2DModel,
    objective: Objective,
    held_out: HeldOutSet,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The mean of every term over the t that are trained, for every picture: (P,) float64 on the CPU.

    It is that of the grid; where t = 0 is trained and not in it, as one of `count`, it is measured too, as TERM_t0, and
    has its share of one t in the mean. There the bound asks for the decoder, and the noise is least.

    Picture p at grid point g always meets the same noise, a function of (seed, p * G + g), so that two
    measurements differ by the network alone. No global random state is read; the modes of all modules are kept.
    """
    pictures, grid = range(len(held_out.x0)), timestep_grid(objective.within, held_out.timestep_count)
    cells = [(p, t) for p in pictures for t in grid.tolist()]
    apart = 0 in objective.within and 0 not in grid
    cells += [(p, 0) for p in pictures] if apart else []
    found: dict[str, list[Tensor]] = {}
    with evaluating(transformer):
        for start in range(0, len(cells), batch_size):
            chosen, t = zip(*cells[start : start + batch_size], strict=True)
            numbers = range(start, start + len(chosen))
            eps = normal(held_out.seed, numbers, "held-out noise", tuple(held_out.x0.shape[1:]))
            embeds, mask = pad_text([held_out.texts[p] for p in chosen])
            batch = [held_out.x0[list(chosen)], eps, torch.tensor(t), embeds, mask]
            if objective.draws_two_noises:
                batch.append(normal(held_out.seed, numbers, "held-out rest", tuple(held_out.x0.shape[1:])))
            terms = objective.terms(transformer, *(x.to(device) for x in batch))
            for name, value in terms.items():
                found.setdefault(name, []).append(value.cpu().double())
    share = 1 / len(objective.within) if apart else 0.0
    means, at_zero = {}, {}
    for name, values in found.items():
        of_grid, zero = torch.cat(values).split([len(pictures) * len(grid), len(pictures) * apart])
        means[name] = of_grid.view(-1, len(grid)).mean(1)
        if apart:
            means[name] = (1 - share) * means[name] + share * zero
            at_zero[f"{name}_t0"] = zero
    return means | at_zero


def held_out_bound(
    transformer: PixArtTransformer2DModel,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    held_out: HeldOutSet,
    *,
    variance: Variance,
    batch_size: int,
    noises: int = 1,
    device: torch.device | str = "cpu",
) -> Bound:
    """The variational bound of the held-out pictures' latents, the mean of `noises` for each picture and t, on the CPU.

    Takes T network calls for each picture and noise: give a respaced schedule, and say so, for it is that process's
    bound. More noises only add to the first.
    """

    def noise(pictures: Sequence[int], number: int, index: int) -> Tensor:
        purpose = f"held-out bound {number}" if number else "held-out bound"
        rows = [p * schedule.num_steps + index for p in pictures]
        return normal(held_out.seed, rows, purpose, tuple(held_out.x0.shape[1:])).to(device)

    parts = []
    with evaluating(transformer):
        for start in range(0, len(held_out.x0), batch_size):
            pictures = list(range(start, min(start + batch_size, len(held_out.x0))))
            x0, texts = held_out.x0[pictures].to(device), [held_out.texts[p] for p in pictures]
            embeds, mask = (x.to(device) for x in pad_text(texts))

            def network(x_t: Tensor, timesteps: Tensor, embeds: Tensor = embeds, mask: Tensor = mask) -> Tensor:
                return network_output(transformer, x_t, timesteps, embeds, mask)

            drawn = (partial(noise, pictures, number) for number in range(noises))
            bounds = [
                variational_bound(schedule, network, x0, prediction_type, noise=eps, variance=variance) for eps in drawn
            ]
            parts.append(Bound.averaged(bounds))
    return Bound(*(torch.cat([getattr(part, f.name) for part in parts]).cpu() for f in fields(Bound)))


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures and its standard error."""

    mean: float
    standard_error: float


def mean_over_pictures(losses: Tensor) -> Estimate:
    """Mean of losses (P,), or (P, G), of which each picture's are averaged first; the error is over pictures."""
    per_picture = losses.mean(1) if losses.ndim == 2 else losses
    error = per_picture.std(correction=1) / len(per_picture) ** 0.5 if len(per_picture) > 1 else torch.tensor(0.0)
    return Estimate(per_picture.mean().item(), error.item())


def paired_difference(before: Tensor, after: Tensor) -> Estimate:
    """after - before per picture: the pictures' own spread cancels, so that small changes show. Both as above."""
    return mean_over_pictures(after - before)
