"""What feature vectors say of the pictures that were drawn: how like the real ones, like their captions, memorised."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from pixart_ft.config.evaluate import LIKENESS, EvaluateConfig, PictureMetric
from pixart_ft.data.rows import Row
from pixart_ft.errors import Mistakes
from pixart_ft.evaluation.contestants import Contest
from pixart_ft.evaluation.drawing import Drawn
from pixart_ft.evaluation.features import Extractor
from pixart_ft.evaluation.metrics import (
    caption_similarity,
    cmmd,
    frechet_distance,
    kid,
    memorisation,
    pictures_needed,
    prdc,
)
from pixart_ft.evaluation.tables import rows_of
from pixart_ft.pictures.sheets import grid

SHOWN = 8  # generated pictures with their neighbours


@dataclass(frozen=True, eq=False)
class Sight:
    """What pictures are seen by, and the features of those that are no model's.

    real, training  (N, D), (M, D): held out, and trained on
    captions        (C, D) of the prompts, by an extractor that reads
    """

    extractor: Extractor
    metrics: Sequence[PictureMetric]
    size: int
    real: Tensor
    training: Tensor | None
    training_rows: Sequence[Row]
    captions: Tensor | None

    @classmethod
    def of(cls, config: EvaluateConfig, contest: Contest, device: torch.device) -> "Sight | None":
        """None where no such metric is asked for. Raises UserError where there are too few pictures for one of them."""
        asked = [metric for metric in LIKENESS if metric in config.metrics]
        if not asked:
            return None
        assert contest.features is not None
        extractor = Extractor.load(contest.features, "features", device=device)
        mistakes, size = Mistakes(), contest.size
        real = extractor.of_pictures(contest.rows, lambda row: _opened(row, size))
        there = {
            "drawn": len(contest.prompts) * config.images_per_prompt,
            "held out": len(real),
            "trained on": len(contest.training),
        }
        for metric in asked:
            needed = pictures_needed(metric, real.shape[1])
            used = {"drawn"} if metric == "clip" else {"drawn", "held out"}
            used |= {"trained on"} if metric == "memorisation" else set()
            if few := [f"{there[what]} {what}" for what in there if what in used and there[what] < needed]:
                mistakes.add(
                    f"metrics: {metric} by {extractor.name} ({real.shape[1]} features) needs {needed} pictures, "
                    f"and there are {' and '.join(few)}; raise images_per_prompt "
                    "or pictures, add to train_data, or leave it out"
                )
        captions = None
        if "clip" in asked:
            with mistakes.noted():
                captions = extractor.of_captions(contest.prompts)
        mistakes.raise_if_any()
        training = None
        if "memorisation" in asked:
            training = extractor.of_pictures(contest.training, lambda row: _opened(row, size))
        return cls(extractor, asked, size, real, training, contest.training, captions)

    def values(self, drawn: Drawn, each: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of each number asked for, values whose mean it is; and the neighbours of the pictures, for `neighbour_sheet`.

        each: pictures of a prompt. They count as one; where there is one prompt only, each for itself.
        """
        each = each if each < len(drawn.paths) else 1
        seen = self.extractor.of_pictures(drawn.paths, lambda path: Image.open(path).convert("RGB"))
        against: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"fd": frechet_distance, "kid": kid, "cmmd": cmmd}
        found = {name: metric(seen, self.real, each) for name, metric in against.items() if name in self.metrics}
        if "prdc" in self.metrics:
            found |= prdc(seen, self.real, each)
        if self.captions is not None:
            own = torch.arange(len(self.captions)).repeat_interleave(len(seen) // len(self.captions))
            found |= caption_similarity(seen, self.captions, own, each)
        if self.training is None:
            return found, {}
        near = memorisation(seen, self.training, self.real, each)
        found |= {"nearer_to_training": near.share, "closer_than_held_out": near.closer}
        neighbours = {
            "chance": near.chance,
            "training": near.training.tolist(),
            "held_out": near.held_out.tolist(),
            "training_distance": near.training_distance.tolist(),
            "held_out_distance": near.held_out_distance.tolist(),
        }
        return found, neighbours


def likeness_tables(sight: Sight, drawn: Mapping[str, Sequence[Drawn]], each: int) -> dict[str, Any]:
    """By the way of drawing, and in it by the metric, a row for each model."""
    values: dict[str, dict[str, dict[str, Tensor]]] = {}
    neighbours: dict[str, dict[str, Any]] = {}
    calls: dict[str, int | None] = {}
    for label, ways in drawn.items():
        for way in ways:
            found, near = sight.values(way, each)
            calls[way.name] = way.calls
            for metric, value in found.items():
                values.setdefault(way.name, {}).setdefault(metric, {})[label] = value
            neighbours.setdefault(way.name, {})[label] = near
    return {
        "features": {
            "name": sight.extractor.name,
            "digest": sight.extractor.digest,
            "numbers": sight.real.shape[1],
            "real": len(sight.real),
            "training": 0 if sight.training is None else len(sight.training),
        },
        "ways": {
            way: {
                "calls": calls[way],
                "metrics": {metric: rows_of(by_model, {}) for metric, by_model in metrics.items()},
                "neighbours": neighbours[way] if sight.training is not None else {},
            }
            for way, metrics in values.items()
        },
    }


def neighbour_sheets(
    sight: Sight, drawn: Mapping[str, Sequence[Drawn]], likeness: Mapping[str, Any], held_out: Sequence[Row]
) -> dict[str, Image.Image]:
    """By model, of its first way of drawing: the pictures nearest to one of the training, and their neighbours."""
    sheets = {}
    for label, ways in drawn.items():
        if not ways or not (near := likeness["ways"][ways[0].name]["neighbours"].get(label)):
            continue
        order = sorted(range(len(ways[0].paths)), key=lambda i: float(near["training_distance"][i]))[:SHOWN]
        far = [[f"{near[key][i]:.3g}" for i in order] for key in ("training_distance", "held_out_distance")]
        sheets[label] = grid(
            [
                [Image.open(ways[0].paths[i]) for i in order],
                [_opened(sight.training_rows[near["training"][i]], sight.size) for i in order],
                [_opened(held_out[near["held_out"][i]], sight.size) for i in order],
            ],
            row_labels=["drawn", "nearest that was trained on", "nearest held out"],
            captions=[[""] * len(order), *far],
            cell=min(128, sight.size),
        )
    return sheets


def _opened(row: Row, size: int) -> Image.Image:
    return ImageOps.fit(row.opened().picture, (size, size), Image.Resampling.LANCZOS)
