"""Sheets for readers who know no caption: numbered pictures in a shuffled order, the answers apart.

    python scripts/demo_readers.py base --model pixart_ft/demo/model --work ~/demo-build --out sheets
    python scripts/demo_readers.py lora --lora runs/quickstart --pictures pixart_ft/demo/pictures --out sheets

`base` draws the sixteen things of EYE_NAMES in every style (name each picture), pictures of all styles in one
shuffle (sort them by style, beside real pictures of each), and things in the one style that the base never saw them in
(name each). `lora` draws
the things of the quickstart's sheet before and after, each pair in a random order beside four real pictures (which is
the same style?), and all "after" pictures alone (name and rate each). `sheets/answers.json` has the answers: keep
it from the reader.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from demo_captions import EYE_NAMES
from demo_pictures import FAMILIAR, SHOWN_KNOWN, SHOWN_LEARNED, SHOWN_NEW, STYLES, fetch, render, styled_emoji

from pixart_ft.data.folders import read_folder
from pixart_ft.pictures.sheets import grid
from pixart_ft.sampling.text_to_image import TextToImage

BASE_SAMPLER, BASE_STEPS, BASE_GUIDANCE = "ddim", 50, 2.5  # chosen on seeds 5 and 6
LORA_SAMPLER, LORA_STEPS, LORA_GUIDANCE = "ddpm", 25, 3.0
STYLE_PICTURES = 8  # of every style in the shuffle of styles
EXAMPLE_ROWS = 3  # real pictures of every style, for the reader who sorts them
COLUMNS = 8

Named = Sequence[tuple[Image.Image, str]]  # pictures with their answers


class Sheets:
    """Writes numbered sheets into a folder, and what is on them into `answers.json`."""

    def __init__(self, out: Path, seed: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.random = out, np.random.default_rng(seed)
        self.answers: dict[str, list[str]] = {}

    def shuffled(self, name: str, pictures: Named) -> None:
        """One sheet of all pictures in a random order, numbered from 1."""
        order = self.random.permutation(len(pictures))
        chosen = [pictures[i] for i in order]
        self.answers[name] = [answer for _, answer in chosen]
        rows = [chosen[start : start + COLUMNS] for start in range(0, len(chosen), COLUMNS)]
        numbers = [str(i + 1) for i in range(len(chosen))]
        self.write(
            name,
            [[p for p, _ in row] for row in rows],
            [numbers[s : s + COLUMNS] for s in range(0, len(numbers), COLUMNS)],
        )

    def write(self, name: str, rows: Sequence[Sequence[Image.Image | None]], captions: Sequence[Sequence[str]]) -> None:
        grid(rows, captions=captions, cell=160).save(self.out / f"{name}.png", optimize=True)
        (self.out / "answers.json").write_text(json.dumps(self.answers, indent=1) + "\n")


def draw_base(model: TextToImage, captions: Sequence[str], seed: int) -> list[Image.Image]:
    return model.generate(list(captions), sampler=BASE_SAMPLER, steps=BASE_STEPS, guidance=BASE_GUIDANCE, seeds=[seed])


def draw_lora(model: TextToImage, captions: Sequence[str], seed: int) -> list[Image.Image]:
    return model.generate(list(captions), sampler=LORA_SAMPLER, steps=LORA_STEPS, guidance=LORA_GUIDANCE, seeds=[seed])


def example_sheet(sheets: Sheets, work: Path) -> None:
    """Real pictures of every style, of things that no other sheet shows."""
    places, rows = fetch(work / "npm"), []
    for style in STYLES:
        others = [e for e in styled_emoji(places, style, FAMILIAR) if e.name not in EYE_NAMES]
        chosen = sheets.random.permutation(len(others))[: EXAMPLE_ROWS * COLUMNS]
        rows.append([render(others[i], 256) for i in chosen])
    order = sheets.random.permutation(len(rows))
    letters = "ABCDE"[: len(rows)]
    sheets.answers["styles"] = [f"{letter}: {tuple(STYLES)[i]}" for letter, i in zip(letters, order, strict=True)]
    halves = [rows[i][start : start + COLUMNS] for i in order for start in range(0, len(rows[i]), COLUMNS)]
    sheets.write("styles", halves, [[letter] * COLUMNS for letter in letters for _ in range(EXAMPLE_ROWS)])


def base_sheets(sheets: Sheets, model: TextToImage, work: Path, seed: int) -> None:
    """The three questions about the base."""
    by_style: list[tuple[Image.Image, str]] = []
    for style, art in STYLES.items():
        pictures = draw_base(model, [f"{name}, {art.word}" for name in EYE_NAMES], seed)
        sheets.shuffled(f"name-{style}", list(zip(pictures, EYE_NAMES, strict=True)))
        chosen = sheets.random.permutation(len(pictures))[:STYLE_PICTURES]
        by_style += [(pictures[i], style) for i in chosen]
    sheets.shuffled("sort-styles", by_style)
    listed = [each for each in map(json.loads, (work / "held_out.jsonl").read_text().splitlines()) if each["familiar"]]
    some = [listed[i] for i in sheets.random.permutation(len(listed))[:16]]
    pictures = draw_base(model, [f"{each['name']}, {STYLES[each['style']].word}" for each in some], seed)
    sheets.shuffled("name-unseen", [(p, f"{e['name']} ({e['style']})") for p, e in zip(pictures, some, strict=True)])
    example_sheet(sheets, work)


def lora_sheets(sheets: Sheets, before: TextToImage, after: TextToImage, pictures: Path, seed: int) -> None:
    """The questions about the adapter: pairs beside four real pictures, and all of its pictures alone."""
    names = (*SHOWN_LEARNED, *SHOWN_KNOWN, *SHOWN_NEW)
    real = [row for row in read_folder(pictures / "train") if row.caption not in names]
    style = [real[i].opened().picture for i in sheets.random.permutation(len(real))[:4]]
    old, new = (draw_lora(model, names, seed) for model in (before, after))
    order, swapped = sheets.random.permutation(len(names)), sheets.random.random(len(names)) < 0.5
    sheets.answers["pairs"] = [f"{'A' if swapped[k] else 'B'}: {names[i]}" for k, i in enumerate(order)]
    pairs = [(new[i], old[i]) if swapped[k] else (old[i], new[i]) for k, i in enumerate(order)]
    rows, captions = [style], [["real"] * len(style)]
    for start in range(0, len(pairs), COLUMNS):
        chosen = pairs[start : start + COLUMNS]
        for side, letter in enumerate("AB"):
            rows.append([pair[side] for pair in chosen])
            captions.append([f"{start + k + 1} {letter}" for k in range(len(chosen))])
    sheets.write("pairs", rows, captions)
    sheets.shuffled("after", list(zip(new, names, strict=True)))
    sheets.answers["rows"] = ["upper two: before", "lower two: after"]
    halves = [row[start : start + COLUMNS] for row in (old, new) for start in range(0, len(row), COLUMNS)]
    sheets.write("rows", halves, [])  # the first half of the rows is before, at a size that can be looked at


def main() -> None:
    """Draw the sheets of one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "lora"))
    parser.add_argument("--model", default="demo", help="the base: demo, or a folder")
    parser.add_argument("--work", type=Path, help="of `base`: the folder of its build")
    parser.add_argument("--lora", help="of `lora`: the run or adapter")
    parser.add_argument("--pictures", type=Path, default=Path("pixart_ft/demo/pictures"), help="of `lora`: its set")
    parser.add_argument("--seed", type=int, default=100, help="of pictures and shuffles; settings are chosen on others")
    parser.add_argument("--out", type=Path, required=True, help="folder for the sheets and answers.json")
    asked = parser.parse_args()
    sheets, model = Sheets(asked.out, asked.seed), TextToImage.load(asked.model)
    if asked.what == "base":
        base_sheets(sheets, model, asked.work, asked.seed)
    else:
        lora_sheets(sheets, model, TextToImage.load(asked.model, lora=asked.lora), asked.pictures, asked.seed)


if __name__ == "__main__":
    main()
