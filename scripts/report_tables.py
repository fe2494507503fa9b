"""The tables of an evaluation in Markdown, for docs/samplers.md and docs/objectives_table.md.

    pixart-ft evaluate runs/mine --metrics loss,bpd,fd,kid --samplers ddim,edm --steps "[10, 25]" --out evaluation
    python scripts/report_tables.py evaluation/report.json

First what fine-tuning changed, a row for each model: error of the noise, bits per dimension by the learned variance
and the typical factor by which that is wrong. Then, a column for each model, the bits by every variance, and the
likeness of pictures by how they were drawn. `--sheet FILE` sets the first pictures of the last model in a row for each
of these.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft.evaluation.words import LIKENESS, number, process_title
from pixart_ft.pictures.sheets import grid

SHOWN = 8  # pictures of a row


def tables(found: Mapping[str, Any]) -> list[str]:
    """Each a table of its own."""
    models = [model["label"] for model in found["models"]]
    texts = [summary(found)] if found["loss"] or found["bpd"] or found["calibration"] else []
    if found["bpd"]:
        rows = [
            [process_title(process), f"`{variance}`", *_cells(of_it, models, 3)]
            for process, table in found["bpd"].items()
            for variance, of_it in table["variances"].items()
        ]
        texts.append(_table(["bits/dim", "variance", *models], rows))
    ways = found["likeness"].get("ways", {})
    for metric in dict.fromkeys(metric for way in ways.values() for metric in way["metrics"]):
        title, _, digits = LIKENESS[metric]
        rows = [
            [name, str(way["calls"]), *_cells(way["metrics"][metric], models, digits)] for name, way in ways.items()
        ]
        texts.append(_table([title, "calls", *models], rows))
    return texts


def summary(found: Mapping[str, Any]) -> str:
    """A row for each model."""
    models = [model["label"] for model in found["models"]]
    columns: dict[str, Sequence[str]] = {"model": models}
    if found["loss"]:
        columns["error of the noise"] = _cells(found["loss"]["rows"], models, 4)
        columns["minus base"] = _changes(found["loss"]["rows"], models, 4)
    for process, table in found["bpd"].items():
        rows = table["variances"].get("learned", [])
        columns[f"bits/dim, {process_title(process)}"] = _cells(rows, models, 3)
        columns[f"minus base, {process_title(process)}"] = _changes(rows, models, 3)
    for process, table in found["calibration"].items():
        factors = {row["model"]: f"{row['factor']:.3f}" for row in table["rows"]}
        columns[f"variance wrong by, {process_title(process)}"] = [factors.get(model, "") for model in models]
    return _table([*columns], [*zip(*columns.values(), strict=True)])


def _changes(rows: Sequence[Mapping[str, Any]], models: Sequence[str], digits: int) -> list[str]:
    of = {row["model"]: row["difference"] for row in rows if "difference" in row}
    shown = {model: f"{d['mean']:+.{digits}f} ± {d['standard_error']:.{digits}f}" for model, d in of.items()}
    return [shown.get(model, "") for model in models]


def _cells(rows: Sequence[Mapping[str, Any]], models: Sequence[str], digits: int) -> list[str]:
    of = {row["model"]: row for row in rows}
    return [number(of[model], digits) if model in of else "" for model in models]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sheet(found: Mapping[str, Any], folder: Path) -> Image.Image:
    """The report of `found` lies in `folder`."""
    ways = found["samples"]["models"][-1]["ways"]
    rows = [[Image.open(folder / name) for name in way["pictures"][:SHOWN]] for way in ways]
    return grid(rows, row_labels=[f"{way['sampler']}, {way['calls']} calls" for way in ways], cell=96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of an evaluation")
    parser.add_argument("--sheet", type=Path, help="PNG for the pictures")
    args = parser.parse_args()
    found = json.loads(args.report.read_text())
    print("\n\n".join(tables(found)))
    if args.sheet:
        sheet(found, args.report.parent).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
