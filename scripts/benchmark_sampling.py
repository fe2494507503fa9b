"""Time per picture of our pipeline against diffusers' own: same process, scheduler, seed and prompt, runs in turn.

    python scripts/benchmark_sampling.py demo --steps 25 --runs 7
    python scripts/benchmark_sampling.py FOLDER --steps 3 --runs 3 --prompt-words 60

FOLDER is a diffusers PixArt-Sigma, such as the random-weight XL/2-512 that `scripts/real_size.py` builds. A run goes
from the prompt to the decoded picture with DDIM (diffusers' scheduler in both) and guidance 4.5. Prints the medians, in
float32 and under bfloat16 autocast, and how far the latents are apart. --attention and --compile are for ours alone.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft.model.attention import KERNELS, Kernels, use_kernels
from pixart_ft.model.place import resolve_base
from pixart_ft.model.repeated import compile_blocks
from pixart_ft.model.vae import decode_to_pictures
from pixart_ft.sampling.pipeline import PixArtPipeline

Draw = Callable[[], Tensor]


def timed(draw: Draw, half: bool) -> tuple[float, Tensor]:
    """Seconds of one picture, and its latents."""
    started = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
        latents = draw()
    return time.perf_counter() - started, latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='"demo" or a folder')
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-words", type=int, default=3, help="length of the prompt")
    parser.add_argument("--attention", choices=list(KERNELS), default="by_shape", help="kernels of ours")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = resolve_base(args.model)
    stock = PixArtSigmaPipeline.from_pretrained(folder)
    stock.scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False
    )
    own = copy.deepcopy(stock.transformer)
    use_kernels(own, Kernels(args.attention, args.attention))
    if args.compile:
        compile_blocks(own)
    ours = PixArtPipeline(**stock.components | {"transformer": own})
    side = stock.transformer.config.sample_size * stock.vae_scale_factor
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    prompt = " ".join((["red", "apple", "cat", "face", "rocket", "teddy", "bear", "book"] * 40)[: args.prompt_words])

    def draw_stock() -> Tensor:
        latents: Tensor = stock(
            prompt,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
            clean_caption=False,
            use_resolution_binning=False,
            height=side,
            width=side,
            output_type="latent",
        ).images
        decode_to_pictures(stock.vae, latents)
        return latents

    def draw_ours() -> Tensor:
        latents: Tensor = ours(
            prompt,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]
        decode_to_pictures(ours.vae, latents)
        return latents

    for half in (False, True):
        seconds: dict[str, list[float]] = {"stock": [], "ours": []}
        latents: dict[str, Tensor] = {}
        for run in range(args.runs + 1):  # the first warms up
            for name, draw in (("stock", draw_stock), ("ours", draw_ours)):
                took, latents[name] = timed(draw, half)
                if run:
                    seconds[name].append(took)
        apart = (latents["ours"] - latents["stock"]).abs().max() / latents["stock"].abs().max()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(
            f"{args.model}, {side} pixels, {args.steps} steps, {'bfloat16 autocast' if half else 'float32'}: "
            f"stock {medians['stock']:.2f} s, ours {medians['ours']:.2f} s a picture "
            f"(medians of {args.runs} runs in turn; ratio {medians['ours'] / medians['stock']:.3f}); "
            f"latents apart by {apart:.1e} of the largest",
            flush=True,
        )


if __name__ == "__main__":
    main()
