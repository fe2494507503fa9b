"""What a run leaves, adapters or models: one for each sample step and for the lowest held-out loss, then the last.

A checkpoint is for resuming and holds the optimizer's state too; these are what one draws with.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.config.train import Weights
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.metadata import AdapterMetadata
from pixart_ft.runs.results import final
from pixart_ft.training.ema import Ema
from pixart_ft.training.kinds import Kind
from pixart_ft.training.records import Progress


def lowest_step(records: Iterable[Mapping[str, Any]]) -> int | None:
    """The step after the first one with the lowest held-out loss in these records of the log; None without any."""
    losses = {record["step"]: record["held_out"]["loss"]["mean"] for record in records if "held_out" in record}
    finite = [(loss, step) for step, loss in losses.items() if step > 0 and math.isfinite(loss)]
    return min(finite)[1] if finite else None


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Saves what is trained into the run's folder; `metadata` lacks only what depends on the step."""

    kind: Kind
    folder: RunFolder
    transformer: PixArtTransformer2DModel
    ema: Ema
    metadata: AdapterMetadata
    null_caption: Tensor
    samples_every: int  # steps between sample grids; 0: none
    most: int  # models of sample steps that stay, the newest, the last among them; adapters, which are small, all stay
    last_step: int  # whose weights are the result, and not kept beside it

    def on_the_way(self, progress: Progress) -> None:
        """Keep the averaged weights if this step is one of samples, or has the lowest held-out loss so far.

        The lowest before it goes then, unless it is a step of samples: one more than there are samples stays.
        """
        lowest = lowest_step(self.folder.log.comparable())
        folder = self.folder.kept_at(self.kind.what, progress.step)
        oldest = progress.step - self.most * self.samples_every if self.kind.what == "model" else 0
        if 0 < progress.step < self.last_step and self._is_kept(progress.step, lowest, oldest) and not folder.is_dir():
            self._save(folder, progress)
        self.folder.drop_kept(self.kind.what, lambda step: not self._is_kept(step, lowest, oldest))

    def at_the_end(self, progress: Progress) -> None:
        """Save the averaged weights where the run has them, such as `final/adapter`, and then the last, its `_raw`."""
        main, beside = (self.folder.path / name for name in final(self.kind.what).values())
        self._save(main, progress)
        if self.ema.is_on:
            self._save(beside, progress, raw=True)

    def _is_kept(self, step: int, lowest: int | None, oldest: int) -> bool:
        is_sampled = self.samples_every > 0 and step % self.samples_every == 0 and step > oldest
        return is_sampled or step == lowest

    def _save(self, folder: Path, progress: Progress, *, raw: bool = False) -> None:
        state = None if raw else self.ema.weights
        weights: Weights = "raw" if state is None else "ema"
        described = replace(self.metadata, weights=weights, step=progress.step, samples_seen=progress.samples)
        self.kind.save(folder, self.transformer, described, self.null_caption, state)
