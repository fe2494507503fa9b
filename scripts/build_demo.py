"""Makes the embedded demo, `pixart_ft/demo/`: a small PixArt-Sigma that draws emoji in five styles, and a picture set.

    python scripts/build_demo.py --work ~/demo-build

fetches the artwork (npm), renders it, trains the VAE, then the transformer with its text encoder, and writes the
model (a standard diffusers folder), the fine-tuning set and sheets of pictures. Many hours on two cores; every stage
resumes where it stopped, and each can be asked for alone:

    python scripts/build_demo.py --work ~/demo-build --stage vae       train the VAE
    python scripts/build_demo.py --work ~/demo-build --stage measure   its figures for each set, and a sheet
    python scripts/build_demo.py --work ~/demo-build --stage base --device cuda --batch 512 --minutes 9
    python scripts/build_demo.py --work ~/demo-build --stage write     the demo folder and its sheet
    python scripts/build_demo.py --work ~/demo-build --stage trials    two picture sets that nothing is tuned on

Needs `pip install -e .[demo]` and `npm`.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from demo_base import (
    BATCH,
    MOVED_COPIES,
    BaseTraining,
    build_text_encoder,
    build_transformer,
    encode_pictures,
    kept_tokenizer,
    trained_networks,
)
from demo_captions import EYE_NAMES, PLAIN_STYLE, Example, captions_of, examples, held_out
from demo_licences import write_licences
from demo_pictures import (
    STYLES,
    SYMBOLS,
    THINGS,
    TRIALS,
    Emoji,
    fetch,
    fetch_trials,
    fine_tuning_split,
    fluent_emoji,
    held_out_things,
    render,
    rendered,
    styled_emoji,
    synonyms,
)
from demo_vae import VaeTraining, main_hue, measure, normalise_latents, to_pixels, turn_hue
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import T5EncoderModel, T5Tokenizer

from pixart_ft.model.vae import decode_to_pictures, encode_pixels
from pixart_ft.pictures.sheets import grid
from pixart_ft.sampling.text_to_image import TextToImage

SIZE = 256
STAGES = ("vae", "measure", "base", "write", "trials")
VAE_HELD_OUT_SHARE = 0.06  # of the things, in no style seen by the VAE: its figures are of them
COLOURS = {"red": 0, "orange": 30, "yellow": 55, "green": 120, "cyan": 185, "blue": 230, "purple": 275, "pink": 325}
TURNS = (70.0, 160.0, 250.0)  # degrees of hue by which the figures' turned pictures are turned


def write_pictures(folder: Path, emojis: list[Emoji]) -> None:
    """A captioned picture folder: WebP files and metadata.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for emoji in sorted(emojis, key=lambda e: e.code):
        name = f"{emoji.code}.webp"
        render(emoji, SIZE).save(folder / name, quality=90, method=6)
        lines.append(json.dumps({"file_name": name, "text": emoji.name}))
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


def reconstructed(vae: AutoencoderKL, pictures: np.ndarray) -> list[Image.Image]:
    """The pictures through the VAE, by the posterior's mean."""
    return decode_to_pictures(vae, encode_pixels(vae, to_pixels(pictures)))


def print_figures(vae: AutoencoderKL, sets: Mapping[str, np.ndarray]) -> None:
    """dB and hue error of each set's pictures, as they are and with their hues turned."""
    for name, pictures in sets.items():
        plain, turned = measure(vae, pictures), np.mean([measure(vae, pictures, angle) for angle in TURNS], axis=0)
        print(
            f"{name:8} {len(pictures)} pictures  {plain[0]:.2f} dB  {plain[1]:.1f} degrees   "
            f"turned: {turned[0]:.2f} dB  {turned[1]:.1f} degrees",
            flush=True,
        )


def write_vae_sheet(path: Path, vae: AutoencoderKL, sets: Mapping[str, np.ndarray], columns: int = 12) -> None:
    """Real above reconstructed, for every set; then some of the first set with hues turned once around."""
    rows, labels = [], []
    shown = {name: pictures[:columns] for name, pictures in sets.items()}
    first = next(iter(sets.values()))[-columns:]
    shown["turned"] = np.stack([turn_hue(picture, 360 / len(first) * i) for i, picture in enumerate(first)])
    for name, pictures in shown.items():
        rows += [[Image.fromarray(picture) for picture in pictures], reconstructed(vae, pictures)]
        labels += [name, "VAE"]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, row_labels=labels, cell=96).save(path, optimize=True)


def write_colour_sheet(path: Path, vae: AutoencoderKL, pictures: np.ndarray, seed: int = 0) -> None:
    """Two pictures of every colour of COLOURS through the VAE, numbered, in a random order; the answers beside it."""
    plain = [(picture, hue) for picture in pictures if (hue := main_hue(picture)) is not None]
    generator = np.random.default_rng(seed)
    chosen = [plain[i] for i in generator.permutation(len(plain))[: 2 * len(COLOURS)]]
    names = [name for name in COLOURS for _ in range(2)]
    turned = [turn_hue(picture, COLOURS[name] - hue) for name, (picture, hue) in zip(names, chosen, strict=True)]
    order = generator.permutation(len(names))
    shown = reconstructed(vae, np.stack([turned[i] for i in order]))
    rows = [shown[start : start + 8] for start in range(0, len(shown), 8)]
    grid(rows, captions=[[str(8 * r + c + 1) for c in range(len(row))] for r, row in enumerate(rows)]).save(path)
    path.with_suffix(".json").write_text(json.dumps([names[i] for i in order]) + "\n")


def write_base_sheet(path: Path, model: Path, names: Sequence[str]) -> None:
    """Generated pictures (seed 0, DDIM 50 steps, guidance 4) of each name: bare, then in each style."""
    text_to_image = TextToImage.load(model)
    rows = [text_to_image.generate(list(names), steps=50, guidance=4.0)]
    for style in STYLES.values():
        captions = [f"{name}, {style.word}" for name in names]
        rows.append(text_to_image.generate(captions, steps=50, guidance=4.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, row_labels=["no word", *(style.word for style in STYLES.values())], cell=96).save(path, optimize=True)


class Build:
    """The stages, and what they share: the artwork and where everything lies."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.work: Path = args.work
        self.places = fetch(self.work / "npm")
        self.sets = {style: styled_emoji(self.places, style, (*THINGS, SYMBOLS)) for style in STYLES}
        self.fluent = fluent_emoji(self.places)

    def _artwork(self) -> dict[str, np.ndarray]:
        return {style: rendered(emojis, SIZE, self.work / f"{style}.npy") for style, emojis in self.sets.items()}

    def _seen_and_unseen(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The VAE's pictures; and, set by set, those it never sees."""
        held = held_out_things([emoji.code for emoji in self.sets[PLAIN_STYLE]], VAE_HELD_OUT_SHARE, seed=1)
        seen, unseen = [], {}
        for style, pictures in self._artwork().items():
            unknown = np.array([emoji.code in held for emoji in self.sets[style]])
            seen.append(pictures[~unknown])
            unseen[style] = pictures[unknown]
        glossy = rendered(self.fluent, SIZE, self.work / "fluent.npy")
        unseen["fluent"] = glossy[[emoji.code in held for emoji in self.fluent]]
        return np.concatenate(seen), unseen

    def vae(self) -> None:
        if self.args.vae:
            return
        training = VaeTraining(self.work / "vae")
        if training.course.step < self.args.vae_steps:
            training.run(self._seen_and_unseen()[0], self.args.vae_steps)

    def measure(self) -> None:
        vae = self._trained_vae() if self.args.vae else VaeTraining(self.work / "vae").averaged()
        unseen = {name: pictures[: self.args.pictures] for name, pictures in self._seen_and_unseen()[1].items()}
        print_figures(vae, unseen)
        write_vae_sheet(self.work / "vae.png", vae, unseen)
        write_colour_sheet(self.work / "vae_colours.png", vae, np.concatenate(list(unseen.values())))

    def _trained_vae(self) -> AutoencoderKL:
        """The averaged VAE with normalised latents; kept, so that every later stage has the same."""
        folder = self.work / "vae" / "normalised"
        if not folder.is_dir() and self.args.vae:
            shutil.copytree(self.args.vae, folder)
        if not folder.is_dir():
            vae = VaeTraining(self.work / "vae").averaged()
            pictures = np.concatenate([artwork[::12] for artwork in self._artwork().values()])
            normalise_latents(vae, pictures)
            vae.save_pretrained(str(folder))
        vae = AutoencoderKL.from_pretrained(str(folder))
        assert isinstance(vae, AutoencoderKL)
        return vae.eval()

    def _base(self) -> BaseTraining:
        """The base as far as it is trained."""
        things = {style: [emoji.group in THINGS for emoji in emojis] for style, emojis in self.sets.items()}
        sets = {style: list(compress(emojis, things[style])) for style, emojis in self.sets.items()}
        words = synonyms(self.places, [emoji.code for emoji in sets[PLAIN_STYLE]])
        listed = examples(sets, words, finishing=self.args.finish is not None)
        artwork = np.concatenate([pictures[things[style]] for style, pictures in self._artwork().items()])
        copies = 0 if self.args.finish else MOVED_COPIES
        kept = self.work / f"latents-{copies}.pt"
        latents = encode_pictures(self._trained_vae(), artwork, kept, copies=copies, device=self.args.device)
        tokenizer = self._tokenizer(listed)
        if self.args.finish:
            transformer, text_encoder = trained_networks(self.args.finish)
        else:
            torch.manual_seed(0)
            transformer, text_encoder = build_transformer(), build_text_encoder(len(tokenizer))
        return BaseTraining(
            transformer,
            text_encoder,
            tokenizer,
            latents,
            listed,
            held_out(listed, self.work / "held_out.jsonl"),
            self.work / ("finish" if self.args.finish else "base"),
            batch=self.args.batch,
            device=self.args.device,
            finishing=self.args.finish is not None,
        )

    def _tokenizer(self, pictures: Sequence[Example]) -> T5Tokenizer:
        texts = [text for picture in pictures for text, _ in picture.captions]
        texts += [text for emoji in self.fluent for text, _ in captions_of(emoji.name, PLAIN_STYLE, ())]
        return kept_tokenizer(self.work / "tokenizer", texts, self.args.finish)

    def base(self) -> None:
        self._base().run(self.args.base_steps, compiled=not self.args.no_compile, minutes=self.args.minutes)

    def write(self) -> None:
        out: Path = self.args.out
        train, unseen = fine_tuning_split(self.fluent)
        write_pictures(out / "pictures" / "train", train)
        write_pictures(out / "pictures" / "held_out", unseen)
        training = self._base()
        training.use_average()
        write_model(
            out / "model",
            self._trained_vae(),
            training.transformer.cpu(),
            training.text_encoder.cpu(),
            T5Tokenizer.from_pretrained(str(self.work / "tokenizer")),
        )
        write_licences(out / "LICENCES.md", self.places)
        write_base_sheet(self.args.sheet, out / "model", EYE_NAMES)

    def trials(self) -> None:
        """Of each set that nothing is tuned on sixty pictures, and sixty held out: data.folder and data.held_out."""
        places = fetch_trials(self.work / "npm")
        for name in TRIALS:
            train, unseen = fine_tuning_split(styled_emoji(self.places | places, name), train=60)
            write_pictures(self.work / "trials" / name / "train", train)
            write_pictures(self.work / "trials" / name / "held_out", unseen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, renders and checkpoints")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be given again")
    parser.add_argument("--out", type=Path, default=Path("pixart_ft/demo"), help="where the demo goes")
    parser.add_argument("--sheet", type=Path, default=Path("docs/pictures/demo.png"), help="the base's pictures")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument(
        "--vae", type=Path, help="a trained VAE, such as pixart_ft/demo/model/vae, in place of that stage"
    )
    parser.add_argument("--pictures", type=int, default=1000, help="at most so many of each set are measured")
    parser.add_argument("--base-steps", type=int, default=10000)
    parser.add_argument("--finish", type=Path, help="a demo model to go on from, the rates falling from the start")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures a step of the base")
    parser.add_argument("--device", default="cpu", help="where the base trains: cpu or cuda")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop the base after so many; it resumes")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (no C compiler)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    build = Build(args)
    for stage in args.stage or STAGES:
        getattr(build, stage)()


if __name__ == "__main__":
    main()
