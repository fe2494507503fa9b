"""The sheet of before and after: which real picture stands under which prompt, and how it is laid out.

Oracle: pictures of one colour each; where a colour is found says what was put there.
"""

from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageColor

from pixart_ft.data.rows import Row
from pixart_ft.training.before_after import before_after

SIDE = 64


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), colour)


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, list[Row]]:
    """Two pictures learned from, of one caption in other letters; held-out ones."""
    for name in ("red", "blue", "lime", "purple"):
        plain(name).save(tmp_path / f"{name}.png")
    row = {name: tmp_path / f"{name}.png" for name in ("red", "blue", "lime", "purple")}
    return {
        "learned": [Row(row["red"], "A Rocket ", "red.png"), Row(row["blue"], "a rocket", "blue.png")],
        "held": [
            Row(row["lime"], "a duck", "lime.png"),
            Row(row["blue"], "a rocket", "b.png"),
            Row(row["purple"], "a cat", "c.png"),
        ],
    }


def boxes(sheet: Image.Image, colours: tuple[str, ...]) -> dict[str, tuple[int, int, int, int]]:
    """Where each colour is: the box of its pixels."""
    found = {}
    for colour in colours:
        here = (numpy.asarray(sheet) == ImageColor.getrgb(colour)).all(axis=2)
        box = Image.fromarray(here.astype(numpy.uint8)).getbbox()
        if box is not None:
            found[colour] = box
    return found


def test_the_real_picture_stands_below_its_prompt_under_what_it_is_to_the_run(rows: dict[str, list[Row]]) -> None:
    before = [plain("cyan"), plain("magenta"), plain("pink")]
    after = [plain("yellow"), plain("orange"), plain("navy")]
    sheet = before_after(["a duck", "a rocket", "a cat"], before, after, rows)
    found = boxes(sheet, ("cyan", "yellow", "lime", "magenta", "orange", "red", "pink", "navy", "purple", "blue"))
    assert "blue" not in found  # the first picture of a caption, and that of the first heading
    duck, rocket, cat = (list(found.values())[start : start + 3] for start in (0, 3, 6))
    for column in (duck, rocket, cat):
        assert len({(box[0], box[2]) for box in column}) == 1
        assert column[0][3] < column[1][1] and column[1][3] < column[2][1]
    assert duck[0][1] == cat[0][1] and rocket[2][3] < duck[0][1]  # learned from comes first
    assert {box[2] - box[0] for box in found.values()} == {box[3] - box[1] for box in found.values()} == {SIDE}


def test_a_prompt_that_no_picture_has_stands_last_and_without_a_real_one(rows: dict[str, list[Row]]) -> None:
    sheet = before_after(["a car", "a duck"], [plain("cyan"), plain("magenta")], [plain("yellow")] * 2, rows)
    found = boxes(sheet, ("cyan", "magenta", "lime"))
    assert found["lime"][3] < found["cyan"][1]
    with_pictures = before_after(["a duck"], [plain("magenta")], [plain("yellow")], rows)
    bare = before_after(["a car"], [plain("cyan")], [plain("yellow")], {})
    assert bare.height < with_pictures.height - SIDE and sheet.height > with_pictures.height + bare.height
    assert bare == before_after(["a car"], [plain("cyan")], [plain("yellow")], rows)  # no heading over all there is


def test_at_most_eight_stand_side_by_side() -> None:
    prompts = [f"thing {number}" for number in range(9)]
    colours = ["red", "blue", "lime", "cyan", "magenta", "yellow", "orange", "purple", "navy"]
    sheet = before_after(prompts, [plain(c) for c in colours], [plain("gray")] * 9, {})
    found = boxes(sheet, tuple(colours))
    assert len({found[c][1] for c in colours[:8]}) == 1 and found["navy"][1] > found["red"][3] + SIDE
    assert found["navy"][0] == found["red"][0]


def test_the_first_row_may_be_another_step_than_the_begin() -> None:
    sheets = [before_after(["x"], [plain("red")], [plain("blue")], {}, label=each) for each in ("step 20", "step 30")]
    assert sheets[0] != sheets[1]
