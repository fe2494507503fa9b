"""Datasets and Parquet files by the library `datasets`: the bytes of a picture are read when they are wanted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_ft.config.sources import ALPHA, PictureSource
from pixart_ft.config.text import is_text, visible
from pixart_ft.data.rows import CAPTION_COLUMNS, Account, Report, Row, named_columns, point_at_columns, said_by
from pixart_ft.errors import UserError
from pixart_ft.files import sha256, stamp

if TYPE_CHECKING:  # it takes a second to import
    from datasets import Dataset

_AT_ONCE = 1000  # rows looked at


@dataclass(frozen=True, slots=True)
class Cell:
    """The picture in a row of a table."""

    table: "_Table"
    number: int

    def read_bytes(self) -> bytes:
        """Its bytes, or those of the file that the row names."""
        cell = self.table.pictures[self.number].column(0)[0].as_py()
        if isinstance(cell, bytes):
            return cell
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def stamp(self) -> None:
        """None: the library may have its rows from anywhere."""

    def __str__(self) -> str:
        return f"{self.table.name} row {self.number}"


@dataclass(frozen=True, eq=False)
class _Table:
    name: str
    pictures: "Dataset"  # one column


def survey_parquet(files: Sequence[Path], asked: PictureSource) -> Account:
    """The captioned pictures of Parquet files, see `_survey`. Raises UserError for files that are none."""
    from datasets import load_dataset

    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    name = f"the Parquet file {files[0]}{more}"
    with _loading(name):
        names = [str(file.absolute()) for file in files]
        table = load_dataset("parquet", data_files=names, split="train", cache_dir=_cache_of(files))
    return _survey(table, name, asked)


def survey_dataset(asked: PictureSource) -> Account:
    """The captioned pictures of a dataset of the Hub or a folder, see `_survey`. Raises UserError if it is none."""
    import datasets

    assert asked.dataset is not None
    place, name = Path(asked.dataset), f"the dataset {asked.dataset} ({asked.split})"
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():  # as save_to_disk writes it
        with _loading(name):
            found = datasets.load_from_disk(str(place))
        table = found
        if isinstance(found, datasets.DatasetDict):
            if asked.split not in found:
                raise UserError(f"{name} has no such split; give one of {', '.join(found)}")
            table = found[asked.split]
        elif asked.split not in ("train", str(table.split)):
            raise UserError(f"{name} has no splits; leave split out")
    else:
        here = place.is_dir()
        cache = _cache_of([file for file in sorted(place.rglob("*")) if file.is_file()]) if here else None
        with _loading(name):
            table = datasets.load_dataset(
                asked.dataset, asked.subset, split=asked.split, revision=asked.revision, cache_dir=cache
            )
        if here and table.info.builder_name == "imagefolder":
            raise UserError(f"{name} is a folder of pictures; give it as folder, by which none is left out unsaid")
    return _survey(table, name, asked)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what the library raises into a UserError."""
    try:
        yield
    except Exception as error:  # for a broken file or a wrong name it raises almost anything
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise UserError(f"{name} cannot be loaded: {str(reason).strip() or type(reason).__name__}") from error


def _cache_of(files: Sequence[Path]) -> str:
    """Where the library keeps what it makes of local files; by itself it takes one of the same time for the same."""
    from datasets import config

    digest = sha256("\n".join(f"{file.absolute()} {stamp(file)}" for file in files).encode(errors="backslashreplace"))
    return str(Path(config.HF_DATASETS_CACHE) / f"pixart_ft-{digest[:16]}")


def _survey(table: "Dataset", name: str, asked: PictureSource) -> Account:
    """The captioned pictures of a table, and every picture and caption that cannot be used; its rows count from 0."""
    import datasets

    report, column = Report(), asked.image or "image"
    for key in filter(None, (column, asked.mask_column)):
        kind = table.features.get(key)
        if isinstance(kind, datasets.Image):
            table = table.cast_column(key, datasets.Image(decode=False))
        elif kind is not None and not (_is_bytes(kind) or (isinstance(kind, dict) and {"bytes", "path"} <= set(kind))):
            report.add("columns that hold no pictures", f"{key}: {kind}")
    feature = table.features.get(column)
    needed = [(column,), *named_columns(asked)]
    pictured = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if feature is None and len(pictured) == 1:
        report.add(
            f"columns that {name} lacks", f"{column}: its pictures are in {pictured[0]}, say image: {pictured[0]}"
        )
        needed = needed[1:]
    point_at_columns(name, table.column_names, needed, report)
    if report.found:
        return Account(name, [], len(table) if feature is not None else 0, 0, report.found)
    texts = [key for key in asked.caption or CAPTION_COLUMNS if key in table.column_names]
    holder, masks = (
        _Table(name, table.select_columns([key]).with_format("arrow")) for key in (column, asked.mask_column or column)
    )
    has_mask = _has_picture(table, asked.mask_column) if asked.mask_column else repeat(False)
    rows: list[Row] = []
    pictures, before = 0, set[str]()
    each = zip(_rows(table, column, texts), has_mask, strict=False)
    for number, ((path, there, cells), masked) in enumerate(each):
        where = Cell(holder, number)
        said = said_by(cells, asked)
        if not there:
            report.add("rows without a picture", str(where))
            continue
        pictures += 1
        if said is None:
            report.add("captions that are no text", str(where))
        elif not said:
            report.add("pictures without a caption", str(where))
        elif not all(map(is_text, said)):
            report.add("captions with half a surrogate pair, which is no text", f"{where}: {visible(str(said))[:60]}")
        else:
            called = path if path and path not in before else f"row {number:08d}"
            mask = where if asked.mask == ALPHA else Cell(masks, number) if masked else None
            rows.append(Row.of(where, said, called, asked.background, mask))
            before.add(path or "")
    if not pictures:
        report.add("tables without a picture", name)
    return Account(name, rows, pictures, len(table) - pictures, report.found)


def _has_picture(table: "Dataset", column: str) -> Iterator[bool]:
    """Of each row whether a column of pictures has one."""
    return (there for _, there, _ in _rows(table, column, []))


def _is_bytes(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _rows(table: "Dataset", column: str, texts: list[str]) -> Iterator[tuple[str | None, bool, dict[str, object]]]:
    """Of each row the picture's file name if there is one, whether there is a picture, and the cells of `texts`.

    No picture's bytes are read.
    """
    import pyarrow.compute

    for batch in table.select_columns([column, *texts]).with_format("arrow").iter(_AT_ONCE):
        pictures = batch.column(column)
        if pyarrow.types.is_struct(pictures.type):
            paths = pyarrow.compute.struct_field(pictures, "path").to_pylist()
            lacking = pyarrow.compute.struct_field(pictures, "bytes").is_null().to_pylist()
        else:
            paths, lacking = [None] * len(pictures), pictures.is_null().to_pylist()
        cells = batch.select(texts).to_pylist() if texts else [{}] * len(paths)
        for path, lacks, row in zip(paths, lacking, cells, strict=True):
            yield path, not lacks or path is not None, row
