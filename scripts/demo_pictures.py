"""Pictures and captions of the demo: Noto Emoji for the base, Fluent Emoji 3D for the fine-tuning set.

Both come as npm packages with the Unicode names as captions; `npm pack` fetches them once into a folder.
"""

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",  # Noto Emoji artwork as SVG, Apache-2.0
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",  # Fluent Emoji 3D artwork as WebP, MIT
    "names": "unicode-emoji-json@0.9.0",  # names and groups, MIT
}
BASE_GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)


@dataclass(frozen=True)
class Emoji:
    """One captioned picture: its code points ("1f600"), the caption, the Unicode group, the artwork's source."""

    code: str
    caption: str
    group: str
    source: str | Path  # SVG text, or the path of a bitmap


def fetch(folder: Path) -> dict[str, Path]:
    """Unpack the npm packages under `folder`, once; returns where each lies."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {key: folder / key for key in PACKAGES}
    for key, package in PACKAGES.items():
        if places[key].is_dir():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(folder / f"{key}.part", filter="data")
        (folder / f"{key}.part" / "package").rename(places[key])
        (folder / f"{key}.part").rmdir()
    return places


def _code(text: str) -> str:
    """Code points in hex without the variation selector, the key that all three packages share."""
    return "-".join(f"{ord(c):x}" for c in text if ord(c) != 0xFE0F)


def _names(places: dict[str, Path]) -> dict[str, tuple[str, str]]:
    table = json.loads((places["names"] / "data-by-emoji.json").read_text())
    return {_code(text): (facts["name"].lower(), facts["group"]) for text, facts in table.items()}


def noto_emoji(places: dict[str, Path], groups: tuple[str, ...] = BASE_GROUPS) -> list[Emoji]:
    """Every named Noto picture of these groups, without skin-tone variants."""
    icons = json.loads((places["noto"] / "icons.json").read_text())
    by_code = json.loads((places["noto"] / "chars.json").read_text())
    by_code = {"-".join(p for p in code.split("-") if p != "fe0f"): name for code, name in by_code.items()}
    found = []
    for code, (caption, group) in _names(places).items():
        name = by_code.get(code)
        if name is None or group not in groups:
            continue
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        found.append(Emoji(code, caption, group, svg))
    return found


def fluent_emoji(places: dict[str, Path], groups: tuple[str, ...] = BASE_GROUPS) -> list[Emoji]:
    """Every named Fluent 3D picture of these groups, without skin-tone variants."""
    names = _names(places)
    found = []
    for path in sorted((places["fluent"] / "assets").glob("*.webp")):
        code = "-".join(p for p in path.stem.split("-") if p != "fe0f")
        if code in names and names[code][1] in groups:
            found.append(Emoji(code, *names[code], path))
    return found


def fine_tuning_split(emojis: list[Emoji], train: int = 240, held_out: int = 60) -> tuple[list[Emoji], list[Emoji]]:
    """The shipped (train, held-out) pictures; the held-out ones train nothing, the VAE included."""
    order = np.random.default_rng(0).permutation(len(emojis))
    return [emojis[i] for i in order[held_out : held_out + train]], [emojis[i] for i in order[:held_out]]


def render(emoji: Emoji, size: int) -> Image.Image:
    """The picture as RGB on white, `size` x `size` pixels."""
    if isinstance(emoji.source, Path):
        picture = Image.open(emoji.source).convert("RGBA")
    else:
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=emoji.source, width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def rendered(emojis: list[Emoji], size: int, path: Path) -> np.ndarray:
    """All pictures as one (N, H, W, 3) uint8 array, memory-mapped from `path` (made once)."""
    if not path.is_file():
        pictures = np.stack([np.asarray(render(emoji, size)) for emoji in emojis])
        np.save(path.with_suffix(".part.npy"), pictures)
        path.with_suffix(".part.npy").rename(path)
    pictures = np.load(path, mmap_mode="r")
    assert len(pictures) == len(emojis), f"{path} holds other pictures: delete it"
    return pictures
