"""Pictures for people: labelled grids, loss curves, and PNG files that carry the recipe they were made by."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pixart_ft.errors import UserError
from pixart_ft.files import write_file

RECIPE_KEY = "pixart_ft"  # the PNG text chunk that holds the recipe, as JSON
_HELD_OUT = "held out (± standard error)"
_UNITS = {"simple": "mean squared error", "vlb": "bits per dimension"}


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """One white sheet with the pictures of `rows` in line, labels to the left and on top, captions of a line below.

    rows: may be of different lengths; None leaves a cell white.
    cell: side in pixels of the square each picture is fitted into, proportions kept; None takes the longest
        side of any picture. Labels grow with it, are wrapped, and end in an ellipsis where they do not fit.
    Raises ValueError without any picture, or when the labels are not as many as the rows or columns.
    """
    present = [image for row in rows for image in row if image is not None]
    columns = max((len(row) for row in rows), default=0)
    if not present:
        raise ValueError("grid() needs at least one picture")
    for name, labels, count in (
        ("row_labels", row_labels, len(rows)),
        ("column_labels", column_labels, columns),
    ):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} has {len(labels)} labels for {count} of them")
    side = cell or max(max(image.size) for image in present)
    font = _font(min(28, max(10, side // 14)))
    line = sum(font.getmetrics()) + 1
    gap = max(4, side // 32)

    beside = [_wrap(text, font, max(110, 3 * side // 4), side // line) for text in row_labels or ()]
    above = [_wrap(text, font, side, 3) for text in column_labels or ()]
    left = gap + (max((math.ceil(font.getlength(t)) for lines in beside for t in lines), default=-gap) + gap)
    top = gap + (max((len(lines) for lines in above), default=0) * line + gap if above else 0)
    pitch, down = side + gap, side + gap + (line if captions else 0)
    sheet = Image.new("RGB", (left + columns * pitch, top + len(rows) * down), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(above):
        for i, text in enumerate(lines):
            middle = left + column * pitch + side / 2
            draw.text((middle, top - gap - (len(lines) - i) * line), text, font=font, fill="black", anchor="ma")
    for row, lines in enumerate(beside):
        for i, text in enumerate(lines):
            middle = top + row * down + side / 2
            draw.text((gap, middle + (i - len(lines) / 2) * line), text, font=font, fill="black")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            if image is not None:
                _paste(sheet, image, left + column * pitch, top + row * down, side)
    for row, texts in enumerate(captions or ()):
        for column, text in enumerate(texts):
            (shown,) = _wrap(text, font, side, 1) or [""]
            below = left + column * pitch + side / 2, top + row * down + side
            draw.text(below, shown, font=font, fill="black", anchor="ma")
    return sheet


def loss_curve(
    records: Sequence[Mapping[str, object]],
    path: str | Path,
    *,
    title: str = "Fine-tuning",
) -> None:
    """Draw the loss terms of a run's log, one panel a term, as a PNG.

    A record holds "step" (optimizer steps), perhaps "samples" (pictures seen; then the horizontal axis), and
    either or both of
      "train": {term: mean over the batch}, drawn faint, with its running mean over a twentieth of the run;
      "held_out": {term: {"mean": float, "standard_error": float}}, drawn as points with bars of that error.
    Terms by quartile of t (`simple_q1`) are left out, as are values that are not finite; a term equal to an
    earlier one throughout is drawn once. The vertical axis is logarithmic where the values are positive and
    span more than a factor of three.
    """
    from matplotlib.figure import Figure  # drawn by Agg; pyplot and its global state are left alone

    by_samples = all("samples" in record for record in records)
    train, held_out = _series(records, "samples" if by_samples else "step")
    terms: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float, float]]]] = {}
    for name in dict.fromkeys((*train, *held_out)):
        curves = train.get(name, []), held_out.get(name, [])
        if not re.search("_q[1-4]$", name) and curves not in terms.values():
            terms[name] = curves
    if not terms:
        raise ValueError("loss_curve() needs at least one finite loss")
    figure = Figure(figsize=(5.2 * len(terms), 3.8), dpi=120, layout="constrained")
    figure.suptitle(title)
    for axes, (name, (points, held)) in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms.items()):
        if points:
            x, y = zip(*points)
            smooth = _running_mean(y, max(1, len(y) // 20))
            axes.plot(x, y, color="tab:blue", alpha=0.2, linewidth=0.8)
            axes.plot(x, smooth, color="tab:blue", label="train (running mean)")
        if held:
            x, y, error = zip(*held)
            axes.errorbar(x, y, error, fmt="o-", color="tab:orange", markersize=4, capsize=3, label=_HELD_OUT)
        values = [point[1] for point in (*points, *held)]
        if min(values) > 0 and max(values) > 3 * min(values):
            axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("pictures seen" if by_samples else "optimizer steps")
        axes.set_ylabel(_UNITS.get(name, "loss"))
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    write_file(Path(path), lambda file: figure.savefig(file, format="png"))


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, object]) -> None:
    """Write a PNG with `recipe` as JSON in its text chunk `pixart_ft`; it appears whole or not at all."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(RECIPE_KEY, json.dumps(recipe, allow_nan=False))
    write_file(Path(path), lambda file: image.save(file, format="PNG", pnginfo=chunk))


def read_recipe(path: str | Path) -> dict[str, object]:
    """The recipe that `save_png` stored. Raises UserError when there is no such file, or no recipe in it."""
    try:
        with Image.open(path) as image:
            recipe = json.loads(getattr(image, "text", {})[RECIPE_KEY])
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except Exception:  # a broken file makes Pillow raise almost anything
        recipe = None
    if not isinstance(recipe, dict):
        raise UserError(
            f"{path} holds no recipe: it is not a PNG by pixart_ft, or a program that drops metadata saved it"
        )
    return recipe


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: needs no system font, and Pillow's own lacks accented letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of `text` at most `width` pixels long; long words are broken, text too long ends in "…"."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = lines[1:]
    if len(lines) <= max(1, max_lines):
        return lines
    lines = lines[: max(1, max_lines)]
    while lines[-1] and font.getlength(lines[-1] + "…") > width:
        lines[-1] = lines[-1][:-1]
    lines[-1] = lines[-1].rstrip() + "…"
    return lines


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, side: int) -> None:
    """Fit `image` into the square at (left, top), centred; transparency shows the white sheet."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.convert("RGBA")
    if size != image.size:
        fitted = fitted.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (left + (side - size[0]) // 2, top + (side - size[1]) // 2), fitted)


def _series(
    records: Sequence[Mapping[str, object]], axis: str
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float, float]]]]:
    """Per term: the training losses as (x, value) and the held-out ones as (x, value, standard error)."""
    train: dict[str, list[tuple[float, float]]] = {}
    held_out: dict[str, list[tuple[float, float, float]]] = {}
    for record in records:
        x = float(record[axis])  # type: ignore[arg-type]
        for name, value in record.get("train", {}).items():  # type: ignore[attr-defined]
            if math.isfinite(value):
                train.setdefault(name, []).append((x, value))
        for name, held in record.get("held_out", {}).items():  # type: ignore[attr-defined]
            if math.isfinite(held["mean"]):
                held_out.setdefault(name, []).append((x, held["mean"], held["standard_error"]))
    return train, held_out


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` values centred on each (fewer at the ends), so that the curve does not lag."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = ((max(0, i - window // 2), min(len(values), i + window // 2 + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
