"""A randomly initialised PixArt-Sigma of 0.2 M parameters and a few drawn pictures: real classes, offline.

Latents are 4 x 8 x 8 for 64 x 64 pictures (VAE factor 8, patch 2, so 16 image tokens); text width is 32.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image, ImageDraw
from transformers import T5Config, T5EncoderModel, T5Tokenizer

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle")
GROUNDS = ("grey", "pink", "brown", "cyan")
WORDS = ("a", "on", "of", "the", "photo", "picture", *COLOURS, *SHAPES, *GROUNDS)


def build_tiny_transformer(out_channels: int = 8) -> PixArtTransformer2DModel:
    """As diffusers begins it, by the global random state."""
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
        in_channels=4,
        out_channels=out_channels,
        patch_size=2,
        interpolation_scale=0.125,
        use_additional_conditions=False,
    )


def build_tiny_pipeline(folder: Path | str, *, seed: int = 0, out_channels: int = 8) -> Path:
    """Write a standard diffusers PixArt-Sigma folder (1 MB) with weights decided by `seed`, and return it.

    The global random state is left as it was. With `out_channels` 4 there is no variance half.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                tie_word_embeddings=False,
            )
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.13025,
        )
        transformer = build_tiny_transformer(out_channels)
        # A fresh model barely listens to time and text; larger tables and projections make every input count.
        with torch.no_grad():
            transformer.adaln_single.linear.weight.normal_(std=0.1)
            transformer.proj_out.weight.normal_(std=0.08)
            for block in transformer.transformer_blocks:
                block.attn2.to_q.weight.normal_(std=0.3)
                block.attn2.to_k.weight.normal_(std=0.3)
                block.attn2.to_out[0].weight.normal_(std=0.3)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++"
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.save_pretrained(str(folder))
    return folder


def shifted_copy(base: Path, folder: Path) -> Path:
    """The same model with a VAE that says shift_factor 0.5, in `folder`."""
    shutil.copytree(base, folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.5}))
    return folder


def tiny_tokenizer() -> T5Tokenizer:
    """A case-sensitive Unigram tokenizer: printable ASCII and a few whole words; ids 0, 1, 2 are pad, end,
    unknown.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    letters = [(chr(code), -6.0) for code in range(33, 127)]
    words = [("▁" + word, -3.0) for word in WORDS]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5Tokenizer(vocab=[*special, *letters, *words, *sentinels], model_max_length=300)


def build_picture_folder(folder: Path | str, count: int, size: int = 64) -> Path:
    """Draw `count` captioned PNGs (at most 96 differ) of size x size pixels with a metadata.jsonl; return the
    folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        shape = SHAPES[index // len(COLOURS) % len(SHAPES)]
        ground = GROUNDS[(index + index // 24) % len(GROUNDS)]
        picture = Image.new("RGB", (size, size), ground)
        draw = ImageDraw.Draw(picture)
        box = (size // 4, size // 4, 3 * size // 4, 3 * size // 4)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(size // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
        name = f"{index:03d}.png"
        picture.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a {colour} {shape} on {ground}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
