"""The demo's pictures by each reading of its variance, and by DDIM, at equal network calls: docs/samplers.md.

    python scripts/variance_pictures.py --out docs/pictures/variance.png

Eight rows of six pictures of 10 and 25 steps: half a minute on two cores.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft.config.train import load_config
from pixart_ft.pictures.sheets import grid, save_png
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage

STEPS, COLUMNS = (10, 25), 6
ROWS: tuple[tuple[str, dict[str, object]], ...] = (
    ("iddpm", {"variance": "learned_range"}),
    ("iddpm", {"variance": "learned"}),
    ("ddpm", {"variance": "beta"}),
    ("ddim", {}),
)


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=1, help="of every picture")
    asked = parser.parse_args()
    choice = load_config("quickstart").validation
    prompts, model = list(choice.prompts[:COLUMNS]), TextToImage.load("demo")
    cells = [
        model.settled(Settings(sampler=sampler, steps=steps, guidance=choice.guidance, options=options))
        for steps in STEPS
        for sampler, options in ROWS
    ]
    jobs = [(prompt, asked.seed) for prompt in prompts]
    with tqdm(total=len(jobs) * sum(model.calls(cell) or 0 for cell in cells), unit=" calls") as bar:
        rows = [list(model.draw(jobs, cell, batch_size=len(jobs), progress=bar.update)) for cell in cells]
    labels = [" ".join([f"{cell.steps} steps,", cell.sampler, str(cell.options.get("variance", ""))]) for cell in cells]
    sheet = grid(rows, title="Variances on few steps", row_labels=labels, column_labels=prompts, cell=160)
    about = model.circumstances(cells[0]) | {"seed": asked.seed, "pictures": prompts, "rows": labels}
    save_png(sheet, asked.out, about)


if __name__ == "__main__":
    main()
