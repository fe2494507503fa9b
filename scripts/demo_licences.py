"""LICENCES.md of the demo: whose pictures and names it was made from, as the packages themselves say."""

import json
from pathlib import Path

from demo_pictures import OTHERS, STYLES

WORDS = {
    "fluent": "`pictures/`, the fine-tuning set, laid on white and re-encoded; nothing in `model/` has seen it, and "
    "`extractor/` was trained on others of the package",
    "names": "captions: names of the Unicode standard",
    "words": "captions: synonyms",
}
HOLDERS = {"fluent": "Fluent Emoji 3D, Copyright Microsoft Corporation"}  # the package has no licence file of its own


def _holder(folder: Path) -> str:
    """The copyright line of a package's licence file."""
    lines = (folder / "LICENSE").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith("Copyright"))


def write_licences(path: Path, places: dict[str, Path]) -> None:
    """A table of every package with its licence, and the MIT text, which asks to be passed on."""
    rows = ["| what | from | licence |", "|---|---|---|"]
    for key, style in STYLES.items():
        info = json.loads((places[key] / "info.json").read_text())
        holder = f"Copyright {info['author']['name']} ({info['author']['url']})"
        rows.append(
            f"| `model/` and `extractor/` were trained on | {info['name']}, {holder}, through the npm package "
            f"`{style.package}` | {style.licence} |"
        )
    for key, package in OTHERS.items():
        licence = json.loads((places[key] / "package.json").read_text())["license"]
        assert licence == "MIT", f"{package} is under {licence} now"
        holder = HOLDERS.get(key) or _holder(places[key])
        rows.append(f"| {WORDS[key]} | {holder}, through the npm package `{package}` | MIT |")
    mit = (places["words"] / "LICENSE").read_text()
    text = [
        "# Where the demo comes from",
        "\n".join(rows),
        "The weights were trained from scratch, by `scripts/build_demo.py` and `scripts/build_extractor.py`, and are "
        "under Apache-2.0 like the code.\nThe text of Apache-2.0 is this repository's `LICENSE`; that of MIT:",
        "## MIT License",
        mit[mit.index("Permission is hereby granted") :].strip(),
    ]
    path.write_text("\n\n".join(text) + "\n")
