"""Grids, curves and PNG metadata. Oracle: the pixels and text chunks of the files, read with Pillow."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageFont

from pixart_ft import pictures
from pixart_ft.errors import UserError
from pixart_ft.pictures import grid, loss_curve, read_recipe, save_png


def plain(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Bounding box of everything that is not white."""
    return ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()


def test_grid_keeps_every_pixel_of_pictures_at_their_own_size() -> None:
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    sheet = grid([[plain("red"), picture], [plain("blue")]])
    pitch = 64 + 4
    assert sheet.size == (4 + 2 * pitch, 4 + 2 * pitch)
    cut = sheet.crop((4 + pitch, 4, 4 + pitch + 64, 4 + 64))
    assert cut.tobytes() == picture.tobytes()
    assert ink(sheet.crop((4 + pitch, pitch, *sheet.size))) is None  # the cell a short row lacks


def test_grid_fits_pictures_of_other_shapes_and_shows_white_through_transparency() -> None:
    sheet = grid([[plain("red", (100, 50)), Image.new("RGBA", (64, 64), (0, 0, 0, 0)), None]], cell=64)
    assert ink(sheet) == (4, 4 + 16, 4 + 64, 4 + 48)  # 64 x 32, centred in its cell; the others stay white


@pytest.mark.parametrize("side", [64, 256])
def test_labels_fit_beside_and_above_the_pictures(side: int) -> None:
    labels = ["short", "many words that go on " * 20, "x" * 500]
    rows = [[None, plain("red", (side, side))]] * 3
    sheet = grid(rows, row_labels=labels, column_labels=labels[1:])
    unlabelled = grid(rows)
    left, top = sheet.width - unlabelled.width, sheet.height - unlabelled.height
    gap = max(4, side // 32)
    for row in range(3):  # text in the margin of its own row only, never in a gap, another row or a cell
        y = top + gap + row * (side + gap)
        assert ink(sheet.crop((0, y, left, y + side))) is not None
        assert ink(sheet.crop((0, y - gap, left, y))) is None
        assert ink(sheet.crop((left + gap, y, left + gap + side, y + side))) is None
    for column in range(2):
        x = left + gap + column * (side + gap)
        assert ink(sheet.crop((x, 0, x + side, top))) is not None
        assert ink(sheet.crop((x + side, 0, x + side + gap, top))) is None


@pytest.mark.parametrize("side", [64, 256])
def test_captions_are_one_line_below_their_own_picture(side: int) -> None:
    rows = [[plain("red", (side, side)), plain("blue", (side, side))]] * 2
    captions = [["3 calls, 0.1 s", "x" * 300], ["", "many words that go on"]]
    labels = {"row_labels": ["one", "two"], "column_labels": ["a", "b"]}
    sheet, bare = grid(rows, captions=captions, **labels), grid(rows, **labels)
    gap = max(4, side // 32)
    line = (sheet.height - bare.height) // 2
    left, top = bare.width - 2 * (side + gap), bare.height - 2 * (side + gap)
    assert sheet.width == bare.width and sheet.height == bare.height + 2 * line and 8 < line < side
    assert sheet.crop((0, 0, sheet.width, top)).tobytes() == bare.crop((0, 0, bare.width, top)).tobytes()
    for row, texts in enumerate(captions):
        for column, text in enumerate(texts):
            x, y = left + column * (side + gap), top + row * (side + gap + line)
            picture = sheet.crop((x, y, x + side, y + side))
            assert picture.tobytes() == rows[row][column].tobytes()
            inked = ink(sheet.crop((x, y + side, x + side, y + side + line)))
            assert (inked is None) == (text == "")
            assert ink(sheet.crop((x + side, y, x + side + gap, y + side + gap + line))) is None
            assert ink(sheet.crop((x, y + side + line, x + side, y + side + line + gap))) is None
            if inked is not None and len(text) < 20:  # in the middle
                assert abs(inked[0] - (side - inked[2])) <= 2


def test_long_labels_wrap_at_words_and_end_in_an_ellipsis() -> None:
    font = pictures._font(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    text = "a photograph of a small red apple on a wooden table"
    whole = pictures._wrap(text, font, 120, 10)
    assert " ".join(whole) == text and len(whole) > 2
    cut = pictures._wrap(text, font, 120, 2)
    assert cut[0] == whole[0] and cut[1].endswith("…") and whole[1].startswith(cut[1][:-1])
    assert all(font.getlength(line) <= 120 for line in (*whole, *cut, *pictures._wrap("W" * 99, font, 120, 9)))
    assert pictures._wrap("", font, 120, 2) == []


def test_grid_refuses_no_pictures_and_labels_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[None], []])
    with pytest.raises(ValueError, match="column_labels has 2 labels for 1"):
        grid([[plain("red")]], column_labels=["a", "b"])


def test_recipe_round_trip(tmp_path: Path) -> None:
    recipe = {
        "prompt": 'a "café" ж 漢 \udcff',
        "seed": 2**62,
        "guidance": 4.5,
        "lora": None,
        "sizes": [64, 64],
    }
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    save_png(picture, tmp_path / "new" / "a.png", recipe)
    assert read_recipe(tmp_path / "new" / "a.png") == recipe
    with Image.open(tmp_path / "new" / "a.png") as stored:
        assert stored.format == "PNG" and json.loads(stored.text["pixart_ft"]) == recipe  # type: ignore[attr-defined]
        assert stored.tobytes() == picture.tobytes()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(plain("red"), tmp_path / "a.png", {"seed": 0})

    def breaks(self: Image.Image, file: Path, *_: object, **__: object) -> None:
        file.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        save_png(plain("blue"), tmp_path / "a.png", {"seed": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert read_recipe(tmp_path / "a.png") == {"seed": 0}


def test_reading_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.png: no such picture"):
        read_recipe(tmp_path / "absent.png")
    plain("red").save(tmp_path / "other.png")
    plain("red").save(tmp_path / "other.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("other.png", "other.jpg", "text.png"):
        with pytest.raises(UserError, match=f"{name} holds no recipe"):
            read_recipe(tmp_path / name)


def log(scale: float = 1.0) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for step in range(1, 41):
        simple, vlb = scale / step, scale * (0.01 - 0.001 * step)
        records.append({"step": step, "samples": 8 * step, "train": {"simple": simple, "vlb": vlb}})
    held = {
        "simple": {"mean": scale, "standard_error": 0.1},
        "vlb": {"mean": float("nan"), "standard_error": 0.1},
    }
    return [{"step": 0, "samples": 0, "held_out": held}, *records]


def drawn(records: list[dict[str, object]], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of the figure that `loss_curve` saves at `path`."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    loss_curve(records, path)
    return figures[-1].axes


def test_loss_curve_draws_a_panel_a_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple, vlb = drawn(log(), tmp_path / "loss.png", monkeypatch)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * 400
    assert (simple.get_title(), simple.get_yscale(), simple.get_xlabel()) == (
        "simple",
        "log",
        "pictures seen",
    )
    assert (vlb.get_title(), vlb.get_yscale(), vlb.get_ylabel()) == ("vlb", "linear", "bits per dimension")
    assert simple.lines[1].get_xdata()[0] == 8 and len(simple.containers) == 1  # steps times batch; held-out bars
    assert len(vlb.containers) == 0  # its only held-out value is not a number


def test_loss_curve_counts_steps_without_samples_and_draws_equal_terms_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, object]] = [
        {"step": step, "train": {"simple": 1.0, "loss": 1.0, "simple_q1": 2.0}} for step in range(5)
    ]
    (only,) = drawn(records, tmp_path / "loss.png", monkeypatch)
    assert (only.get_title(), only.get_xlabel(), only.get_yscale()) == ("simple", "optimizer steps", "linear")
    with pytest.raises(ValueError, match="at least one finite loss"):
        loss_curve([{"step": 1, "train": {"loss": float("inf")}}], tmp_path / "none.png")


def test_running_mean_is_centred_and_keeps_straight_lines() -> None:
    values = [2.0 * i for i in range(50)]
    assert pictures._running_mean(values, 5)[2:-2] == pytest.approx(values[2:-2])
    assert pictures._running_mean(values, 5)[0] == pytest.approx(2.0)  # of 0, 2, 4
    assert pictures._running_mean(values, 1) == values
