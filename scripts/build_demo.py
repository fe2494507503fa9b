"""Makes the embedded demo, `pixart_ft/demo/`: a small PixArt-Sigma that draws Noto emoji, and a picture set.

    python scripts/build_demo.py --work ~/demo-build

fetches the artwork (npm), renders it, trains the VAE, then the transformer with its text encoder, and writes the
model (a standard diffusers folder), the fine-tuning set and a grid of real, reconstructed and generated pictures.
Hours on two cores; every stage resumes where it stopped. Needs `pip install -e .[demo]` and `npm`.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from demo_base import BaseTraining, build_text_encoder, build_tokenizer, build_transformer, encode_pictures
from demo_pictures import Emoji, fetch, fine_tuning_split, fluent_emoji, noto_emoji, render, rendered
from demo_vae import normalise_latents, train_vae
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import T5EncoderModel, T5Tokenizer

from pixart_ft.latents import LatentScale
from pixart_ft.pictures import grid
from pixart_ft.sampling import decode_latents
from pixart_ft.text_to_image import TextToImage

SIZE = 256
# Fixed before any training: what a stranger is asked to name.
EYE_CAPTIONS = (
    "red apple",
    "smiling face with sunglasses",
    "cat face",
    "rocket",
    "hamburger",
    "snowman",
    "umbrella",
    "mushroom",
    "sailboat",
    "soccer ball",
    "tulip",
    "light bulb",
    "honeybee",
    "guitar",
    "birthday cake",
    "crown",
)

# 264 pictures of one person each, which differ by dress, sex and hair, would otherwise be a fifth of the training.
RELATIVES, RELATIVES_FREQUENCY = re.compile(r"(man|woman|men|women|person|people|family|kiss|couple)\b"), 0.25


def write_pictures(folder: Path, emojis: list[Emoji]) -> None:
    """A captioned picture folder: WebP files and metadata.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for emoji in sorted(emojis, key=lambda e: e.code):
        name = f"{emoji.code}.webp"
        render(emoji, SIZE).save(folder / name, quality=90, method=6)
        lines.append(json.dumps({"file_name": name, "text": emoji.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_model(
    folder: Path,
    vae: AutoencoderKL,
    transformer: PixArtTransformer2DModel,
    text_encoder: T5EncoderModel,
    tokenizer: T5Tokenizer,
) -> None:
    """The standard pipeline folder; the transformer is stored in float16, which halves it and costs no quality."""
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer.to(torch.float16),
        scheduler=scheduler,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(str(folder))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {total / 1e6:.1f} MB")


@torch.no_grad()
def write_sheet(path: Path, model: Path, captions: Sequence[str], pictures: np.ndarray) -> None:
    """Real, through the VAE, and generated (seed 0, DDIM 50 steps, guidance 4), for each caption."""
    text_to_image = TextToImage.load(model)
    vae = AutoencoderKL.from_pretrained(str(model / "vae"))
    pixels = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = decode_latents(vae, LatentScale.of(vae.config).scaled(vae.encode(pixels).latent_dist.mean))
    generated = text_to_image.generate(captions, steps=50, guidance=4.0)
    real = [Image.fromarray(picture) for picture in pictures]
    half = len(captions) // 2
    rows, labels = [], []
    for part in (slice(0, half), slice(half, None)):
        rows += [real[part], decoded[part], generated[part]]
        labels += ["real", "VAE", "generated"]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, row_labels=labels, cell=128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, renders and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("pixart_ft/demo"), help="where the demo goes")
    parser.add_argument("--sheet", type=Path, default=Path("docs/pictures/demo.png"), help="the picture of it all")
    parser.add_argument("--vae-steps", type=int, default=3250)
    parser.add_argument("--base-steps", type=int, default=6000)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (no C compiler)")
    args = parser.parse_args()

    places = fetch(args.work / "npm")
    noto, fluent = noto_emoji(places), fluent_emoji(places)
    train, held_out = fine_tuning_split(fluent)
    missing = set(EYE_CAPTIONS) - {emoji.caption for emoji in noto}
    assert not missing, f"no such Noto picture: {missing}"
    write_pictures(args.out / "pictures" / "train", train)
    write_pictures(args.out / "pictures" / "held_out", held_out)

    pictures = rendered(noto, SIZE, args.work / "noto.npy")
    glossy = rendered(fluent, SIZE, args.work / "fluent.npy")
    unseen = {emoji.code for emoji in held_out}
    seen = [i for i, emoji in enumerate(fluent) if emoji.code not in unseen]
    vae = train_vae(np.concatenate([pictures, glossy[seen]]), args.work / "vae", args.vae_steps)
    normalise_latents(vae, pictures[::5])

    captions = [emoji.caption for emoji in noto]
    latents = encode_pictures(vae, pictures, args.work / f"latents-{args.vae_steps}.pt")
    if not (args.work / "tokenizer").is_dir():  # made once: learnt again it numbers a few pieces otherwise
        build_tokenizer(captions + [emoji.caption for emoji in fluent]).save_pretrained(str(args.work / "tokenizer"))
    tokenizer = T5Tokenizer.from_pretrained(str(args.work / "tokenizer"))
    torch.manual_seed(0)
    text_encoder = build_text_encoder(len(tokenizer))
    frequencies = [RELATIVES_FREQUENCY if RELATIVES.match(caption) else 1.0 for caption in captions]
    training = BaseTraining(
        build_transformer(), text_encoder, tokenizer, latents, captions, frequencies, args.work / "base"
    )
    training.run(args.base_steps, compiled=not args.no_compile)
    training.use_average()
    write_model(args.out / "model", vae, training.transformer, text_encoder, tokenizer)
    chosen = [captions.index(caption) for caption in EYE_CAPTIONS]
    write_sheet(args.sheet, args.out / "model", EYE_CAPTIONS, pictures[chosen])


if __name__ == "__main__":
    main()
