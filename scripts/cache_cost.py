"""What the cache costs beside its encoders, on the demo: bytes for a caption, and time beside the bare encoders.

    python scripts/cache_cost.py [--pictures 256] [--captions 8192] [--vae real]

The demo's pictures and captions are varied to so many different ones; the long captions are twelve of the demo's
joined. Bare is the VAE or T5 alone, on pixels and tokens that are ready; cached is that with reading, checking,
decoding and hashing the pictures, and writing the shards, by one process and by two that share the work. `--vae real`
takes one with the layers of SDXL's, which is PixArt-Sigma's, and random weights. Seconds are
those of a processor's core, of the process that had more to do, so other programs do not lengthen them; on one core
nothing is gained by decoding and writing while the encoder runs, which on a GPU hides most of it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL
from PIL import Image

from pixart_ft.data.cache import ALONE, Share, cache_captions, cache_pictures, pictures_at_once
from pixart_ft.data.folders import DEMO_PICTURES, read_folder
from pixart_ft.data.pixels import Fit, fitted
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import verified
from pixart_ft.data.store import TensorStore
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.text import encode_each
from pixart_ft.model.vae import encode_moments
from tests.helpers.launched import launch

USUAL = 300 * 4096 * 2  # bytes of a caption in float16 by T5-XXL, padded


def varied(folder: Path, count: int) -> list[Row]:
    """So many different pictures with different captions."""
    rows, found = read_folder(DEMO_PICTURES / "train"), []
    for number in range(count):
        row = rows[number % len(rows)]
        picture = row.opened().picture.convert("RGB")
        picture.putpixel((0, 0), (number % 256, number // 256, 0))
        path = folder / f"{number:04d}.png"
        picture.save(path)
        found.append(Row(path, f"{row.caption}, number {number}", path.name))
    return found


def real_vae() -> AutoencoderKL:
    """One as large as PixArt-Sigma's, of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    return vae.eval().requires_grad_(False)


def seconds(work: Callable[[], object]) -> float:
    """What it takes of a core."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256, help="how many are encoded")
    parser.add_argument("--captions", type=int, default=8192, help="how many are encoded")
    parser.add_argument("--vae", choices=("demo", "real"), default="demo", help="what encodes the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base.read("demo")
    vae = real_vae() if options.vae == "real" else loading.load_vae(base, dtype=torch.float32)
    tokenizer, half = loading.load_text_encoder(base, dtype=torch.bfloat16)
    t5 = loading.load_text_encoder(base, dtype=torch.float32)[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, size = varied(folder, options.pictures), base.native_size
        captions = [f"{rows[number % 16].caption}, number {number}" for number in range(options.captions)]
        digests = [found.digest for found in verified(rows)]

        demo = [row.caption for row in read_folder(DEMO_PICTURES / "train")]
        for words, texts in (
            ("the demo's captions", demo),
            ("long captions", [", ".join((demo[at:] + demo[:at])[:12]) for at in range(9)]),
        ):
            store = TensorStore(folder / words)
            keys = cache_captions(
                store, texts, load_text_encoder=lambda: (tokenizer, half), encoder_id="t5", progress=False
            )
            held = store.held(keys)
            tokens = sum(len(held[at]) for at in range(len(held))) / len(held)
            disk = sum(path.stat().st_size for path in store.folder.iterdir()) / len(set(keys))
            real = tokens * 4096 * 2
            print(f"{words}: {tokens:.1f} tokens of {held[0].shape[1]} numbers, {disk:,.0f} bytes each with all around")
            print(f"  by T5-XXL {real:,.0f} bytes, 1/{USUAL / real:.0f} of the usual {USUAL:,}", flush=True)

        def of_pictures(store: TensorStore, share: Share) -> None:
            cache_pictures(
                store,
                rows,
                load_vae=lambda: vae,
                vae_id="vae",
                views=[[Fit((size, size))]] * len(rows),
                digests=digests,
                share=share,
                progress=False,
            )

        def of_captions(store: TensorStore, share: Share) -> None:
            cache_captions(
                store, captions, load_text_encoder=lambda: (tokenizer, t5), encoder_id="t5", share=share, progress=False
            )

        at_once = pictures_at_once((size, size))
        pixels = torch.stack([fitted(Image.open(str(row.where)).convert("RGB"), size) for row in rows])
        bare = {
            "pictures": lambda: [encode_moments(vae, part) for part in pixels.split(at_once)],
            "captions": lambda: list(encode_each(t5, tokenizer, captions)),
        }
        for name, work in (("pictures", of_pictures), ("captions", of_captions)):
            count = vars(options)[name]
            alone = seconds(bare[name])
            one = seconds(lambda: work(TensorStore(folder / f"{name} 1"), ALONE))  # noqa: B023

            def body(rank: int) -> None:
                torch.set_num_threads(1)
                took = seconds(lambda: work(TensorStore(folder / f"{name} 2"), (rank, 2)))  # noqa: B023
                (folder / f"{rank}.json").write_text(json.dumps(took))

            print(f"{count} {name}: bare {alone:.2f} s; cached by one process {one:.2f} s, ", end="")
            print(f"{alone / one:.0%} of its speed", flush=True)
            launched = launch(body, folder)
            assert launched.end(within=7200) == [0, 0], launched.said(0) + launched.said(1)
            two = max(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
            print(f"  by two processes {two:.2f} s each, {alone / 2 / two:.0%} of the speed of two", flush=True)


if __name__ == "__main__":
    main()
