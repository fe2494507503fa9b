"""A folder of captioned pictures in, rows out."""

import csv
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from pixart_ft.config.sources import ALPHA, PictureSource
from pixart_ft.config.text import is_text, read_text, visible
from pixart_ft.data.pixels import is_picture, picture_types, refused_types
from pixart_ft.data.rows import (
    CAPTION_COLUMNS,
    Account,
    File,
    Report,
    Row,
    Said,
    listed,
    named_columns,
    point_at_columns,
    said_by,
    texts_in,
)
from pixart_ft.errors import UserError
from pixart_ft.files import reason_of

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
_TABLE_TYPES = (".json", ".csv", ".tsv", ".ndjson")
_PACKED_TYPES = frozenset({".tar", ".tgz", ".gz", ".zip", ".rar", ".7z", ".parquet", ".arrow"})
_NEARLY_TXT = frozenset({".txt", ".caption", ".captions", ".cap", ".text"})
ENDINGS = {"parquet": ".parquet", "webdataset": ".tar"}  # of the files of a kind of source
_REST = "\0"  # the cells of a row that no column has; a name that no column can have

PLAIN = PictureSource(folder=".")  # what a source asks for that asks for nothing

DEMO_PICTURES = Path(__file__).parents[1] / "demo" / "pictures"


def picture_folder(name: str, part: str) -> Path:
    """The folder that data.folder (part "train") or data.held_out (part "held_out") means."""
    return DEMO_PICTURES / part if name == "demo" else Path(name)


def check_folder(folder: Path, key: str = "data.folder") -> None:
    """Raise UserError unless there is such a folder."""
    if folder.is_file():
        end = folder.suffix.lower()
        remedy = "unpack it" if end in _PACKED_TYPES else f"give the folder: {folder.parent}"
        if kind := next((kind for kind, usual in ENDINGS.items() if usual == end), None):
            remedy = f"give it in data.sources: [{{{kind}: {folder}}}]"
        raise UserError(f"the picture folder {folder} is a file ({key}); {remedy}")
    if not folder.is_dir():
        raise UserError(f"the picture folder {folder} does not exist or is not a folder ({key})")


def share_pictures(one: Path, other: Path) -> bool:
    """Whether a picture may lie in both folders: they are read with all below them."""
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def read_folder(folder: str | Path) -> list[Row]:
    """The captioned pictures below a folder, see `survey`. Raises one UserError with all that is wrong."""
    return survey(folder).usable()


def survey(folder: str | Path, asked: PictureSource = PLAIN) -> Account:
    """The captioned pictures below a folder, sorted by name, and every picture and caption that cannot be used.

    Captions come from `metadata.jsonl`, `.csv`, `.tsv` or `.parquet` in the folder, else from a .txt beside each
    picture. Pictures in subfolders count, also behind links, each folder once; hidden files do not.

    asked   the columns of the captions and of the file names; else `text` or `caption`, and `file_name`

    Raises UserError unless there is such a folder.
    """
    folder = Path(folder)
    check_folder(folder)
    report = Report()
    files, lost = _files(folder, report)
    pictures = [name for name, path in files.items() if _is_taken(path)]
    refused = [name for name, path in files.items() if path.suffix.lower() in refused_types()]
    metadata = [name for name in _METADATA if name in files]
    masks = dict[str, str]()
    if metadata:
        captions, masks, orphans = _from_metadata(files[metadata[0]], {*pictures, *refused}, asked, report)
        pictures = [name for name in pictures if name not in masks.values()]
        _warn_of_other_words(metadata[0], files, pictures, captions)
    else:
        captions, orphans = _from_text_files(files, pictures, report)
        if columns := [*asked.caption, *filter(None, (asked.image, asked.mask_column))]:
            report.add(
                "columns asked for, and there is no table (metadata.jsonl, .csv, .tsv, .parquet)", ", ".join(columns)
            )
    for name in metadata[1:]:
        report.add(f"caption files beside {metadata[0]} (keep one)", name)
    rows = []
    for name in pictures:
        said = captions.get(name, {})
        if not is_text(name):
            report.add("pictures whose file names are not UTF-8 (rename them)", visible(name))
        elif said is None:  # reported
            continue
        elif said:
            where = File(folder, name)
            mask = where if asked.mask == ALPHA else File(folder, masks[name]) if masks.get(name) in files else None
            rows.append(Row.of(where, said, name, asked.background, mask))
        else:
            remedy = f"a row in {metadata[0]}" if metadata else "a .txt beside it, or a row in metadata.jsonl"
            report.add(f"pictures without a caption (give each {remedy})", name)
    for name in refused:
        report.add("pictures of a type that is not read (convert to PNG, or move them out)", name)
    if not metadata and (report.found or not pictures):
        _point_at_near_misses(folder, files, pictures, report)
    if not pictures:
        report.add("folders without a picture (JPEG, PNG, WebP and others by their first bytes)", str(folder))
    lost_pictures = [name for name in lost if Path(name).suffix.lower() in picture_types() | refused_types()]
    return Account(
        f"the picture folder {folder}", rows, len(pictures) + len(refused) + len(lost_pictures), orphans, report.found
    )


def _files(folder: Path, report: Report) -> tuple[dict[str, Path], list[str]]:
    """By name, in order, all files below a folder that are not hidden; and the names of links that lead nowhere.

    Links are followed, to each folder once: by its own name if it lies below, else by the first link to it.
    """
    found: dict[str, Path] = {}
    lost, seen = [], set()
    waiting, linked = [folder], list[Path]()
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop(linked.index(min(linked)))
        try:
            status, inside = place.stat(), list(place.iterdir())
        except OSError as error:
            report.add("folders that cannot be read", f"{place}: {reason_of(error)}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in inside:
            if path.name.startswith("."):
                continue
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                (linked if path.is_symlink() else waiting).append(path)
            elif path.is_file():
                found[name] = path
            elif path.is_symlink():
                lost.append(name)
    for name in sorted(lost):
        report.add("links that lead nowhere (mend or delete them)", f"{visible(name)} -> {os.readlink(folder / name)}")
    return {name: found[name] for name in sorted(found)}, lost


def _is_taken(path: Path) -> bool:
    """Whether a file is a picture to train on: by how its name ends, or by its first bytes if that says nothing."""
    end = path.suffix.lower()
    if end in picture_types():
        return True
    says_another = end in refused_types() | _PACKED_TYPES | _NEARLY_TXT or end.startswith(_TABLE_TYPES)
    return not says_another and is_picture(path)


def _point_at_near_misses(folder: Path, files: dict[str, Path], pictures: Sequence[str], report: Report) -> None:
    """Report files that hold what is missed, under a name by which they are not read."""
    stems = {Path(name).with_suffix("") for name in pictures}
    for name, path in files.items():
        end, stem = path.suffix.lower(), Path(name).with_suffix("")
        if end in _NEARLY_TXT and stem.suffix.lower() in picture_types():
            stem = stem.with_suffix("")  # of a.png.txt
        right = f"{stem.as_posix()}.txt"
        if end in _NEARLY_TXT and stem in stems and right != name and right not in files:
            report.add("captions by another name (rename them)", f"{name} -> {right}")
        elif end.startswith(_TABLE_TYPES):
            there = f"   (or give its folder: {path.parent})" if "/" in name and path.name in _METADATA else ""
            report.add("files that are not read (captions? name them metadata.jsonl, right here)", name + there)
        elif end in _PACKED_TYPES:
            kind = (
                "archives and tables that are not read (unpack them into files, or give .tar, .parquet in data.sources)"
            )
            report.add(kind, name)


Captions = dict[str, Said | None]  # by picture; None: what is wrong with it is reported


def _from_metadata(
    path: Path, there: set[str], asked: PictureSource, report: Report
) -> tuple[Captions, dict[str, str], int]:
    """Captions, the masks of pictures that have one, and how many captions have no picture.

    there   the names of pictures, also of those that are not read
    """
    captions: Captions = {}
    masks = dict[str, str]()
    key = asked.image or "file_name"
    orphans, columns = 0, dict[str, None]()
    for where, row in _metadata_rows(path, report):
        columns.update((key, None) for key in row if key != _REST)
        name = row.get(key)
        if not isinstance(name, str) or not name:
            found = ", ".join(column for column in row if column != _REST) or "nothing"
            report.add(f"rows without a {key} in {path.name}", f"{where}: has {found}")
            continue
        said = said_by(row, asked)
        if not all(map(is_text, (name, *(said or ())))):
            report.add(
                f"rows of {path.name} with half a surrogate pair, which is no text (write the whole letter)",
                f"{where}: {visible(name)}: {visible(', '.join(said or ()))[:60]}",
            )
            captions[name] = None
            continue
        name = os.path.normpath(name).replace(os.sep, "/")
        if name not in there:
            orphans += 1
            report.add(
                f"rows of {path.name} that name an absent picture (correct the name or delete the row)",
                f"{where}: {row[key]}",
            )
        elif _REST in row:  # an unquoted comma: what follows it would be lost
            report.add("rows with too many cells (put a caption with commas in quotation marks)", where)
            said = None
        elif name in captions:
            report.add(f"rows of {path.name} that repeat a picture", f"{where}: {name}")
            said = None
        elif said is None:
            wrong = next(
                (column, row[column])
                for column in asked.caption or CAPTION_COLUMNS
                if texts_in(row.get(column), asked) is None
            )
            remedy = "write one, in quotation marks"
            if isinstance(wrong[1], list) and not asked.caption:
                remedy = f"write one; or give the folder in data.sources, with caption: {wrong[0]}"
            report.add(
                f"captions of {path.name} that are no text ({remedy})",
                f"{where}: {name}: {visible(str(wrong[1]))[:60]}",
            )
        captions[name] = said
        mask = row.get(asked.mask_column) if asked.mask_column else None
        if mask not in (None, ""):
            masks[name] = os.path.normpath(str(mask)).replace(os.sep, "/")
            if masks[name] not in there:
                report.add(f"rows of {path.name} that name an absent mask", f"{where}: {visible(str(mask))}")
                captions[name] = None
    for name in [name for name, mask in masks.items() if mask in captions]:
        kind = f"rows of {path.name} that name as a mask a picture with a row of its own"
        report.add(kind, f"{name}: {visible(masks.pop(name))}")
        captions[name] = None
    if columns:
        point_at_columns(path.name, list(columns), [(key,), *named_columns(asked)], report)
    return captions, masks, orphans


def _metadata_rows(path: Path, report: Report) -> list[tuple[str, dict[str, object]]]:
    """Each row with where it stands, for messages."""
    if path.suffix == ".parquet":
        try:
            return [(f"{path.name} row {number}", row) for number, row in enumerate(_parquet(path))]
        except Exception as error:  # a broken file makes pyarrow raise almost anything
            report.add("files that cannot be read", f"{path}: {error}")
            return []
    text = _read_text(path, report)
    rows: list[tuple[str, dict[str, object]]] = []
    if path.suffix != ".jsonl":
        # strict: else a quotation mark that is not closed takes the rows after it into its cell
        delimiter = "\t" if path.suffix == ".tsv" else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, restkey=_REST)
        begin = 1
        try:
            if reader.fieldnames:  # the first row is read by itself
                begin = reader.line_num + 1
            for row in reader:
                rows.append((f"{path.name} line {reader.line_num}", dict(row)))
                begin = reader.line_num + 1
        except csv.Error as error:
            kind = "rows that are not CSV, and with them all below (is a quotation mark not closed, or not doubled?)"
            report.add(kind, f"{path.name}, the row that begins in line {begin}: {error}")
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


def _parquet(path: Path) -> list[dict[str, object]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _from_text_files(files: dict[str, Path], pictures: Sequence[str], report: Report) -> tuple[Captions, int]:
    """Captions, and how many text files have no picture."""
    captions: Captions = {}
    used = set()
    for name in pictures:
        beside = files[name].with_suffix(".txt")
        if beside.is_file():
            text = _read_text(beside, report).strip()
            captions[name] = {text: 1.0} if text else {}
            used.add(beside)
    orphans = [name for name, path in files.items() if path.suffix == ".txt" and path not in used]
    if orphans:  # only a warning: it may be a licence
        warnings.warn(listed("text files without a picture beside them, ignored", orphans, 3), stacklevel=4)
    return captions, len(orphans)


def _warn_of_other_words(metadata: str, files: dict[str, Path], pictures: Sequence[str], captions: Captions) -> None:
    """Warn of text files that say something else of a picture than the metadata, which counts."""
    differ = []
    for name in pictures:
        beside, said = files[name].with_suffix(".txt"), captions.get(name)
        if said and beside.is_file() and _read_text(beside, Report()).split() not in map(str.split, said):
            differ.append(Path(name).with_suffix(".txt").as_posix())
    if differ:
        told = listed(f"text files that say something else than {metadata}, which counts", differ, 3)
        warnings.warn(told, stacklevel=3)


def _read_text(path: Path, report: Report) -> str:
    try:
        return read_text(path)
    except (UserError, OSError) as error:
        report.add("files that cannot be read", str(error))
        return ""
