"""The same captioned pictures in every shape that data.sources takes."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from pixart_ft.data.rows import Row


def as_folder(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Text files beside the pictures."""
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"{number:04d}.png").write_bytes(row.content())
        (folder / f"{number:04d}.txt").write_text(row.caption)
    return {"folder": str(folder)}


def as_folder_with_a_table(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """metadata.parquet, with columns of other names."""
    place = as_folder(rows, folder)
    for text in folder.glob("*.txt"):
        text.unlink()
    names = [f"{number:04d}.png" for number in range(len(rows))]
    _table({"file": names, "says": [row.caption for row in rows]}).to_parquet(folder / "metadata.parquet")
    return place | {"image": "file", "caption": "says"}


def as_parquet(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Two files, in the Image feature's columns."""
    folder.mkdir()
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        _pictures(part).to_parquet(folder / f"part-{number}.parquet")
    return {"parquet": f"{folder}/part-*.parquet"}


def as_bytes_in_parquet(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """One file with plain bytes, in columns of other names."""
    folder.mkdir()
    cells = {"jpg": [row.content() for row in rows], "says": [row.caption for row in rows]}
    _table(cells).to_parquet(folder / "all.parquet")
    return {"parquet": str(folder), "image": "jpg", "caption": "says"}


def as_saved(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """As save_to_disk writes splits."""
    datasets.DatasetDict({"good": _pictures(rows), "other": _pictures(rows[:1])}).save_to_disk(folder)
    return {"dataset": str(folder), "split": "good"}


def as_data_files(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """A folder of data files, as a dataset of the Hub is one."""
    (folder / "data").mkdir(parents=True)
    _pictures(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return {"dataset": str(folder)}


def as_tars(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Two shards, what is said in text files of the one and in JSON of the other."""
    folder.mkdir()
    half = len(rows) // 2
    samples = [{"png": row.content(), "txt": row.caption.encode()} for row in rows[:half]]
    write_tar(folder / "a.tar", {f"{number:04d}": sample for number, sample in enumerate(samples)})
    said = [{"png": row.content(), "json": json.dumps({"caption": row.caption}).encode()} for row in rows[half:]]
    write_tar(folder / "b.tar", {f"{number:04d}": sample for number, sample in enumerate(said)})
    return {"webdataset": str(folder)}


SHAPES: dict[str, Callable[[Sequence[Row], Path], dict[str, Any]]] = {
    shape.__name__: shape
    for shape in (
        *(as_folder, as_folder_with_a_table, as_parquet, as_bytes_in_parquet),
        *(as_saved, as_data_files, as_tars),
    )
}


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A tar file of members name.ending."""
    with tarfile.open(path, "w") as tar:
        for name, members in samples.items():
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _pictures(rows: Sequence[Row]) -> datasets.Dataset:
    cells = {"image": [{"bytes": row.content(), "path": None} for row in rows], "text": [row.caption for row in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(cells, features=features)


def _table(cells: Mapping[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(dict(cells))
