"""The same picture by several samplers and numbers of steps, side by side, with what each cost."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.samplers import EVERY_SAMPLER
from pixart_ft.config.text import numbered
from pixart_ft.errors import UserError
from pixart_ft.pictures.own import not_there_yet
from pixart_ft.pictures.sheets import grid, save_png
from pixart_ft.sampling.settings import Abilities, Settings, settled
from pixart_ft.sampling.text_to_image import TextToImage

Cells = dict[tuple[str, int], Settings]  # by sampler and number of steps


def settled_cells(config: GenerateConfig, settings: Settings, abilities: Abilities, adapter: str | None) -> Cells:
    """The settings of each cell: `settings`, which all share, with its sampler and steps.

    Raises UserError naming every cell that the model cannot draw; needs no weights.
    """
    cells: Cells = {}
    faults = []
    for name in config.compare_samplers:
        for steps in config.compare_steps:
            try:
                cell = replace(settings, sampler=name, steps=steps, options={})
                cells[name, steps] = settled(cell, abilities, adapter)
            except UserError as error:
                faults.append(f"{name} with {steps} steps: {error}")
    if faults:
        raise UserError("\n".join([*faults, "leave these out of compare_samplers or compare_steps"]))
    return cells


def comparison_sheets(config: GenerateConfig, prompts: Sequence[str]) -> list[Path]:
    """Where the sheet of each prompt is written."""
    return [config.out / f"compare-{number:03d}.png" for number in range(len(prompts))]


def run_comparison(config: GenerateConfig, model: TextToImage, prompts: Sequence[str], cells: Cells) -> list[Path]:
    """One sheet a prompt, `compare_samplers` down and `compare_steps` across; returns their paths.

    Below each cell are its network calls (guidance's second branch not counted) and its seconds, decoding included.
    Raises UserError, before drawing, where a sheet is there by another recipe, or none.
    """
    first = next(iter(cells.values()))
    paths = comparison_sheets(config, prompts)
    axes = {"sampler": list(config.compare_samplers), "steps": list(config.compare_steps), "options": {}}
    recipes = [model.recipe(prompt, config.seed, first) | axes for prompt in prompts]
    not_there_yet(dict(zip(paths, recipes, strict=True)))  # one of the same recipe is measured anew
    list(model.draw([(prompts[0], config.seed)], replace(first, steps=1)))  # warms up
    calls = {key: model.calls(cell) or 0 for key, cell in cells.items()}
    with tqdm(total=len(prompts) * sum(calls.values()), desc="comparing", unit=" calls", dynamic_ncols=True) as bar:
        for number, prompt in enumerate(prompts):
            pictures: dict[tuple[str, int], Image.Image] = {}
            captions: dict[tuple[str, int], str] = {}
            for key, cell in cells.items():
                started = time.perf_counter()
                (pictures[key],) = model.draw([(prompt, config.seed)], cell, progress=bar.update)
                captions[key] = f"{calls[key]} calls, {time.perf_counter() - started:.1f} s"
            sheet = grid(
                [[pictures[name, steps] for steps in config.compare_steps] for name in config.compare_samplers],
                title=prompt,
                row_labels=[EVERY_SAMPLER[name].title for name in config.compare_samplers],
                column_labels=[numbered(str(steps), "step") for steps in config.compare_steps],
                captions=[
                    [captions[name, steps] for steps in config.compare_steps] for name in config.compare_samplers
                ],
                cell=min(256, max(first.width or 0, first.height or 0)),
            )
            save_png(sheet, paths[number], recipes[number])
            bar.write(f"{prompt}: {paths[number]}")
    return paths
