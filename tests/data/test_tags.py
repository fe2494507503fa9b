"""Tags in other orders. Oracle: all permutations, counted by hand."""

from itertools import permutations
from pathlib import Path

import pytest

from pixart_ft.config.reading import load
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.rows import Row
from pixart_ft.data.tags import in_orders, orders
from pixart_ft.errors import UserError
from pixart_ft.training.encode import read_pictures
from tests.helpers.tiny import build_picture_folder

TAGS = ["sks dog", "sofa", "red", "night", "film", "grain"]


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_orders_are_permutations_of_the_tags_with_the_first_kept(keep: int) -> None:
    caption = ", ".join(TAGS)
    found = orders(caption, 6, keep)
    assert found[0] == caption and len(set(found)) == len(found) == 6
    for text in found:
        tags = text.split(", ")
        assert tags[:keep] == TAGS[:keep] and sorted(tags) == sorted(TAGS)
    assert found == orders(caption, 6, keep) and found[:3] == orders(caption, 3, keep)
    assert found[1:] != orders(caption + ", more", 6, keep)[1:]


def test_where_there_are_few_orders_all_of_them_come() -> None:
    assert sorted(orders("a, b, c", 10, 0)) == sorted(", ".join(order) for order in permutations("abc"))
    assert sorted(orders("a, b, c", 10, 1)) == ["a, b, c", "a, c, b"]
    assert sorted(orders("a, b, b", 10, 0)) == ["a, b, b", "b, a, b", "b, b, a"]
    for alone in ("a red circle", "", "a, b", " a ,b,"):
        assert orders(alone, 4, 2) == [alone]


def test_every_order_is_as_likely() -> None:
    """The tag that comes first, of many captions: each in one of four."""
    firsts = [orders(f"a{n}, b{n}, c{n}, d{n}", 3, 0)[1][0] for n in range(600)]
    for tag in "bcd":
        assert abs(firsts.count(tag) / 600 - 6 / 23) < 4 * (6 / 23 * 17 / 23 / 600) ** 0.5
    assert abs(firsts.count("a") / 600 - 5 / 23) < 4 * (5 / 23 * 18 / 23 / 600) ** 0.5  # but for the order as written


def test_orders_of_a_caption_share_its_draws_alike() -> None:
    row = Row(Path("a.png"), "a, b", "a.png", ("c", "d, e, f"), (0.5, 0.25, 0.25))
    found = in_orders(row, 2, 0)
    assert found.caption == "a, b" and found.others[:3] == ("b, a", "c", "d, e, f") and len(found.captions) == 5
    assert found.shares == (0.25, 0.25, 0.25, 0.125, 0.125) and found.name == row.name
    alone = Row(Path("a.png"), "a red circle", "a.png")
    assert in_orders(alone, 4, 0) == alone and in_orders(row, 4, 3) == row
    assert in_orders(Row(Path("a.png"), "a, b", "a.png"), 9, 0).shares == (0.5, 0.5)


def test_what_is_trained_on_is_shuffled_and_what_is_measured_is_not(tmp_path: Path) -> None:
    folder = build_picture_folder(tmp_path / "pictures", 10)
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace(" on ", ", film, grain, on "))
    data = {"folder": str(folder), "held_out_fraction": 0.3, "shuffle_tags": True, "keep_tags": 1}
    plain, tags = (
        read_pictures(load(TrainConfig, {"data": d})) for d in ({**data, "shuffle_tags": False, "keep_tags": 0}, data)
    )
    assert tags.held == plain.held and tags.digests == plain.digests
    for before, row in zip(plain.train, tags.train, strict=True):
        assert row.caption == before.caption and len(set(row.captions)) == 4 and sum(row.shares) == 1
        assert {caption.split(", ")[0] for caption in row.captions} == {before.caption.split(", ")[0]}
    line = "captions           28 of 7 pictures, one in each draw: 4 times the work of T5 and its place in data.cache"
    assert line in tags.facts() and not any("one in each draw" in fact for fact in plain.facts())
    with pytest.raises(UserError, match=r"data\.keep_tags is 1, unused while data.shuffle_tags is"):
        load(TrainConfig, {"data": {"folder": "demo", "keep_tags": 1}})
