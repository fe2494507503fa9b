"""What an adapter buys in a part of the timesteps: a sheet, rows of intervals, columns of things.

    pixart-ft train --config quickstart
    python scripts/interval_picture.py --lora runs/quickstart --out docs/pictures/interval.png

Five rows of eight pictures of 30 DDIM steps: four minutes on one core.
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

ROWS = {"all": (0, 1000), "below 600": (0, 600), "below 800": (0, 800), "above 600": (600, 1000)}
COLUMNS = 8


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, help="adapter folder, run folder, or RUN@STEP of the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=1, help="of every picture; the run's own grids have 0")
    parser.add_argument("--prompt", action="append", help="a column; the first of the quickstart's prompts by default")
    asked = parser.parse_args()
    choice = load_config("quickstart").validation
    prompts = asked.prompt or list(choice.prompts[:COLUMNS])
    bare, model = TextToImage.load("demo"), TextToImage.load("demo", lora=asked.lora)
    settings = model.settled(Settings(guidance=choice.guidance))
    about = model.circumstances(settings) | {"seed": asked.seed, "pictures": prompts, "intervals": ROWS}
    jobs = [(prompt, asked.seed) for prompt in prompts]
    with tqdm(total=(len(ROWS) + 1) * len(jobs) * (model.calls(settings) or 0), unit=" calls") as bar:
        rows = [list(bare.draw(jobs, settings, progress=bar.update))]
        for interval in ROWS.values():
            model.set_lora_interval(interval)
            rows.append(list(model.draw(jobs, settings, progress=bar.update)))
    labels = ["base alone", *ROWS]
    sheet = grid(
        rows, title="The adapter at a part of the timesteps", row_labels=labels, column_labels=prompts, cell=160
    )
    save_png(sheet, asked.out, about)


if __name__ == "__main__":
    main()
