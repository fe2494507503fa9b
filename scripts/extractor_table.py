"""What the demo's feature extractor sees: the table of docs/evaluation.md.

    python scripts/extractor_table.py

The demo's held-out pictures, spoiled more and more, against those of its training set: half a minute of one core. The
ways to spoil them are not those that `scripts/build_extractor.py` trains on: Pillow's blur, rounded noise, HSV's hues,
the demo's own VAE with noise in the latents, pictures of other things.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from demo_vae import to_pixels, turn_hue
from diffusers import AutoencoderKL

from pixart_ft.data.folders import picture_folder, read_folder
from pixart_ft.evaluation.features import Extractor
from pixart_ft.evaluation.held_out import mean_over_pictures
from pixart_ft.evaluation.metrics import frechet_distance, kid
from pixart_ft.model.place import DEMO_FOLDER
from pixart_ft.model.vae import decode_to_pictures, encode_pixels

Pictures = list[Image.Image]
HALVES = 20  # random splits of the training set in two, which differ by chance alone


def blurred(pictures: Pictures, sigma: float) -> Pictures:
    return [picture.filter(ImageFilter.GaussianBlur(sigma)) for picture in pictures]


def noisy(pictures: Pictures, std: float) -> Pictures:
    """With noise of `std` of 255, the same for every strength but for its size."""
    noise = np.random.default_rng(0)
    spoiled = [np.asarray(picture) + std * noise.standard_normal((*picture.size[::-1], 3)) for picture in pictures]
    return [Image.fromarray(each.round().clip(0, 255).astype(np.uint8)) for each in spoiled]


def turned(pictures: Pictures, degrees: float) -> Pictures:
    return [Image.fromarray(turn_hue(np.asarray(picture), degrees)) for picture in pictures]


def mottled(pictures: Pictures, std: float) -> Pictures:
    """Through the demo's VAE, with noise of `std` of a latent's own."""
    vae = AutoencoderKL.from_pretrained(str(DEMO_FOLDER / "vae")).eval()
    noise, spoiled = torch.Generator().manual_seed(0), []
    for picture in pictures:  # one at a time: memory
        latents = encode_pixels(vae, to_pixels(np.asarray(picture)[None]))
        spoiled += decode_to_pictures(vae, latents + std * torch.randn(latents.shape, generator=noise))
    return spoiled


def of_other_things(pictures: Pictures, share: float) -> Pictures:
    """The first `share` of the pictures are clocks: things of the set, but of too few kinds."""
    rows = [row for row in read_folder(picture_folder("demo", "train")) if row.caption.endswith(("o’clock", "thirty"))]
    others = [row.opened().picture for row in rows]
    count = round(share * len(pictures))
    return [others[i % len(others)] for i in range(count)] + pictures[count:]


SPOILED: dict[str, tuple[Callable[[Pictures, float], Pictures], str, tuple[float, ...]]] = {
    "blur": (blurred, "pixels of 256", (0.5, 1, 2, 4)),
    "noise": (noisy, "of 255", (4, 8, 16, 32)),
    "mottling: the VAE, noise in its latents": (mottled, "of a latent's deviation", (0, 0.2, 0.4, 0.8)),
    "turned hue": (turned, "degrees", (15, 30, 60, 120)),
    "wrong thing": (of_other_things, "share of the pictures", (0.125, 0.25, 0.5, 1)),
}


def read(part: str) -> Pictures:
    return [row.opened().picture for row in read_folder(picture_folder("demo", part))]


def distances(extractor: Extractor, damage: str, real: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each strength: in words, and the values of fd and kid between the spoiled held-out pictures and `real`."""
    spoil, unit, strengths = SPOILED[damage]
    pictures = read("held_out")
    for strength in strengths:
        seen = extractor.of_pictures(spoil(pictures, strength))
        yield f"{strength:g} {unit}", frechet_distance(seen, real), kid(seen, real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extractor", default="demo", help="another one's folder or Hub id")
    extractor = Extractor.load(parser.parse_args().extractor, "extractor")
    real, clean = (extractor.of_pictures(read(part)) for part in ("train", "held_out"))
    print("| damage | strength | Frechet distance | KID |\n|---|---|---|---|")
    halves = [torch.randperm(len(real), generator=torch.Generator().manual_seed(i)).chunk(2) for i in range(HALVES)]
    chance = [[metric(real[a], real[b]).mean().item() for a, b in halves] for metric in (frechet_distance, kid)]
    spans = [f"{min(found):.3g} to {max(found):.3g}" for found in chance]
    print(f"| none: {HALVES} splits of the training set in two | | {spans[0]} | {spans[1]} |")
    print_row("none: held out against training", "", frechet_distance(clean, real), kid(clean, real))
    for damage in SPOILED:
        for strength, *values in distances(extractor, damage, real):
            print_row(damage, strength, *values)


def print_row(damage: str, strength: str, *values: Tensor) -> None:
    cells = [f"{found.mean:.3g} ± {found.standard_error:.2g}" for found in map(mean_over_pictures, values)]
    print(f"| {damage} | {strength} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
