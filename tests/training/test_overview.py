"""The report on pictures and captions. Oracles: counts by hand; the pixels of the sheet."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pixart_ft.data.pixels import Fit
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import Seen, verified
from pixart_ft.training import overview
from pixart_ft.training.overview import Overview, Pair

SIZES = {"a.png": (64, 64), "small.png": (16, 32), "wide.png": (200, 64), "plain.png": (128, 128), "e.png": (65, 64)}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tiny / "tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture of each size of SIZES (read only)."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, size in SIZES.items():
        Image.new("RGB", size, "blue").save(folder / name)
    return folder


def rows_in(folder: Path, **captions: str) -> list[Row]:
    return [Row(folder / name, captions.get(name.split(".")[0], "a red circle"), name) for name in SIZES]


def seen_of(rows: Sequence[Row]) -> dict[Row, Seen]:
    return dict(zip(rows, verified(rows), strict=True))


def square(size: tuple[int, int]) -> Fit:
    return Fit((64, 64))


def test_how_much_is_enlarged_and_lost_by_hand() -> None:
    def pair(size: tuple[int, int], target: tuple[int, int] = (64, 64)) -> Pair:
        return Pair(Row(Path("a"), "a", "a"), size, Fit(target), None)

    assert pair((64, 64)).enlarged == 1 and pair((64, 64)).lost == 0
    assert pair((16, 32)).enlarged == 4 and pair((16, 32)).lost == 0.5  # 64 x 128, of which the middle half
    assert pair((200, 100)).enlarged == 0.64 and pair((200, 100)).lost == pytest.approx(0.5)
    assert pair((400, 100), (128, 64)).lost == pytest.approx(0.5) and pair((128, 64), (128, 64)).lost == 0
    assert pair((1000, 1001)).lost == 0  # a line of pixels
    assert replace(pair((200, 100)), fit=Fit((64, 64), None)).lost == 0  # squeezed


def test_facts_count_what_is_cut_enlarged_and_cropped(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_in(folder, wide="a red circle on grey " * 9, small="a")
    count = {row.name: len(tokenizer(row.caption.strip()).input_ids) for row in rows}
    found = Overview.of(seen_of(rows), rows, square, tokenizer, 20)
    sizes, tokens, *first = found.facts()
    assert sizes == (
        "picture sizes      16 x 32 to 128 x 128; 1 of 5 enlarged, up to 4 times: small.png; "
        "2 cropped, up to 68%: wide.png, 1 of them by over half"
    )
    assert tokens.startswith(
        f"caption tokens     {count['small.png']} to {count['wide.png']}, half of them up to {count['a.png']}; "
        "1 of 5 exceed data.max_tokens 20 and are cut,"
    )
    assert first[-3:] == [
        'first pairs        a.png: "a red circle"',
        '                   small.png: "a"',
        f'                   wide.png: "{"a red circle on grey " * 3}a red circle ..."',
    ]
    assert found.longest == 20 and max(map(len, found.facts())) <= 140
    details = "\n".join(found.details())
    assert f"captions of more than 20 tokens, cut: 1\n    wide.png: {count['wide.png']} tokens" in details
    assert "enlarged and so blurred: 1\n    small.png: 16 x 32, 4 times" in details
    assert details.endswith("is cropped: 2\n    wide.png: 200 x 64, 68% lost\n    small.png: 16 x 32, 50% lost")


def test_without_a_tokenizer_sizes_are_told_and_of_many_captions_some_are_counted(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_in(folder, e="an e")
    without = Overview.of(seen_of(rows), rows, square, None, 300)
    assert without.facts()[1].endswith("not counted: the base's tokenizer is not at hand") and without.longest is None
    monkeypatch.setattr(overview, "_COUNTED", 2)
    some = Overview.of(seen_of(rows), rows, square, tokenizer, 300)  # the first and the fourth, of one caption
    assert "of 4 captions that were counted" in some.facts()[1]


@pytest.mark.parametrize("limit", [5, 37, 300])
def test_a_histogram_has_every_value_once(limit: int) -> None:
    values = [1, 2, 2, 3, 5, 8, 13, 21, 34, 37, 38, 299, 300, 301, 4000]
    lines = [re.fullmatch(r" +(.+?)  (#*) ([0-9,]+)", line) for line in overview._histogram(values, limit)]
    bars = {found[1]: (len(found[2]), int(found[3])) for found in lines if found}
    assert len(bars) == len(lines) and sum(count for _, count in bars.values()) == len(values)
    assert bars.pop(f"over {limit}, cut")[1] == sum(value > limit for value in values)
    for name, (length, count) in bars.items():
        first, last = int(name.split()[0]), int(name.split()[-1])
        assert count == sum(first <= value <= last for value in values) and last <= limit
        assert (length > 0) == (count > 0) and length <= 50
    assert overview._histogram([], 300) == []


def test_the_sheet_shows_what_the_vae_sees_and_marks_the_worst(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = rows_in(folder, a="a red circle on grey " * 9)
    found = Overview.of(seen_of(rows), rows, square, tokenizer, 20)
    sheet = found.sheet()
    gap, cell = 6, overview._CELL
    row = next(y for y in range(sheet.height) if sheet.getpixel((gap, y)) == (255, 0, 0))
    pixels = [sheet.getpixel((gap + number * (cell + gap), row + cell - 1)) for number in range(5)]
    assert pixels == [(255, 0, 0)] * 3 + [(0, 0, 255)] * 2  # cut, enlarged, cropped; then the two others
    assert [sheet.getpixel((gap + number * (cell + gap) + cell // 2, row + cell // 2)) for number in range(5)] == [
        (0, 0, 255)
    ] * 5
    below = sheet.crop((0, row + cell, sheet.width, sheet.height)).convert("L")
    assert below.histogram()[0] > 0  # captions, in black


def test_a_sheet_of_many_shows_some_of_all(folder: Path) -> None:
    rows = [Row(folder / "a.png", "a", f"{number}.png") for number in range(200)]
    rows += [Row(folder / "small.png", "a", f"small {number}.png") for number in range(50)]
    sheet = Overview.of(seen_of(rows), rows, square, None, 300).sheet()
    cell, gap = overview._CELL, 6
    assert sheet.width == gap + 6 * (cell + gap)
    top = next(y for y in range(sheet.height) if sheet.getpixel((gap, y)) == (255, 0, 0))
    red = (255, 0, 0)
    down = (sheet.height - top) // 6
    marked = [
        sheet.getpixel((gap + column * (cell + gap), top + line * down + cell // 2)) == red
        for line in range(6)
        for column in range(6)
    ]
    assert marked[:18] == [True] * 18 and 0 < sum(marked[18:]) < 6  # 32 of 232 others are small


def test_what_is_not_as_it_seems_is_warned_of(folder: Path) -> None:
    rows = rows_in(folder)
    seen = seen_of(rows)
    one = seen[rows[0]]
    found = Overview.of(seen, rows, square, None, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn(seen)
    with pytest.warns(UserWarning, match="not read as they may seem: 1\n    a.png: a film"):
        found.warn(seen | {rows[0]: Seen(one.digest, one.size, ("a film",))})


def test_the_sheet_darkens_what_a_mask_leaves_out(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 100, 40)).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "m.png")
    rows = [Row(tmp_path / "a.png", "a", "a.png", mask=tmp_path / "m.png")]
    sheet = Overview.of(seen_of(rows), rows, square, None, 300).sheet()
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    assert colours[200, 100, 40] == pytest.approx(colours[50, 25, 10], rel=0.1) and colours[50, 25, 10] > 1000
