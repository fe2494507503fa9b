"""Pictures for the report: the same prompts and seeds by every model and sampler, each kept with its recipe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError
from pixart_ft.pictures.own import not_there_yet
from pixart_ft.pictures.sheets import grid, picture_name, save_png
from pixart_ft.sampling.settings import Abilities, Settings, settled
from pixart_ft.sampling.text_to_image import TextToImage


@dataclass(frozen=True)
class Drawn:
    """Pictures of one model by one sampler: of every prompt, its seeds."""

    settings: Settings
    calls: int | None  # of the network for each, guidance's second branch not counted
    paths: Sequence[Path]

    @property
    def name(self) -> str:
        """How they were drawn."""
        return f"{self.settings.sampler}, {self.settings.steps} steps"


def settings_of(config: EvaluateConfig, abilities: Abilities, name: str) -> tuple[list[Settings], list[str]]:
    """How a model draws, by each sampler with each number of steps; and why not, where it cannot."""
    found, faults = [], []
    for sampler in config.samplers:
        for steps in config.steps:
            asked = Settings(sampler, steps, config.guidance, width=config.size, height=config.size)
            try:
                found.append(settled(asked, abilities, name))
            except UserError as error:
                faults.append(f"not drawn by {sampler} in {steps} steps: {error}")
    return found, faults


def planned(
    model: TextToImage, ways: Sequence[Settings], jobs: Sequence[tuple[str, int]], folder: Path
) -> list[dict[Path, dict[str, object]]]:
    """For each way to draw the (prompt, seed) pairs, where each picture goes, and its recipe.

    Raises UserError where another recipe made what is there.
    """
    plans = []
    for settings in ways:
        place, shared = folder / f"{settings.sampler}-{settings.steps}", model.circumstances(settings)
        plans.append(
            {
                place / picture_name(f"{number:04d}", prompt, seed): {"prompt": prompt, "seed": seed} | shared
                for number, (prompt, seed) in enumerate(jobs)
            }
        )
    not_there_yet({path: recipe for plan in plans for path, recipe in plan.items()})
    return plans


def draw(
    model: TextToImage,
    ways: Sequence[Settings],
    jobs: Sequence[tuple[str, int]],
    plans: Sequence[Mapping[Path, Mapping[str, object]]],
    *,
    batch_size: int,
    part: slice,
) -> list[Drawn]:
    """Draw the pairs in each way as `planned`; a picture that is there is kept.

    part   of the pictures that this process draws; what is returned names all
    """
    found = []
    for settings, recipes in zip(ways, plans, strict=True):
        paths = list(recipes)
        todo = {path: job for path, job in zip(paths[part], jobs[part], strict=True) if not path.exists()}
        with model.progress_bar(len(todo), settings, show=bool(todo)) as bar:
            pictures = model.draw(list(todo.values()), settings, batch_size=batch_size, progress=bar.update)
            for path, picture in zip(todo, pictures, strict=True):
                save_png(picture, path, recipes[path])
        found.append(Drawn(settings, model.calls(settings), paths))
    return found


SHOWN = 8  # prompts on a sheet


def side_by_side(
    drawn: Mapping[str, Sequence[Drawn]], prompts: Sequence[str], each: int, real: Sequence[Row]
) -> dict[str, Image.Image]:
    """By the name of each way to draw, a sheet of the first prompts: a column for every model, the last of real ones.

    each   pictures of a prompt, the first of which is shown; real: a row for each prompt, or none
    """
    ways = {way.name: way.settings for ways in drawn.values() for way in ways}
    shown = prompts[:SHOWN]
    sheets = {}
    for name, settings in ways.items():
        of_model = {label: way for label, some in drawn.items() for way in some if way.name == name}
        columns: list[list[Image.Image]] = [
            [Image.open(path) for path in way.paths[: len(shown) * each : each]] for way in of_model.values()
        ]
        size = (settings.width or 0, settings.height or 0)
        columns += [[ImageOps.fit(row.opened().picture, size) for row in real[: len(shown)]]] if real else []
        sheets[name] = grid(
            [list(row) for row in zip(*columns, strict=True)],
            row_labels=shown,
            column_labels=[*of_model, *(["real"] if real else [])],
            cell=min(192, max(size)),
        )
    return sheets


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.@+-]+", "-", label)
