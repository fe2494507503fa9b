"""A captioned picture folder in, rows out; and the one way from a picture file to the VAE's pixels."""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, ImageOps
from tqdm import tqdm

from pixart_ft.config.text import is_text, read_text, visible
from pixart_ft.errors import UserError

if TYPE_CHECKING:  # torch waits until there is a picture to load: a wrong folder is known at once
    from torch import Tensor

PICTURE_TYPES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_REFUSED_TYPES = frozenset({".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga"})
_TABLE_TYPES = (".json", ".csv", ".tsv", ".ndjson", ".parquet")
_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("text", "caption")
Found = TypeVar("Found")

TRANSFORM = "exif, on white, centre square, lanczos, 1"
"""Names what `load_picture` does; part of every cache key. Change it when `load_picture` changes."""

DEMO_PICTURES = Path(__file__).parents[1] / "demo" / "pictures"


@dataclass(frozen=True)
class Row:
    """One captioned picture; `name` is its path relative to the data folder, with forward slashes."""

    path: Path
    caption: str
    name: str


class _Report:
    """Everything wrong, kind by kind with the paths concerned, raised as one message."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        self.found.setdefault(kind, []).append(item)

    def raise_if_any(self, subject: str) -> None:
        if self.found:
            listed = [_listed(kind, items) for kind, items in self.found.items()]
            raise UserError("\n".join([subject, *listed]))


def _listed(kind: str, items: Sequence[str], most: int = 10) -> str:
    shown = [f"    {item}" for item in items[:most]]
    rest = [f"    and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {kind}: {len(items)}", *shown, *rest])


def picture_folder(name: str, part: str) -> Path:
    """The folder that data.folder (part "train") or data.held_out (part "held_out") means."""
    return DEMO_PICTURES / part if name == "demo" else Path(name)


def check_folder(folder: Path) -> None:
    """Raise UserError unless there is such a folder."""
    if not folder.is_dir():
        raise UserError(f"the picture folder {folder} does not exist or is not a folder (data.folder)")


def read_folder(folder: str | Path) -> list[Row]:
    """The captioned pictures below a folder, sorted by name.

    Captions come from `metadata.jsonl` or `metadata.csv` in the folder (columns `file_name` and `text` or
    `caption`), else from a .txt beside each picture. Pictures in subfolders count, hidden files do not.
    Raises one UserError that lists every picture without a caption, every row without a picture, and all
    else that is wrong.
    """
    folder = Path(folder)
    check_folder(folder)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: found[name] for name in sorted(found) if not name.startswith(".") and "/." not in name}
    pictures = [name for name, path in files.items() if path.suffix.lower() in PICTURE_TYPES]
    metadata = [name for name in _METADATA if name in files]
    report = _Report()
    if metadata:
        captions = _from_metadata(files[metadata[0]], files, report)
    else:
        captions = _from_text_files(files, report)
    for name in metadata[1:]:
        report.add(f"caption files beside {metadata[0]} (keep one)", name)
    for name in pictures:
        if not is_text(name):
            report.add("pictures whose file names are not UTF-8 (rename them)", visible(name))
        elif not captions.get(name, "").strip():
            remedy = f"a row in {metadata[0]}" if metadata else "a .txt beside it, or a row in metadata.jsonl"
            report.add(f"pictures without a caption (give each {remedy})", name)
    for name, path in files.items():
        if path.suffix.lower() in _REFUSED_TYPES:
            report.add("pictures of a type that is not read (convert to PNG, or move them out)", name)
        elif not metadata and path.suffix.lower().startswith(_TABLE_TYPES) and (report.found or not pictures):
            report.add("files that are not read (captions? name them metadata.jsonl, right here)", name)
    if not pictures:
        report.add(f"folders without a picture ({' '.join(sorted(PICTURE_TYPES))})", str(folder))
    report.raise_if_any(f"the picture folder {folder} cannot be used as it is:")
    return [Row(files[name], captions[name].strip(), name) for name in pictures]


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and `fraction` of them held out, both in the given order.

    The held-out rows are those whose (seed, name) hash lowest, so pictures added later hardly change who is
    held out. At least one is (unless `fraction` is 0) and at least one is left to train on; a single row
    cannot be split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.held_out_fraction must be at least 0 and below 1, not {fraction}")
    if fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise UserError(f"data.held_out_fraction {fraction} needs two pictures or more; there is {len(rows)}")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{row.name}".encode()).digest())
    held_out = {row.name for row in ranked[:count]}
    return [row for row in rows if row.name not in held_out], [row for row in rows if row.name in held_out]


def verify_pictures(rows: Sequence[Row], size: int, *, progress: bool = True) -> None:
    """Decode every picture in full. Raises one UserError that lists those that cannot be read.

    Warns of pictures that `load_picture(path, size)` will enlarge, or lose more than half of to the crop.
    """
    report = _Report()
    small, cropped = [], []
    sizes = tqdm(in_threads(_size_or_problem, rows), "pictures checked", len(rows), disable=None if progress else True)
    for row, found in zip(rows, sizes, strict=True):
        if isinstance(found, str):
            report.add("pictures that cannot be read (repair them or move them out)", found)
        elif min(found) < size:
            small.append(str(row.path))
        elif max(found) > 2 * min(found):
            cropped.append(str(row.path))
    report.raise_if_any("some pictures cannot be used:")
    if small:
        warnings.warn(_listed(f"pictures below {size} px, enlarged and so blurred", small, 3), stacklevel=2)
    if cropped:
        warnings.warn(_listed("pictures that lose over half to the centre crop", cropped, 3), stacklevel=2)


def in_threads(work: Callable[[Row], Found], rows: Sequence[Row]) -> Iterator[Found]:
    """`work` of each row, in order, by as many threads as there are processors; only some rows wait at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), 1024):
            yield from pool.map(work, rows[start : start + 1024])


def load_picture(path: str | Path, size: int | tuple[int, int]) -> "Tensor":
    """The picture as (3, height, width) float32 in [-1, 1]; `size` is its side, or (width, height).

    Upright by EXIF, transparency on white, cropped to the centre, Lanczos. Raises UserError naming the path.
    """
    return _fitted(open_picture(path), size)


def picture_pixels(picture: Image.Image, size: int | tuple[int, int]) -> "Tensor":
    """As `load_picture`, of a picture in memory."""
    return _fitted(_rgb(picture), size)


def _fitted(picture: Image.Image, size: int | tuple[int, int]) -> "Tensor":
    fitted = ImageOps.fit(picture, (size, size) if isinstance(size, int) else size, Image.Resampling.LANCZOS)
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32) / 127.5 - 1


def open_picture(path: str | Path) -> Image.Image:
    """In RGB, upright by EXIF, transparency on white. Raises UserError naming the path."""
    try:
        with Image.open(path) as opened:
            return _rgb(opened)
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise UserError(f"{path}: {error}") from error


def _rgb(opened: Image.Image) -> Image.Image:
    """Upright by EXIF, transparency on white."""
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    elif picture.mode == "F":
        raise ValueError("its numbers have no known white; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit greys (modes I;16 and I) to 8 bits; Pillow's own conversion clips all above 255 to white."""
    import numpy

    values = numpy.asarray(picture).astype(numpy.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its numbers have no known white; save it with 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(numpy.uint8))


def _size_or_problem(row: Row) -> tuple[int, int] | str:
    try:
        return open_picture(row.path).size
    except UserError as error:
        return str(error)


def _from_metadata(path: Path, files: dict[str, Path], report: _Report) -> dict[str, str]:
    captions: dict[str, str] = {}
    for where, row in _metadata_rows(path, report):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            found = ", ".join(str(key) for key in row) or "nothing"
            report.add(f"rows without a file_name in {path.name}", f"{where}: has {found}")
            continue
        caption = next((row[column] for column in _CAPTION_COLUMNS if row.get(column)), "")
        caption = caption if isinstance(caption, str) else ""
        if not (is_text(name) and is_text(caption)):
            report.add(
                f"rows of {path.name} with half a surrogate pair, which is no text (write the whole letter)",
                f"{where}: {visible(name)}: {visible(caption)[:60]}",
            )
            captions[name] = "?"  # reported
            continue
        name = os.path.normpath(name).replace(os.sep, "/")
        if name not in files or files[name].suffix.lower() not in PICTURE_TYPES | _REFUSED_TYPES:
            report.add(
                f"rows of {path.name} that name an absent picture (correct the name or delete the row)",
                f"{where}: {row['file_name']}",
            )
        elif name in captions:
            report.add(f"rows of {path.name} that repeat a picture", f"{where}: {name}")
        captions[name] = caption
    return captions


def _metadata_rows(path: Path, report: _Report) -> list[tuple[str, dict[str, object]]]:
    """Each row with where it stands, for messages."""
    text = _read_text(path, report)
    rows: list[tuple[str, dict[str, object]]] = []
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                where = f"{path.name} line {reader.line_num}"
                if None in row:  # an unquoted comma: what follows it would be lost
                    report.add("rows with too many cells (put a caption with commas in quotation marks)", where)
                rows.append((where, dict(row)))
        except csv.Error as error:  # a quotation mark that is never closed makes one endless cell
            report.add("lines that are not CSV", f"{path.name} line {reader.line_num}: {error}")
        return rows
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, an endless number, endless brackets
            value = None
        if isinstance(value, dict):
            rows.append((where, value))
        else:
            report.add("lines that are not a JSON object", where)
    return rows


def _from_text_files(files: dict[str, Path], report: _Report) -> dict[str, str]:
    captions, used = {}, set()
    for name, path in files.items():
        beside = path.with_suffix(".txt")
        if path.suffix.lower() in PICTURE_TYPES and beside.is_file():
            captions[name] = _read_text(beside, report)
            used.add(beside)
    orphans = [name for name, path in files.items() if path.suffix == ".txt" and path not in used]
    if orphans:  # only a warning: it may be a licence
        warnings.warn(_listed("text files without a picture beside them, ignored", orphans, 3), stacklevel=3)
    return captions


def _read_text(path: Path, report: _Report) -> str:
    try:
        return read_text(path)
    except (UserError, OSError) as error:
        report.add("files that cannot be read", str(error))
        return ""
