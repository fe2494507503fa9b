"""Reading a picture folder, splitting it, and turning a file into pixels.

Oracles: files made here with known content; every report names the path at fault. No models.
"""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import load_picture
from pixart_ft.data.rows import File, Row, split
from pixart_ft.errors import UserError


def picture(path: Path, size: tuple[int, int] = (8, 8), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def jsonl(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def row_of(path: Path) -> Row:
    return Row(path, "a caption", path.name)


# Captions


def test_jsonl_text_or_caption_in_subfolders_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.WEBP"):
        picture(tmp_path / name)
    jsonl(
        tmp_path,
        {"file_name": "b.png", "text": " Ein Bär \n"},
        {"file_name": "./sub/c.WEBP", "caption": "Cat"},
        {"file_name": "a.jpg", "text": "a dog", "caption": "not this"},
    )
    rows = read_folder(tmp_path)
    assert [(row.name, row.caption) for row in rows] == [
        ("a.jpg", "a dog"),
        ("b.png", "Ein Bär"),
        ("sub/c.WEBP", "Cat"),
    ]
    assert [row.where for row in rows] == [File(tmp_path, row.name) for row in rows]


def test_csv_with_a_byte_order_mark_and_quoted_commas(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,caption\na.png,"a cat, asleep\nin the sun"\nb.png,dog\n')
    assert [row.caption for row in read_folder(tmp_path)] == ["a cat, asleep\nin the sun", "dog"]


def test_text_files_beside_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub/b.png")
    picture(tmp_path / ".hidden/c.png")
    picture(tmp_path / "._a.png")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "sub/b.txt").write_text("a dog")
    (tmp_path / "LICENSE.txt").write_text("free")
    with pytest.warns(UserWarning, match=r"ignored: 1\n    LICENSE.txt"):
        rows = read_folder(tmp_path)
    assert [(row.name, row.caption) for row in rows] == [("a.png", "a cat"), ("sub/b.png", "a dog")]


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", "sub/.cache/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    assert [row.name for row in read_folder(tmp_path)] == ["a.png"]


def test_one_report_lists_all_that_is_wrong(tmp_path: Path) -> None:
    for name in ("good.png", "alone.png", "blank.png", "number.png", "twice.png"):
        picture(tmp_path / name)
    (tmp_path / "phone.heic").write_bytes(b"of another program")
    (tmp_path / "notes.pdf").write_text("no picture")
    jsonl(
        tmp_path,
        {"file_name": "good.png", "text": "good"},
        {"file_name": "blank.png", "text": "  "},
        {"file_name": "number.png", "text": 7},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "notes.pdf", "text": "notes"},
        {"file_name": "phone.heic", "text": "a phone's"},
        {"file_name": "twice.png", "text": "one"},
        {"file_name": "twice.png", "text": "two"},
        {"image": "good.png", "text": "wrong column"},
    )
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n{'file_name': 'x.png'}\n[1]\n")
    assert refusal(tmp_path).splitlines()[1:] == [
        "  lines that are not a JSON object: 2",
        "    metadata.jsonl line 11",
        "    metadata.jsonl line 12",
        "  captions of metadata.jsonl that are no text (write one, in quotation marks): 1",
        "    metadata.jsonl line 3: number.png: 7",
        "  rows of metadata.jsonl that name an absent picture (correct the name or delete the row): 2",
        "    metadata.jsonl line 4: gone.png",
        "    metadata.jsonl line 5: notes.pdf",
        "  rows of metadata.jsonl that repeat a picture: 1",
        "    metadata.jsonl line 8: twice.png",
        "  rows without a file_name in metadata.jsonl: 1",
        "    metadata.jsonl line 9: has image, text",
        "  pictures without a caption (give each a row in metadata.jsonl): 2",
        "    alone.png",
        "    blank.png",
        "  pictures of a type that is not read (convert to PNG, or move them out): 1",
        "    phone.heic",
        "  --data.strict false leaves out what is named here",
    ]


def test_long_lists_are_cut_but_counted(tmp_path: Path) -> None:
    for index in range(13):
        picture(tmp_path / f"{index:02d}.png")
    message = refusal(tmp_path)
    assert "pictures without a caption (give each a .txt beside it, or a row in metadata.jsonl): 13" in message
    assert "    09.png\n    and 3 more" in message and "10.png" not in message


@pytest.mark.parametrize("name", ["metadata.json", "captions.jsonl", "metadata.json1", "train/metadata.jsonl"])
def test_a_near_miss_is_pointed_at(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "train/a.png")
    (tmp_path / name).write_text('{"file_name": "a.png", "text": "a"}\n')
    assert re.search(rf"not read \(captions\? name them metadata.jsonl.*\): 1\n    {name}", refusal(tmp_path))


def test_other_bad_folders(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing")
    assert "folders without a picture" in refusal(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert f"files that cannot be read: 1\n    {tmp_path / 'a.txt'} line 1: the bytes e9 are" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\n")
    assert "quotation marks): 1\n    metadata.csv line 2" in refusal(tmp_path)
    jsonl(tmp_path, {"file_name": "a.png", "text": "a cat"})
    assert "caption files beside metadata.jsonl (keep one): 1\n    metadata.csv" in refusal(tmp_path)


# Held-out split


def test_split_is_exact_ordered_and_a_function_of_the_names() -> None:
    rows = [row_of(Path(f"{index:03d}.png")) for index in range(100)]
    train, held_out = split(rows, 0.2, seed=0)
    assert len(split(rows[:13], 0.2, seed=0)[1]) == 3  # of 2.6
    assert len(held_out) == 20 and sorted(train + held_out, key=lambda row: row.name) == rows
    assert held_out == sorted(held_out, key=lambda row: row.name)
    elsewhere = [Row(Path("/moved") / row.name, "new", row.name) for row in reversed(rows)]
    assert {row.name for row in split(elsewhere, 0.2, seed=0)[1]} == {row.name for row in held_out}
    assert split(rows, 0.2, seed=1)[1] != held_out
    grown = split([*rows, row_of(Path("new.png"))], 0.2, seed=0)[1]
    assert len({row.name for row in held_out} - {row.name for row in grown}) <= 1


def test_split_leaves_something_on_both_sides() -> None:
    rows = [row_of(Path("a.png")), row_of(Path("b.png"))]
    assert split(rows, 0, seed=0) == (rows, [])
    assert [len(part) for part in split(rows, 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split(rows, 0.99, seed=0)] == [1, 1]
    with pytest.raises(UserError, match=r"held_out_fraction 0.1 needs two pictures or more; there is 1"):
        split(rows[:1], 0.1, seed=0)
    with pytest.raises(UserError, match=r"below 1, not 1"):
        split(rows, 1, seed=0)


# Pixels


def values(path: Path, size: int = 8) -> list[list[int]]:
    """Corner colours (top left, top right, bottom left, bottom right) back in 0..255."""
    pixels = load_picture(path, size)
    assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() >= -1 and pixels.max() <= 1
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    return ((corners + 1) * 127.5).round().int().T.tolist()


def two_colours() -> Image.Image:
    """Left half red, right half blue, 16 wide and 8 high."""
    made = Image.new("RGB", (16, 8), "red")
    made.paste("blue", (8, 0, 16, 8))
    return made


RED, GREEN, BLUE, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3


def test_the_centre_square_is_taken_and_its_proportions_kept(tmp_path: Path) -> None:
    made = Image.new("RGB", (32, 16), "green")
    made.paste("red", (8, 0, 16, 16))
    made.paste("blue", (16, 0, 24, 16))
    made.save(tmp_path / "wide.png")
    made.rotate(90, expand=True).save(tmp_path / "tall.png")
    assert values(tmp_path / "wide.png", 16) == [RED, BLUE, RED, BLUE]
    assert values(tmp_path / "tall.png", 16) == [BLUE, BLUE, RED, RED]


def test_resizing_is_lanczos_before_the_crop(tmp_path: Path) -> None:
    noise = numpy.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    resized = Image.fromarray(noise).resize((24, 16), Image.Resampling.LANCZOS).crop((4, 0, 20, 16))
    expected = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(load_picture(tmp_path / "a.png", 16), expected, rtol=0, atol=1.5 / 127.5)


def test_at_its_own_size_a_picture_keeps_every_value(tmp_path: Path) -> None:
    noise = numpy.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    expected = torch.from_numpy(noise).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(load_picture(tmp_path / "a.png", 8), expected)


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be shown turned a quarter clockwise
    two_colours().crop((4, 0, 12, 8)).save(tmp_path / "a.png", exif=exif)
    assert values(tmp_path / "a.png") == [RED, RED, BLUE, BLUE]


def test_transparency_shows_white(tmp_path: Path) -> None:
    clear = two_colours().crop((4, 0, 12, 8)).convert("RGBA")
    clear.paste((0, 255, 0, 0), (4, 0, 8, 8))
    clear.save(tmp_path / "rgba.png")
    assert values(tmp_path / "rgba.png") == [RED, WHITE, RED, WHITE]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(1, (4, 0, 8, 8))
    palette.save(tmp_path / "palette.png", transparency=1)
    assert values(tmp_path / "palette.png") == [RED, WHITE, RED, WHITE]
    Image.new("LA", (8, 8), (0, 51)).save(tmp_path / "la.png")
    assert values(tmp_path / "la.png")[0] == [204] * 3
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "key.png", transparency=(0, 0, 255))
    assert values(tmp_path / "key.png")[0] == WHITE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, suffix: str) -> None:
    grey = numpy.full((8, 8), 128 * 257, dtype=numpy.uint16)
    grey[:, 4:] = 65535
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    assert values(tmp_path / f"a.{suffix}") == [[128] * 3, WHITE, [128] * 3, WHITE]


def test_other_colour_modes(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert values(tmp_path / "cmyk.tif")[0] == RED
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert values(tmp_path / "cmyk.jpg")[0] == WHITE
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert values(tmp_path / "grey.png")[0] == [77] * 3
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert values(tmp_path / "bits.png")[0] == WHITE
