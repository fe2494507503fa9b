"""The real size on this machine: PixArt-Sigma-XL/2-512 with random weights, two LoRA steps, save, reload, one sample.

    python scripts/real_size.py --work /tmp/real-size

builds a 610,856,096-parameter transformer in the standard folder layout (1.2 GB in bfloat16) beside the demo's VAE and
a one-layer T5 of the real width, draws a few random pictures, and runs the same two commands a user would: `train`
with configs/lora_512.yaml and `generate` with its adapter. Prints seconds per step and the peak memory. It shows that
the real architecture goes through; random weights draw nothing.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import AutoTokenizer, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft.cli import main as pixart_ft
from pixart_ft.model.place import DEMO_FOLDER


def build_model(folder: Path, side: int = 512) -> None:
    """PixArt-Sigma-XL-2-512-MS's own configuration, or another side's, weights drawn at random."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = PixArtTransformer2DModel(
        sample_size=side // 8,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        cross_attention_dim=1152,
        caption_channels=4096,
        interpolation_scale=side // 512,
        use_additional_conditions=False,
    )
    torch.set_default_dtype(torch.float32)
    print(f"transformer: {sum(p.numel() for p in transformer.parameters()):,} parameters")
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_FOLDER / "tokenizer"))
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=4096,
            d_kv=64,
            d_ff=1024,
            num_layers=1,
            num_heads=8,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=AutoencoderKL.from_pretrained(str(DEMO_FOLDER / "vae")),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(str(folder))


def build_pictures(folder: Path, count: int = 4, side: int = 512) -> None:
    """Random pictures of this side, pixels, with captions of some 60 words."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["red", "apple", "cat", "face", "rocket", "teddy", "bear", "snowman", "green", "book", "light", "bulb"]
    rows = []
    for number in range(count):
        noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": " ".join(random.choice(words, 60))})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, the pictures and the run")
    parser.add_argument("--steps", type=int, default=2, help="LoRA steps")
    args = parser.parse_args()
    model, pictures, run = args.work / "model", args.work / "pictures", args.work / "run"
    if not (model / "model_index.json").is_file():
        build_model(model)
    if not pictures.is_dir():
        build_pictures(pictures)
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(args.work / "drawn", ignore_errors=True)

    options = {
        "run.folder": run,
        "model.base": model,
        "model.gradient_checkpointing": "false",
        "data.folder": pictures,
        "data.held_out_fraction": 0,
        "data.cache": args.work / "cache",
        "optim.warmup_steps": 0,
        "train.steps": args.steps,
        "train.batch_size": 1,
        "logging.every": 1,
    }
    began = time.monotonic()
    code = pixart_ft(["train", "--config", "lora_512", *(f"--{key}={value}" for key, value in options.items())])
    if code:
        return code
    took = time.monotonic() - began
    times = [json.loads(line)["time"] for line in (run / "log.jsonl").read_text().splitlines()]
    print(f"training: {took:.0f} s in all, {times[-1] - times[-2]:.1f} s for the last step, peak {peak_gb():.1f} GB")
    began = time.monotonic()
    line = ["--model", model, "--lora", run, "--prompt", "red apple", "--steps", 1, "--dtype", "bfloat16"]
    code = pixart_ft(["generate", *map(str, line), "--out", str(args.work / "drawn")])
    print(f"reload and one sampling step: {time.monotonic() - began:.0f} s, peak of both {peak_gb():.1f} GB")
    return code


if __name__ == "__main__":
    sys.exit(main())
