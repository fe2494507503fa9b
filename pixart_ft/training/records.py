"""What a run writes down as it goes: windows of losses, and the records of its log and its trackers."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pixart_ft.runs.log import RunLog
from pixart_ft.training.step_numbers import StepNumbers
from pixart_ft.training.trackers import show_sheet

QUARTILES = 4
_SHOWN = 4  # pictures in a warning; the log has all


class LossWindow:
    """Sums of every term since the last log line, whole and by quartile of t; part of the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, terms: Mapping[str, Tensor], t: Tensor, weight: Tensor, num_steps: int) -> None:
        """Add per-sample terms (N,), times the weights (N,) that undo the law of their t (N,), all on the CPU."""
        quartile = t * QUARTILES // num_steps
        for name, values in terms.items():
            sums = self.sums.setdefault(name, [0.0] * (2 * QUARTILES + 1))
            for q in range(QUARTILES):
                sums[q] += values[quartile == q].double().sum().item()
                sums[QUARTILES + q] += weight[quartile == q].double().sum().item()
            sums[-1] += len(values)

    def means(self) -> dict[str, float]:
        """`name` and `name_q1`..`name_q4` (q1 has the least noise); a quartile nobody visited is left out.

        A quartile is divided by its weights, since importance sampling does not visit it every fourth time.
        """
        out = {}
        for name, sums in self.sums.items():
            totals, weights, count = sums[:QUARTILES], sums[QUARTILES:-1], sums[-1]
            out[name] = sum(totals) / count
            out |= {f"{name}_q{q + 1}": totals[q] / weights[q] for q in range(QUARTILES) if weights[q]}
        return out


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, pictures seen."""

    step: int
    samples: int


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken, since its loss or its gradient is not finite.

    what             loss, or gradient where every loss is finite
    draws, pictures  those whose loss is not finite, by draw index and name; else all of the step
    layer            the first parameter on the way back through the network whose gradient is not finite
    """

    what: Literal["loss", "gradient"]
    draws: list[int]
    pictures: list[str]
    layer: str | None

    @classmethod
    def of(cls, met: StepNumbers, draws: range, name_of: Callable[[int], str], weights: Iterable[str]) -> Self:
        """From what a step met: its draw indices, the name of a draw's picture, the trained weights by name."""
        losses = torch.cat([each.terms["loss"] for each in met.micro_batches]).tolist()
        bad = [draw for draw, loss in zip(draws, losses, strict=True) if not math.isfinite(loss)]
        layers = [name for name, good in zip(weights, met.norms.isfinite().tolist(), strict=True) if not good]
        return cls(
            what="loss" if bad else "gradient",
            draws=bad or [*draws],
            pictures=[name_of(draw) for draw in bad or draws],
            layer=layers[-1] if layers else None,
        )

    def __str__(self) -> str:
        shown = ", ".join(self.pictures[:_SHOWN]) + (", ..." if len(self.pictures) > _SHOWN else "")
        layer = f" (first in {self.layer})" if self.layer else ""
        return f"the {self.what} of {shown} is not finite{layer}"


class Records:
    """The lines of a run's log, and the points and pictures of its trackers, of which there may be none.

    Written by the main process alone; on the others nothing is written.
    """

    def __init__(self, log: RunLog, accelerator: Accelerator) -> None:
        self.log, self.accelerator = log, accelerator

    def train(
        self,
        progress: Progress,
        losses: Mapping[str, float],
        facts: Mapping[str, float],
        speed: Mapping[str, float],
    ) -> None:
        """The mean losses of a window, what else is known of its last step, and how fast its steps were.

        What is not finite, of a step that was skipped, is left out: JSON has no word for it.
        """
        losses, facts = ({name: x for name, x in given.items() if math.isfinite(x)} for given in (losses, facts))
        self._append(progress, {"train": losses, **facts, "speed": {name: round(x, 4) for name, x in speed.items()}})
        points = {f"train/{name}": loss for name, loss in losses.items()}
        points |= {f"speed/{name}": value for name, value in speed.items()}
        self.accelerator.log({**points, **facts}, step=progress.step)

    def skipped(self, progress: Progress, skipped: Skipped, *, warn: bool) -> None:
        """A step that was not taken, into the log, and if asked as a warning."""
        self._append(progress, {"skipped": vars(skipped)})
        if warn and self.accelerator.is_main_process:
            warnings.warn(f"step {progress.step} was skipped: {skipped}", stacklevel=2)

    def held_out(
        self,
        progress: Progress,
        losses: Mapping[str, Mapping[str, Mapping[str, float]]],
        over: Mapping[str, object],
    ) -> None:
        """The mean and standard error of each held-out loss, by the key of the log for the weights that gave them.

        A line of the log only once for each step. over: what of the process they are measured over, unless all.
        """
        if not self.has_held_out(progress.step):
            self._append(progress, {**losses, **over})
        points = {f"{key}/{name}": loss["mean"] for key, found in losses.items() for name, loss in found.items()}
        self.accelerator.log(points, step=progress.step)

    def has_held_out(self, step: int) -> bool:
        """Whether the log has the held-out loss of this step."""
        return any("held_out" in record and record["step"] == step for record in self.log.comparable())

    def begins_anew(self, progress: Progress, why: Sequence[str]) -> None:
        """From here on the held-out losses cannot be compared with those before."""
        self._append(progress, {"begins_anew": list(why)})

    def samples(self, progress: Progress, sheet: Image.Image) -> None:
        """A sheet of pictures, to the trackers."""
        show_sheet(self.accelerator, sheet, progress.step)

    def _append(self, progress: Progress, facts: Mapping[str, object]) -> None:
        if self.accelerator.is_main_process:
            self.log.append(vars(progress), facts)
