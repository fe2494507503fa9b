"""Every sampler family at several numbers of network calls on the demo: a grid of pictures, and a table of distances.

    python scripts/samplers_table.py --work ~/samplers --lora runs/quickstart
    python scripts/samplers_table.py --work ~/samplers --noto ~/demo

The first compares with the fine-tuning pictures, the second, for the base alone, with the Noto pictures that it was
trained on, which `scripts/build_demo.py --work ~/demo` fetches. Each cell draws one picture for each of 48 training
captions (guidance 4.5, bfloat16) and is kept, so that the command can be repeated; some two hours a model on one core.
The distance is Frechet's, between Gaussians fitted to 16 features a picture: the mean of each of the demo VAE's 4
latent channels in each quarter of the picture. It sees colour, shade and rough layout, no meaning; it compares cells
only.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from demo_pictures import fetch, rendered, styled_emoji

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.data.folders import DEMO_PICTURES, read_folder
from pixart_ft.data.pixels import fitted, picture_pixels
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.vae import decode_to_pictures, encode_pixels
from pixart_ft.pictures.sheets import grid
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage

CALLS = (10, 25, 50, 250)
FAMILIES = ("ddpm", "ddim", "iddpm", "euler", "edm", "score_sde")
SHOWN = ("red apple", "cat face", "rocket", "mushroom")


def steps_for(sampler: str, calls: int) -> int:
    """Steps whose network calls come nearest to `calls`: Heun, and a corrector, take two but for one step."""
    return calls if SAMPLERS[sampler].calls_per_step == 1 else (calls + 1) // 2


def features(vae: torch.nn.Module, pictures: list[Image.Image]) -> np.ndarray:
    """(N, 16): the mean of each latent channel in each quarter."""
    rows = []
    for picture in pictures:
        latent = encode_pixels(vae, picture_pixels(picture, picture.size)[None])[0]
        rows.append(adaptive_avg_pool2d(latent, 2).flatten().double().numpy())
    return np.stack(rows)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians fitted to two sets of features (N, D)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def real_pictures(noto: Path | None, count: int) -> tuple[list[str], list[Image.Image], list[Image.Image]]:
    """Captions and pictures of the training set, spread over it, and as many others of it."""
    if noto is None:
        rows = read_folder(DEMO_PICTURES / "train")
        loaded = [((fitted(row.opened().picture, 256) + 1) * 127.5).round().byte() for row in rows[: 2 * count]]
        pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in loaded]
        return [row.caption for row in rows[:count]], pictures[:count], pictures[count : 2 * count]
    emojis = styled_emoji(fetch(noto / "npm"), "noto")
    everything = rendered(emojis, 256, noto / "noto-things.npy")
    order = np.random.default_rng(0).permutation(len(emojis))[: 2 * count]
    pictures = [Image.fromarray(everything[i]) for i in order]
    return [emojis[i].name for i in order[:count]], pictures[:count], pictures[count:]


def drawn(model: TextToImage, settings: Settings, captions: list[str], label: str) -> tuple[list[Image.Image], float]:
    """One picture a caption, each with its own seed, and the seconds that a picture took."""
    jobs = [(caption, seed) for seed, caption in enumerate(captions)]
    started = time.perf_counter()
    with tqdm(total=len(jobs) * (model.calls(settings) or 0), desc=label, unit=" calls", dynamic_ncols=True) as bar:
        pictures = list(model.draw(jobs, settings, batch_size=16, progress=bar.update))
    return pictures, (time.perf_counter() - started) / len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the finished cells")
    parser.add_argument("--lora", type=Path, help="run folder of the quickstart")
    parser.add_argument("--noto", type=Path, help="work folder of build_demo.py; without --lora")
    parser.add_argument("--samplers", nargs="*", default=FAMILIES, help="draw only these (to share the work out)")
    parser.add_argument("--count", type=int, default=48, help="pictures a cell")
    args = parser.parse_args()
    if (args.lora is None) == (args.noto is None):
        parser.error("give --lora or --noto")
    name = "base" if args.lora is None else "lora"
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    model = TextToImage.load("demo", lora=args.lora, dtype=torch.bfloat16)
    vae = loading.load_vae(Base.read("demo"), dtype=torch.float32)
    captions, real, others = real_pictures(args.noto, args.count)
    target = features(vae, real)
    through = [p for picture in real for p in _round_trip(vae, picture)]
    lines = [
        f"<!-- written by scripts/samplers_table.py, {args.count} pictures a cell -->",
        f"The same pictures through the VAE: {frechet(features(vae, through), target):.3f}; "
        f"as many other training pictures: {frechet(features(vae, others), target):.3f}.",
        "",
        "| sampler | " + " | ".join(f"{calls} calls" for calls in CALLS) + " | s a picture, each |",
        "|---" * (len(CALLS) + 2) + "|",
    ]
    sheet: list[list[Image.Image]] = []
    for sampler in args.samplers:
        for calls in CALLS:
            file = work / f"{sampler}-{calls}.json"
            if file.is_file():
                continue
            settings = model.settled(Settings(sampler=sampler, steps=steps_for(sampler, calls)))
            pictures, seconds = drawn(model, settings, [*captions, *SHOWN], f"{name} {sampler} {calls}")
            for caption, picture in zip(SHOWN, pictures[args.count :], strict=True):
                picture.save(work / f"{sampler}-{calls}-{caption}.png")
            distance = frechet(features(vae, pictures[: args.count]), target)
            file.write_text(json.dumps({"distance": distance, "seconds": seconds}))
    for sampler in FAMILIES:
        cells, shown = [], []
        for calls in CALLS:
            file = work / f"{sampler}-{calls}.json"
            if not file.is_file():
                print(f"{file.name} is not there yet")
                return
            cells.append(json.loads(file.read_text()))
            shown.append(_strip([Image.open(work / f"{sampler}-{calls}-{caption}.png") for caption in SHOWN]))
        numbers = " | ".join(f"{cell['distance']:.3f}" for cell in cells)
        times = ", ".join(f"{cell['seconds']:.2f}" for cell in cells)
        lines.append(f"| {SAMPLERS[sampler].title} | {numbers} | {times} |")
        sheet.append(shown)
    (work / "table.md").write_text("\n".join(lines) + "\n")
    titles = [SAMPLERS[sampler].title for sampler in FAMILIES]
    picture = grid(sheet, row_labels=titles, column_labels=[f"{calls} calls" for calls in CALLS], cell=256)
    picture.save(work / "grid.png")
    print(f"{work / 'table.md'}\n{work / 'grid.png'}")


def _round_trip(vae: torch.nn.Module, picture: Image.Image) -> list[Image.Image]:
    return decode_to_pictures(vae, encode_pixels(vae, picture_pixels(picture, picture.size)[None]))


def _strip(pictures: list[Image.Image]) -> Image.Image:
    """Four pictures as a square of two by two."""
    square = Image.new("RGB", (256, 256), "white")
    for number, picture in enumerate(pictures):
        square.paste(picture.resize((127, 127), Image.Resampling.LANCZOS), (129 * (number % 2), 129 * (number // 2)))
    return square


if __name__ == "__main__":
    main()
