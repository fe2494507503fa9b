"""Every kind of source: the same pictures and captions whatever they lie in, each counted, each mistake named.

Oracle: the folder that they came from, and counts by hand.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pixart_ft.config.sources import PictureSource
from pixart_ft.config.train import load_config
from pixart_ft.data.folders import read_folder
from pixart_ft.data.rows import Account, Row, said_by
from pixart_ft.data.sources import survey_source, times_shown
from pixart_ft.errors import UserError
from pixart_ft.training.encode import read_pictures
from pixart_ft.training.places import check_training
from tests.helpers.packed import SHAPES, as_folder, as_parquet, as_tars, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of datasets")


@pytest.fixture
def rows(pictures: Path) -> list[Row]:
    return read_folder(pictures)[:5]


def look(place: Mapping[str, Any]) -> Account:
    """What a source of a configuration holds."""
    (source,) = load_config({"data": {"sources": [dict(place)]}}).data.sources
    return survey_source(source, "data.sources[0]")


def png(colour: str = "red", mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(data, format="PNG")
    return data.getvalue()


def table(folder: Path, cells: dict[str, list[Any]], **kinds: Any) -> dict[str, Any]:
    """A Parquet file with these cells; `kinds` are features that do not follow from them."""
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict(cells)
    features = data.features | kinds if kinds else data.features
    data.cast(datasets.Features(features)).to_parquet(folder / "all.parquet")
    return {"parquet": str(folder / "all.parquet")}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_pictures_in_every_shape(shape: str, rows: list[Row], tmp_path: Path) -> None:
    account = look(SHAPES[shape](rows, tmp_path / "it"))
    found = account.usable()
    assert [(row.caption, row.content()) for row in found] == [(row.caption, row.content()) for row in rows]
    assert [row.digest(row.content()) for row in found] == [row.digest(row.content()) for row in rows]
    assert (account.pictures, account.orphans, account.wrong) == (5, 0, {})
    assert len({row.name for row in found}) == 5 and str(tmp_path) in str(found[0].where)


def test_every_fault_of_tar_files_is_named_and_every_picture_counted(tmp_path: Path) -> None:
    said = json.dumps({"text": "by JSON"}).encode()
    write_tar(tmp_path / "a.tar", {
        "good": {"PNG": png(), "txt": b"good"},
        "sub/good": {"jpg.png": png("blue"), "json": said},
        "two": {"png": png(), "seg.png": png(), "txt": b"two"},
        "mute": {"png": png()},
        "raw": {"heic": b"?", "txt": b"raw"},
        "alone": {"txt": b"of nothing"},
        ".hidden": {"png": png(), "txt": b"hidden"},
        "number": {"png": png(), "json": b'{"text": 3}'},
        "broken": {"png": png(), "json": b"{"},
    })  # fmt: skip
    (tmp_path / "b.tar").write_bytes(b"no tar file at all" * 60)
    whole = tmp_path / "c.tar"
    write_tar(whole, {"whole": {"png": png(), "txt": b"whole"}, "cut": {"txt": b"cut", "png": b"0" * 5000}})
    whole.write_bytes(whole.read_bytes()[:4000])
    account = look({"webdataset": str(tmp_path)})
    assert [(row.name, row.caption) for row in account.rows] == [
        ("a.tar/good.PNG", "good"),
        ("a.tar/sub/good.jpg.png", "by JSON"),
        ("c.tar/whole.png", "whole"),
    ]
    assert (account.pictures, account.orphans) == (8, 2)  # whole, and all of a.tar but alone and .hidden
    assert {kind: len(items) for kind, items in account.wrong.items()} == {
        "names with no picture or several (say how its name ends by image)": 1,
        "pictures without a caption (a .txt or .json of their name)": 2,
        "pictures of a type that is not read (convert to PNG, or take them out)": 1,
        "captions that are no text": 1,
        "captions that cannot be read": 1,
        "tar files that are broken, or no tar file": 2,
        "members that the end of their tar file cuts short": 1,
    }
    (tmp_path / "b.tar").unlink()
    whole.unlink()
    other = look({"webdataset": str(tmp_path / "*.tar"), "image": "seg.png"})
    assert [row.name for row in other.rows] == ["a.tar/two.seg.png"]


def test_a_tar_file_cut_short_in_use_is_told(rows: list[Row], tmp_path: Path) -> None:
    found = look(as_tars(rows, tmp_path / "it")).usable()
    shard = tmp_path / "it" / "b.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match=r"0002\.png: the tar file was cut short"):
        found[-1].content()


def test_every_fault_of_a_table_is_named_and_every_picture_counted(tmp_path: Path) -> None:
    image = datasets.Image()
    cells: dict[str, list[Any]] = {
        "image": [{"bytes": png(), "path": "a.png"}, {"bytes": png("blue"), "path": "a.png"}, None, None,
                  {"bytes": png(), "path": None}],
        "text": ["red", "blue", "of nothing", None, " "],
    }  # fmt: skip
    account = look(table(tmp_path / "t", cells, image=image))
    assert [(row.name, row.caption, str(row.where)) for row in account.rows] == [
        ("a.png", "red", f"the Parquet file {tmp_path}/t/all.parquet row 0"),
        ("row 00000001", "blue", f"the Parquet file {tmp_path}/t/all.parquet row 1"),
    ]
    assert (account.pictures, account.orphans) == (3, 2)
    assert {kind: len(items) for kind, items in account.wrong.items()} == {
        "rows without a picture": 2,
        "pictures without a caption": 1,
    }
    one: dict[str, list[Any]] = {"img": [{"bytes": png(), "path": None}], "Text ": ["a"]}
    wrong = look(table(tmp_path / "u", one, img=image)).wrong
    said = "\n".join(item for items in wrong.values() for item in items)
    assert "image: its pictures are in img, say image: img" in said and 'write text instead of "Text "' in said
    numbers = table(tmp_path / "v", {"image": [3], "text": ["a"]})
    assert look(numbers).wrong == {"columns that hold no pictures": [f"image: {datasets.Value('int64')}"]}


def test_a_parquet_file_replaced_by_one_of_the_same_size_and_time_is_read_anew(rows: list[Row], tmp_path: Path) -> None:
    place = table(tmp_path / "t", {"image": [png("red")], "text": ["one"]})
    assert [row.caption for row in look(place).rows] == ["one"]
    file = Path(place["parquet"])
    before = file.stat()
    table(tmp_path / "t", {"image": [png("red")], "text": ["two"]})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert [row.caption for row in look(place).rows] == ["two"]


def test_several_captions_come_with_their_shares() -> None:
    cells: dict[str, object] = {"short": "a", "long": [" b ", "c", "", None], "none": None, "text": "t", "number": 3}
    source = PictureSource(folder="x", caption=("short", "long", "none"), caption_weights=(1.0, 3.0, 5.0))
    assert said_by(cells, source) == {"a": 0.25, "b": 0.375, "c": 0.375}
    assert said_by(cells, PictureSource(folder="x", caption=("short", "long"))) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert said_by({"x": "a", "y": "a"}, PictureSource(folder="x", caption=("x", "y"))) == {"a": 1.0}
    assert said_by(cells, PictureSource(folder="x")) == {"t": 1.0}
    assert said_by({"text": ["a tag", "another"]}, PictureSource(folder="x")) is None
    assert said_by(cells, PictureSource(folder="x", caption=("number",))) is None
    assert said_by(cells, PictureSource(folder="x", caption=("none",))) == {}


def test_a_table_of_a_folder_gives_several_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "all": ["one", "two"], "text": "no"}))
    (row,) = look({"folder": str(tmp_path), "caption": "all"}).usable()
    assert (row.caption, row.captions, row.shares) == ("one", ("one", "two"), (0.5, 0.5))
    lacking = look({"folder": str(tmp_path), "caption": "al"}).wrong["columns that metadata.jsonl lacks"]
    assert 'al: it has "file_name", "all", "text"; write al instead of "all"' in lacking[0]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").write_text("one")
    assert any("there is no table" in kind for kind in look({"folder": str(tmp_path), "caption": "all"}).wrong)


def test_transparency_lies_on_the_colour_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("#00000000", "RGBA"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = {}
    for colour in ("white", "#ffffff", "black", "#00ff00"):
        clear, solid = look({"folder": str(tmp_path), "background": colour}).usable()
        found[colour] = clear.opened().picture.getpixel((3, 3))
        names = [row.digest(row.content()) for row in (clear, solid)]
        assert [" on " in name for name in names] == [colour in ("black", "#00ff00"), False]
        assert solid.opened().picture.getpixel((3, 3)) == (0, 0, 255)
    white = (255, 255, 255)
    assert found == {"white": white, "#ffffff": white, "black": (0, 0, 0), "#00ff00": (0, 255, 0)}


@pytest.mark.parametrize(
    ("counts", "weights", "times"),
    [((10, 10), (1, 1), (1, 1)), ((10, 10), (1, 3), (1, 3)), ((10, 40), (1, 1), (4, 1)), ((10, 10), (2, 3), (2, 3)),
     ((1, 1000), (1, 9), (111, 1)), ((30, 20, 0), (1, 1, 1), (2, 3, 1))],
)  # fmt: skip
def test_weights_become_how_often_pictures_are_shown(
    counts: tuple[int, ...], weights: tuple[float, ...], times: tuple[int, ...]
) -> None:
    sources = {str(n): PictureSource(folder="x", weight=weight) for n, weight in enumerate(weights)}
    found = times_shown(sources, {str(n): count for n, count in enumerate(counts)})
    assert tuple(found.values()) == times
    shown = [count * found[str(n)] for n, count in enumerate(counts)]
    asked = [weight / sum(w for w, c in zip(weights, counts, strict=True) if c) for weight in weights]
    for share, wanted, count in zip(shown, asked, counts, strict=True):
        assert not count or math.isclose(share / sum(shown), wanted, rel_tol=0.11)


def test_weights_that_make_an_endless_epoch_are_refused() -> None:
    sources = {"a": PictureSource(folder="x", weight=1e6), "b": PictureSource(folder="x", weight=1e-6)}
    with pytest.raises(UserError, match="by these weights an epoch has 1,000,000,000,00"):
        times_shown(sources, {"a": 1, "b": 1})


def test_sources_are_put_together_and_reconcile_to_the_last_picture(rows: list[Row], tmp_path: Path) -> None:
    tars, parquet = as_tars(rows, tmp_path / "tars"), as_parquet(rows, tmp_path / "parquet")
    folder, prior = as_folder(rows, tmp_path / "folder"), as_folder(rows[:3], tmp_path / "prior")
    (tmp_path / "folder" / "0004.txt").unlink()
    config = load_config({
        "data": {
            "sources": [folder, tars | {"repeats": 3}, parquet | {"use": "held_out"}, prior | {"use": "prior"}],
            "strict": False,
        },
        "validation": {"pictures": 2},
    })  # fmt: skip
    with pytest.warns(UserWarning, match="left out of the picture folder"):
        found = read_pictures(config)
    assert found.facts() == [
        "in data.sources[0] 5 pictures: 4 trained on, 1 left out",
        "in data.sources[1] 5 pictures: 5 trained on",
        "in data.sources[2] 5 pictures: 2 measured, 3 held out beyond validation.pictures",
        "in data.sources[3] 3 pictures: 3 of the prior",
    ]
    captions = [row.caption for row in rows]
    assert [row.caption for row in found.train] == captions[:4] + captions * 3
    assert [row.caption for row in found.held] == captions[:2] and len(found.prior) == 3


def test_a_part_of_every_source_may_be_held_out(rows: list[Row], tmp_path: Path) -> None:
    """Names of two sources may be equal; what is held out is measured once and trained on never."""
    one, two = as_folder(rows, tmp_path / "one"), as_folder(rows[::-1], tmp_path / "two")
    found = read_pictures(
        load_config({"data": {"sources": [one, two | {"repeats": 2}], "held_out_fraction": 0.3}, "run": {"seed": 1}})
    )
    assert len(found.held) == 3
    held = {str(row.where) for row in found.held}
    assert not held & {str(row.where) for row in found.train}
    assert sum(counts["trained on"] for counts in found.uses.values()) == 7


def test_all_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    config = load_config({
        "model": {"base": "demo"},
        "run": {"folder": str(tmp_path / "run")},
        "data": {
            "sources": [
                {"folder": "demo"},
                {"parquet": str(tmp_path / "{0..9}.parquet")},
                {"webdataset": [str(tmp_path), "no.tar"]},
                {"dataset": "./none"},
                {"folder": str(tmp_path / "cats"), "use": "prior"},
            ]
        },
    })  # fmt: skip
    with pytest.raises(UserError) as caught:
        check_training(config)
    said = str(caught.value)
    assert (
        "write * for the numbers in place of braces" in said and "data.sources[2].webdataset: there is no file" in said
    )
    assert "data.sources[3]: the folder ./none does not exist" in said
    assert (
        "pixart-ft generate --model demo --prompts-file CLASS.txt --images-per-prompt 10 --captions "
        f"--out {tmp_path / 'cats'}" in said
    )


def test_what_datasets_refuses_is_a_mistake_that_can_be_mended(rows: list[Row], tmp_path: Path) -> None:
    saved = SHAPES["as_saved"](rows, tmp_path / "saved")
    with pytest.raises(UserError, match="no such split; give one of good, other"):
        look(saved | {"split": "bad"})
    folder = as_folder(rows, tmp_path / "folder")["folder"]
    for text in Path(folder).glob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match="give it as folder"):
        look({"dataset": folder})
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"the Parquet file .*bad.parquet cannot be loaded: .*arquet"):
        look({"parquet": str(tmp_path / "bad.parquet")})
    with pytest.raises(UserError, match=r"the dataset nobody/nothing \(train\) cannot be loaded"):
        look({"dataset": "nobody/nothing"})


def test_the_column_that_is_no_text_is_the_one_shown(rows: list[Row], tmp_path: Path) -> None:
    place = as_folder(rows[:1], tmp_path / "folder")
    (tmp_path / "folder" / "metadata.jsonl").write_text(json.dumps({"file_name": "0000.png", "x": "good", "y": 5}))
    (wrong,) = look({**place, "caption": ["x", "y"]}).wrong.values()
    assert wrong == ["metadata.jsonl line 1: 0000.png: 5"]


def test_sources_of_which_none_is_trained_on_are_refused(pictures: Path) -> None:
    config = load_config({}, {"data.folder": pictures})
    data = config.data.model_copy(update={"folder": None, "prior": str(pictures)})
    with pytest.raises(UserError, match="no source is trained on; give"):
        read_pictures(config.model_copy(update={"data": data}))
