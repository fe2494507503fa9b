"""Grids, curves and PNG metadata. Oracle: the pixels and text chunks of the files, read with Pillow."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from pixart_ft.errors import UserError
from pixart_ft.pictures import lettering, sheets
from pixart_ft.pictures.recipes import read_recipe
from pixart_ft.pictures.sheets import Sample, grid, loss_curve, sample_sheet, save_png, term_curves


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
    labels: dict[str, Any] = {"row_labels": ["one", "two"], "column_labels": ["a", "b"]}
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
    font = lettering.font_of(lettering.dejavu_sans(), 12)
    text = "a photograph of a small red apple on a wooden table"
    whole = sheets._wrap(text, font, 120, 10)
    assert " ".join(whole) == text and len(whole) > 2
    cut = sheets._wrap(text, font, 120, 2)
    assert cut[0] == whole[0] and cut[1].endswith("…") and whole[1].startswith(cut[1][:-1])
    assert all(font.getlength(line) <= 120 for line in (*whole, *cut, *sheets._wrap("W" * 99, font, 120, 9)))
    assert sheets._wrap("", font, 120, 2) == []


def test_a_title_stands_above_all() -> None:
    rows, labels = [[plain("red"), plain("blue")]], ["a", "b"]
    sheet, bare = (grid(rows, column_labels=labels, title=title) for title in ("a red apple " * 30, None))
    assert sheet.width == bare.width and sheet.height > bare.height
    added = sheet.height - bare.height
    assert sheet.crop((0, added, *sheet.size)).tobytes() == bare.tobytes()
    left, top, right, bottom = ink(sheet.crop((0, 0, sheet.width, added))) or (0, 0, 0, 0)
    assert left > 0 and 0 < top < bottom <= added and right <= sheet.width - 4


def test_samples_are_labelled_by_prompt_and_seed() -> None:
    cells = [plain(colour) for colour in ("red", "blue", "green", "black")]
    samples = [
        Sample(*what, cell) for what, cell in zip([("a", 3), ("a", 10), ("b", 3), ("b", 10)], cells, strict=True)
    ]
    labels: dict[str, Any] = {"title": "mine, step 5", "row_labels": ["a", "b"], "column_labels": ["seed 3", "seed 10"]}
    assert sample_sheet(samples, "mine, step 5").tobytes() == grid([cells[:2], cells[2:]], **labels).tobytes()


def test_letters_come_from_an_installed_font_or_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    dejavu = lettering.dejavu_sans()
    mathematics = Path(dejavu).with_name("STIXGeneral.ttf")  # stands for another script's: it has の
    monkeypatch.setattr(lettering, "_installed", lambda: ())
    assert lettering.fitting("café яблоко תפוח") == (dejavu, "café яблоко תפוח")
    assert lettering.fitting("red 犬の🍎\U000e0067") == (dejavu, r"red \u72ac\u306e\U0001f34e")
    monkeypatch.setattr(lettering, "_installed", lambda: (str(mathematics), "/absent.ttf"))
    assert lettering.fitting("red の") == (str(mathematics), "red の")
    assert lettering.fitting("red 犬の") == (str(mathematics), r"red \u72acの")
    assert lettering.fitting("red 犬猫の") == (dejavu, r"red \u72ac\u732b\u306e")  # a third of them is too few
    assert lettering.fitting("red")[0] == dejavu
    sheets = [grid([[plain("red")]], row_labels=[text]) for text in ("の", r"\u306e")]
    assert sheets[0].tobytes() != sheets[1].tobytes()


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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    return saved


def test_the_loss_curve_is_one_panel_with_the_lowest_held_out_loss_marked(tmp_path: Path, figures: list[Any]) -> None:
    means = {0: 0.9, 10: 0.3, 20: 0.2, 30: 0.25, 40: float("nan")}
    records: list[dict[str, object]] = [
        {"step": s, "samples": 8 * s, "held_out": {"loss": {"mean": m, "standard_error": 0.01}}}
        for s, m in means.items()
    ]
    records += [
        {"step": s, "samples": 8 * s, "train": {"loss": 30 if s == 1 else 0.3, "simple": 9.0}} for s in range(1, 41)
    ]
    loss_curve(records, tmp_path / "loss.png", title=r"my $\run$ 1")  # no formula
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("pictures seen", "loss", "log")
    (star,) = (line for line in axes.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (160, 0.2)
    assert star.get_label() == "lowest held out: 0.2 after 20 steps"
    smooth = next(line for line in axes.lines if line.get_label() == "training (running mean)")
    low, high = axes.get_ylim()
    assert low < 0.19 and max(smooth.get_ydata()) < high and smooth.get_xdata()[0] == 8
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * 400
    with pytest.raises(ValueError, match="at least one finite loss"):
        loss_curve([{"step": 1, "train": {"loss": float("inf")}}], tmp_path / "none.png")


def test_a_loss_without_held_out_pictures_and_one_that_only_rose(tmp_path: Path, figures: list[Any]) -> None:
    loss_curve([{"step": step, "train": {"simple": 1.0}} for step in range(5)], tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_yscale()) == ("simple", "optimizer steps", "linear")
    assert not [line for line in axes.lines if line.get_marker() == "*"]
    held = [{"step": s, "held_out": {"loss": {"mean": 1.0 + s, "standard_error": 0.0}}} for s in (0, 5)]
    loss_curve(held, tmp_path / "loss.png")
    assert "lowest held out: 1 before the first step" in [line.get_label() for line in figures[1].axes[0].lines]


def test_what_the_loss_is_made_of_has_a_panel_a_term(tmp_path: Path, figures: list[Any]) -> None:
    titles = {"simple": "v error", "vlb": "bits/dim of one step"}
    assert term_curves(log(), tmp_path / "terms.png", titles=titles)
    simple, vlb = figures[0].axes
    assert (simple.get_title(), simple.get_yscale(), simple.get_xlabel()) == ("v error", "log", "pictures seen")
    assert (vlb.get_title(), vlb.get_yscale()) == ("bits/dim of one step", "linear")
    assert simple.lines[1].get_xdata()[0] == 8 and len(simple.containers) == 1  # steps times batch; held-out bars
    assert len(vlb.containers) == 0  # its only held-out value is not a number
    same = [{"step": step, "train": {"simple": 1.0, "loss": 1.0, "simple_q1": 2.0}} for step in range(5)]
    assert not term_curves(same, tmp_path / "none.png", titles=titles)
    assert not (tmp_path / "none.png").exists()


def test_running_mean_is_centred_and_keeps_straight_lines() -> None:
    values = [2.0 * i for i in range(50)]
    assert sheets._running_mean(values, 5)[2:-2] == pytest.approx(values[2:-2])
    assert sheets._running_mean(values, 5)[0] == pytest.approx(2.0)  # of 0, 2, 4
    assert sheets._running_mean(values, 1) == values
