"""Pictures read and decoded once. Oracles: files made here with known content; a memo that says what was not there."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from PIL import Image

from pixart_ft.config.sources import PictureSource
from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import load_picture
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import Seen, look_at, verified
from pixart_ft.data.tars import survey_tars
from pixart_ft.errors import UserError


def row_of(path: Path, size: tuple[int, int] | None = None, colour: str = "red") -> Row:
    if size:
        Image.new("RGB", size, colour).save(path)
    return Row(path, "a caption", path.name)


def test_every_unreadable_picture_is_listed(tmp_path: Path) -> None:
    good = row_of(tmp_path / "good.png", (16, 16))
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    bad = [tmp_path / name for name in ("short.png", "short.jpg", "short.webp")]
    for path in bad:
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, content in (("text.png", b"no picture"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        bad.append(tmp_path / name)
    Image.fromarray(numpy.zeros((8, 8), dtype=numpy.float32)).save(tmp_path / "floats.tif")
    bad += [tmp_path / "floats.tif", tmp_path / "gone.png"]
    rows = [good, *map(row_of, bad)]
    with pytest.raises(UserError) as caught:
        verified(rows, progress=False)
    message = str(caught.value)
    assert "pictures that cannot be read (repair them or move them out): 7" in message
    assert all(str(path) in message for path in bad) and "good.png" not in message
    assert isinstance(look_at(rows, progress=False)[0], Seen)
    with pytest.raises(UserError, match=r"text\.png: cannot identify"):
        load_picture(tmp_path / "text.png", 8)


def test_sizes_are_those_of_pictures_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
    rows = [row_of(tmp_path / "a.jpg"), row_of(tmp_path / "b.png", (16, 8))]
    assert [found.size for found in verified(rows)] == [(8, 16), (16, 8)]


def test_what_was_decoded_once_is_read_and_not_decoded_again(tmp_path: Path) -> None:
    rows = [row_of(tmp_path / "a.png", (16, 8)), row_of(tmp_path / "b.png", (9, 9), "blue")]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows.append(row_of(tmp_path / "bad.png"))
    memo = tmp_path / "cache" / "pictures.json"
    first = look_at(rows, memo)
    assert not memo.parent.exists()
    assert look_at(rows, memo, remember=True) == first == look_at(rows, memo)
    known = json.loads(memo.read_text())
    a, b = (one.digest for one in first[:2] if isinstance(one, Seen))
    assert known == {a: [16, 8], b: [9, 9]}  # what cannot be read is looked at each time
    memo.write_text(json.dumps(known | {a: [1, 2, "as it was remembered"]}))
    assert look_at(rows, memo)[0] == Seen(a, (1, 2), ("as it was remembered",))
    row_of(tmp_path / "a.png", (4, 4), "green")
    (changed, *_) = look_at(rows, memo)
    assert isinstance(changed, Seen) and changed.size == (4, 4)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of just now count as unchanged for long."""
    monkeypatch.setattr("pixart_ft.data.seen._UNSETTLED", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures whose files are read from here on."""
    names: list[str] = []
    content = Row.content

    def noted(row: Row) -> bytes:
        names.append(row.name)
        return content(row)

    monkeypatch.setattr(Row, "content", noted)
    return names


@pytest.mark.usefixtures("settled")
def test_files_that_are_as_they_were_are_not_read_again(tmp_path: Path, read: list[str]) -> None:
    """Another content of the same size and time is, and so is the picture of another mask or colour behind it."""
    path, mask = tmp_path / "a.bmp", tmp_path / "mask.png"
    rows = [row_of(path, (16, 8), "red"), row_of(tmp_path / "b.bmp", (16, 8), "blue")]
    Image.new("L", (16, 8), 255).save(mask)
    rows.append(replace(rows[1], mask=mask))
    memo = tmp_path / "cache" / "pictures.json"
    first = look_at(rows, memo, remember=True)
    read.clear()
    assert look_at(rows, memo) == first and not read
    before, content = path.stat(), (tmp_path / "b.bmp").read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert look_at(rows, memo) == [first[1], *first[1:]] and read == ["a.bmp"]
    Image.new("L", (16, 8), 0).save(mask)
    assert look_at(rows, memo)[2] == f"{mask}: a mask that leaves nothing of {rows[1].where} to train on"
    read.clear()
    assert look_at([replace(rows[1], background="black")], memo) == [first[1]] and read == ["b.bmp"]
    path.unlink()
    assert "there is no such file" in str(look_at(rows, memo)[0])


@pytest.mark.usefixtures("settled")
def test_members_of_a_tar_file_are_known_by_it_and_their_place(tmp_path: Path, read: list[str]) -> None:
    row_of(tmp_path / "a.png", (16, 8))
    shard, memo = tmp_path / "0.tar", tmp_path / "pictures.json"

    def rows() -> list[Row]:
        with tarfile.open(shard, "w") as tar:
            for name in ("0.png", "1.png"):
                tar.add(tmp_path / "a.png", name)
                text = tarfile.TarInfo(f"{name[0]}.txt")
                text.size = 1
                tar.addfile(text, io.BytesIO(b"x"))
        return survey_tars([shard], PictureSource(webdataset=(str(shard),))).rows

    found = look_at(first := rows(), memo, remember=True)
    assert look_at(first, memo) == found and len(read) == 2
    assert look_at(rows(), memo) == found and len(read) == 4


def test_a_file_of_just_now_is_read_again(tmp_path: Path, read: list[str]) -> None:
    """A second change in the same tick of the clock would leave all that is known of it as it was."""
    row, memo = row_of(tmp_path / "a.png", (16, 8)), tmp_path / "pictures.json"
    look_at([row], memo, remember=True)
    look_at([row], memo)
    assert read == ["a.png"] * 2


@pytest.mark.parametrize("damage", ["", "[]", "no JSON", "[" * 10**5, '{"%s": ["x", 2]}', '{"%s": [1]}', '{"%s": 3}'])
def test_a_damaged_memo_is_only_a_memory(tmp_path: Path, damage: str) -> None:
    row, memo = row_of(tmp_path / "a.png", (16, 8)), tmp_path / "pictures.json"
    (seen,) = verified([row])
    memo.write_text(damage.replace("%s", seen.digest))
    assert look_at([row], memo, remember=True) == [seen]
    assert json.loads(memo.read_text()) == {seen.digest: [16, 8]}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["", "[]", "[" * 10**5, '{"%s": 3}', '{"%s": "another"}', '{"%s": ["x"]}'])
def test_damaged_places_are_only_a_memory(tmp_path: Path, damage: str) -> None:
    row, memo = row_of(tmp_path / "a.png", (16, 8)), tmp_path / "pictures.json"
    seen = look_at([row], memo, remember=True)
    places = tmp_path / "places.json"
    whole = places.read_text()
    (mark,) = json.loads(whole)
    places.write_text(damage.replace("%s", mark))
    assert look_at([row], memo, remember=True) == seen
    assert places.read_text() == whole


def test_the_test_pictures_can_be_read(pictures: Path) -> None:
    rows = read_folder(pictures)
    assert len(verified(rows)) == 12 and rows[0].caption == "a red circle on grey"
