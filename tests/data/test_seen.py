"""Pictures read and decoded once. Oracles: files made here with known content; a memo that says what was not there."""

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import load_picture
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import Seen, look_at, verified
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


@pytest.mark.parametrize("damage", ["", "[]", "no JSON", "[" * 10**5, '{"%s": ["x", 2]}', '{"%s": [1]}', '{"%s": 3}'])
def test_a_damaged_memo_is_only_a_memory(tmp_path: Path, damage: str) -> None:
    row, memo = row_of(tmp_path / "a.png", (16, 8)), tmp_path / "pictures.json"
    (seen,) = verified([row])
    memo.write_text(damage.replace("%s", seen.digest))
    assert look_at([row], memo, remember=True) == [seen]
    assert json.loads(memo.read_text()) == {seen.digest: [16, 8]}


def test_the_test_pictures_can_be_read(pictures: Path) -> None:
    rows = read_folder(pictures)
    assert len(verified(rows)) == 12 and rows[0].caption == "a red circle on grey"
