"""Pictures for people: labelled grids, loss curves, and PNG files that carry the recipe they were made by."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image, ImageDraw, ImageFont

from pixart_ft.config.text import numbered
from pixart_ft.files import write_file
from pixart_ft.pictures.lettering import dejavu_sans, fitting, font_of
from pixart_ft.pictures.recipes import chunks

_HELD_OUT = "held out (± standard error)"


@dataclass(frozen=True)
class _Label:
    """Lines of text in the font that has their letters."""

    lines: Sequence[str]
    font: ImageFont.FreeTypeFont

    @classmethod
    def fitted(cls, text: str, size: int, width: int, max_lines: int) -> Self:
        """Wrapped to a width in pixels; ends in an ellipsis where it does not fit."""
        path, shown = fitting(text)
        font = font_of(path, size)
        return cls(_wrap(shown, font, width, max_lines), font)

    @property
    def width(self) -> int:
        return max((math.ceil(self.font.getlength(line)) for line in self.lines), default=0)

    def write(
        self,
        draw: ImageDraw.ImageDraw,
        x: float,
        top: float,
        line: int,
        *,
        middle: bool = False,
        colour: str = "black",
    ) -> None:
        """Draw the lines, `line` pixels each, from `top` on; x is their left end or their middle."""
        ascent, _ = font_of(dejavu_sans(), round(self.font.size)).getmetrics()  # of any font's: one base line for all
        for number, text in enumerate(self.lines):
            place = x, top + number * line + ascent
            draw.text(place, text, font=self.font, fill=colour, anchor="ms" if middle else "ls")


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    caption_lines: int = 1,
    cell: int | None = None,
) -> Image.Image:
    """One white sheet with the pictures of `rows` in line.

    rows: may be of different lengths; None leaves a cell white.
    title: above all; row_labels to the left, column_labels on top, captions of up to `caption_lines` below each
        picture.
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
    size = min(28, max(10, side // 14))
    line = sum(font_of(dejavu_sans(), size).getmetrics()) + 1
    gap = max(4, side // 32)

    beside = [_Label.fitted(text, size, max(110, 3 * side // 4), side // line) for text in row_labels or ()]
    above = [_Label.fitted(text, size, side, 3) for text in column_labels or ()]
    left = gap + max((label.width + gap for label in beside), default=0)
    below = [[_Label.fitted(text, size, side, caption_lines) for text in texts] for texts in captions or ()]
    lines = max((len(label.lines) for row_of_them in below for label in row_of_them), default=0)
    pitch, down = side + gap, side + gap + lines * line
    width = left + columns * pitch
    headings = [_Label.fitted(title, size, width - 2 * gap, 3)] if title else []
    head = sum(len(label.lines) * line + gap for label in headings)
    top = head + gap + (max((len(label.lines) for label in above), default=0) * line + gap if above else 0)
    sheet = Image.new("RGB", (width, top + len(rows) * down), "white")
    draw = ImageDraw.Draw(sheet)
    for label in headings:
        label.write(draw, gap, gap, line)
    for column, label in enumerate(above):
        label.write(draw, left + column * pitch + side / 2, top - gap - len(label.lines) * line, line, middle=True)
    for row, label in enumerate(beside):
        label.write(draw, gap, top + row * down + (side - len(label.lines) * line) / 2, line)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            if image is not None:
                _paste(sheet, image, left + column * pitch, top + row * down, side)
    for row, row_of_them in enumerate(below):
        for column, label in enumerate(row_of_them):
            label.write(draw, left + column * pitch + side / 2, top + row * down + side, line, middle=True)
    return sheet


def marked(picture: Image.Image, words: str) -> Image.Image:
    """The picture in a red frame with words in a band at its top; as it is without words."""
    if not words:
        return picture
    found, side = picture.copy(), max(picture.size)
    label = _Label.fitted(words, max(10, side // 15), picture.width - 4, 2)
    line, draw = sum(label.font.getmetrics()), ImageDraw.Draw(found)
    draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="red", width=max(2, side // 48))
    draw.rectangle((0, 0, picture.width, len(label.lines) * line + 2), fill="red")
    label.write(draw, picture.width / 2, 1, line, middle=True, colour="white")
    return found


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other, on white, each at the left."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


@dataclass(frozen=True)
class Sample:
    """A picture with what was drawn."""

    prompt: str
    seed: int
    picture: Image.Image


def sample_sheet(samples: Sequence[Sample], title: str) -> Image.Image:
    """A grid of them: a row for each prompt, a column for each seed; samples come by prompt, then by seed."""
    seeds = list(dict.fromkeys(sample.seed for sample in samples))
    rows = [samples[start : start + len(seeds)] for start in range(0, len(samples), len(seeds))]
    return grid(
        [[sample.picture for sample in row] for row in rows],
        title=title,
        row_labels=[row[0].prompt for row in rows],
        column_labels=[f"seed {seed}" for seed in seeds],
    )


def picture_name(number: str, prompt: str, seed: int) -> str:
    """Such as 000-a-red-apple-seed0.png; the number tells apart prompts whose words in ASCII are the same."""
    words = "-".join(re.findall("[a-z0-9]+", prompt.lower()))[:40].strip("-")
    return f"{number}-{words or 'prompt'}-seed{seed}.png"


def loss_curve(records: Sequence[Mapping[str, object]], path: str | Path, *, title: str = "Fine-tuning") -> None:
    """Draw the loss of a run's log as a PNG: held out, its lowest point marked, the training's behind it.

    A record holds "step" (optimizer steps), perhaps "samples" (pictures seen; then the horizontal axis), and
    either or both of
      "train": {term: mean over the batch}, drawn faint, with its running mean over a twentieth of the run;
      "held_out": {term: {"mean": float, "standard_error": float}}, drawn as points with bars of that error.
    Values that are not finite are left out. The vertical axis shows the held-out loss and the running mean whole; it is
    logarithmic where these are positive and span more than a factor of three. Raises ValueError without a finite loss.
    """
    terms, axis = _terms(records)
    if not terms:
        raise ValueError("loss_curve() needs at least one finite loss")
    name = "loss" if "loss" in terms else next(iter(terms))
    points, held = terms[name]
    figure, (axes,) = _figure(1, title, axis)
    smooth = _draw_term(axes, points, held, emphasis=2.0)
    if held:
        x, lowest, _ = min(held, key=lambda point: point[1])
        steps = next(record["step"] for record in records if record[axis] == x)
        where = "before the first step" if steps == 0 else f"after {numbered(str(steps), 'step')}"
        label = f"lowest held out: {lowest:.4g} {where}"
        axes.plot([x], [lowest], "*", color="tab:red", markersize=16, zorder=4, label=label)
        shown = [*(m - e for _, m, e in held), *(m + e for _, m, e in held), *smooth]
        low, high = min(shown), max(shown)
        if axes.get_yscale() == "log" and low > 0:
            axes.set_ylim(low / (high / low) ** 0.1, high * (high / low) ** 0.1)
        elif high > low:
            axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set_ylabel(name)
    axes.legend(frameon=False, fontsize="small")
    write_file(Path(path), lambda file: figure.savefig(file, format="png"))


def term_curves(
    records: Sequence[Mapping[str, object]], path: str | Path, *, titles: Mapping[str, str], title: str = "Fine-tuning"
) -> bool:
    """Draw what the loss is made of, a panel a term, named by `titles`; False and no file where that is all one.

    Records as in `loss_curve`. Terms by quartile of t (`simple_q1`) are left out, and equal ones drawn once.
    """
    terms, axis = _terms(records)
    loss = terms.pop("loss", None)
    distinct: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float, float]]]] = {}
    for name, curves in terms.items():
        if curves != loss and curves not in distinct.values():
            distinct[name] = curves
    if not distinct:
        return False
    figure, panels = _figure(len(distinct), title, axis)
    for axes, (name, (points, held)) in zip(panels, distinct.items(), strict=True):
        _draw_term(axes, points, held)
        axes.set_title(titles.get(name, name))
        axes.legend(frameon=False, fontsize="small")
    write_file(Path(path), lambda file: figure.savefig(file, format="png"))
    return True


def _terms(
    records: Sequence[Mapping[str, object]],
) -> tuple[dict[str, tuple[list[tuple[float, float]], list[tuple[float, float, float]]]], str]:
    """Training and held-out points of every whole term, and the record's key that is the horizontal axis."""
    axis = "samples" if all("samples" in record for record in records) else "step"
    train, held_out = _series(records, axis)
    names = [name for name in dict.fromkeys((*train, *held_out)) if not re.search("_(q[1-4]|t0)$", name)]
    return {name: (train.get(name, []), held_out.get(name, [])) for name in names}, axis


def _figure(panels: int, title: str, axis: str) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure  # drawn by Agg; pyplot and its global state are left alone

    figure = Figure(figsize=(7.0 if panels == 1 else 4.6 * panels, 4.2), dpi=120, layout="constrained")
    font, shown = fitting(title)
    figure.suptitle(shown, font=Path(font), parse_math=False)  # a name with two $ is no formula
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.set_xlabel("pictures seen" if axis == "samples" else "optimizer steps")
        axes.grid(True, which="both", alpha=0.25)
        axes.locator_params(axis="x", nbins=6)
    return figure, found


def _draw_term(
    axes: Any,
    points: Sequence[tuple[float, float]],
    held: Sequence[tuple[float, float, float]],
    *,
    emphasis: float = 1.0,
) -> list[float]:
    """The curves of one term; returns the running mean of training. `emphasis` thickens the held-out one."""
    smooth: list[float] = []
    if points:
        x, y = zip(*points, strict=True)
        smooth = _running_mean(y, max(1, len(y) // 20))
        axes.plot(x, y, color="tab:blue", alpha=0.15, linewidth=0.8)
        axes.plot(x, smooth, color="tab:blue", alpha=0.6, linewidth=1.2, label="training (running mean)")
    if held:
        x, y, error = zip(*held, strict=True)
        style = {"markersize": 4, "capsize": 3, "linewidth": emphasis, "zorder": 3}
        axes.errorbar(x, y, error, fmt="o-", color="tab:orange", label=_HELD_OUT, **style)
    values = [*smooth, *(point[1] for point in held)]
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")
    return smooth


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, object]) -> None:
    """Write a PNG with its recipe in text chunks, see `recipes.chunks`; it appears whole or not at all."""
    write_file(Path(path), lambda file: image.save(file, format="PNG", pnginfo=chunks(recipe)))


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
