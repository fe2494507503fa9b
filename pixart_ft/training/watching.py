"""What is measured and drawn while a run trains: the loss of held-out pictures, a grid of fixed prompts.

It reads the run and writes into its folder; nothing of it changes the course.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from pixart_ft.evaluation.held_out import (
    Estimate,
    HeldOutSet,
    evaluating,
    held_out_loss,
    mean_over_pictures,
    paired_difference,
)
from pixart_ft.evaluation.objective import Objective
from pixart_ft.files import write_folder
from pixart_ft.pictures.sheets import Sample, picture_name, sample_sheet, save_png
from pixart_ft.runs.folder import RunFolder
from pixart_ft.training.ema import Ema
from pixart_ft.training.records import Progress, Records


@dataclass(frozen=True)
class Comparison:
    """Held-out losses by term before and after, and the change of each picture's.

    since   the optimizer step of "before": 0 unless the comparison began anew
    """

    since: int
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    change: dict[str, Estimate]


class Watch:
    """Measures and draws with the averaged weights, on the main process; modes and random state stay as they were."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        transformer: Module,
        objective: Objective,
        ema: Ema,
        folder: RunFolder,
        records: Records,
        batch_size: int,
        held_out: Sequence[HeldOutSet],
        measure_raw: bool,
        draw_samples: Callable[[], list[Sample]] | None,
    ) -> None:
        """`measure_raw`: the held-out loss of the weights that are trained too, beside that of their average."""
        self.accelerator, self.transformer, self.objective, self.ema = accelerator, transformer, objective, ema
        self.folder, self.records, self.batch_size = folder, records, batch_size
        self.held_out, self.measure_raw, self.draw_samples = held_out, measure_raw, draw_samples
        self.since = 0  # the step of what the end is compared with
        self.before: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def begin_anew(self, progress: Progress, why: Sequence[str]) -> None:
        """Compare with this step from now on; the log says why."""
        self.since, self.before = progress.step, {}
        self.records.begins_anew(progress, why)

    def measure(self, progress: Progress) -> None:
        """The held-out loss, into the log; the first one is what later ones are compared with."""
        if not self.held_out or not self.accelerator.is_main_process:
            return
        with self.ema.applied():
            self.last = self._losses()
        self.before = self.before or self.last
        found = {"held_out": self.last} | ({"held_out_raw": self._losses()} if self.measure_raw else {})
        over = {"interval": self.objective.interval} if self.objective.where else {}
        self.records.held_out(progress, {key: _means(losses) for key, losses in found.items()}, over)

    def _losses(self) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            found = [
                held_out_loss(
                    self.transformer, self.objective, part, batch_size=self.batch_size, device=self.accelerator.device
                )
                for part in self.held_out
            ]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def has_drawn(self, step: int) -> bool:
        """Whether the sample grid of this step is there."""
        return self.folder.samples_at(step).is_dir()

    def draw(self, progress: Progress) -> None:
        """Pictures of the fixed prompts, into samples/step-XXXXXX/, and beside it a labelled sheet of them."""
        if self.draw_samples is None or not self.accelerator.is_main_process:
            return
        with self.ema.applied(), evaluating(self.transformer):
            samples = self.draw_samples()
        about = {"run": self.folder.path.name, "step": progress.step}

        def write(folder: Path) -> None:
            for number, sample in enumerate(samples):
                name = picture_name(f"{number:04d}", sample.prompt, sample.seed)
                save_png(sample.picture, folder / name, {"prompt": sample.prompt, "seed": sample.seed, **about})

        pictures = self.folder.samples_at(progress.step)
        sheet = sample_sheet(samples, f"{self.folder.path.name}, step {progress.step}")
        save_png(sheet, pictures.with_suffix(".png"), about)
        write_folder(pictures, write)  # last: it tells that all is there
        self.records.samples(progress, sheet)

    def comparison(self) -> Comparison:
        """The last held-out loss against the first."""
        return Comparison(
            since=self.since,
            before={name: mean_over_pictures(values) for name, values in self.before.items()},
            after={name: mean_over_pictures(values) for name, values in self.last.items()},
            change={name: paired_difference(self.before[name], self.last[name]) for name in self.last},
        )


def _means(losses: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    return {name: vars(mean_over_pictures(values)) for name, values in losses.items()}
