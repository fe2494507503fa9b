"""Aspect buckets. Oracles: PixArt's tables as diffusers has them, arithmetic, properties over random histograms."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN

from pixart_ft.config.train import Data, SmallBuckets
from pixart_ft.data.buckets import Order, Shapes, Sized, settled, square, table
from pixart_ft.data.pixels import Fit, cropped, enlarged
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError

POLICIES: tuple[SmallBuckets, ...] = ("repeat", "drop", "merge_nearest")


# Sizes


def test_the_tables_of_pixart_are_taken_as_they_are() -> None:
    """The keys of diffusers' tables are height over width."""
    for resolution, theirs in ((512, ASPECT_RATIO_512_BIN), (2048, ASPECT_RATIO_2048_BIN)):
        own = table(resolution, 16)
        assert {(height, width) for width, height in own} == {tuple(size) for size in theirs.values()}
        assert own[0] == (resolution // 2, resolution * 2) and own[-1] == (resolution * 2, resolution // 2)


@pytest.mark.parametrize(
    ("resolution", "unit", "step"), [(768, 16, None), (64, 16, None), (512, 16, 128), (80, 16, 32)]
)
def test_a_table_of_an_area_and_a_step(resolution: int, unit: int, step: int | None) -> None:
    sizes = table(resolution, unit, step)
    assert (resolution, resolution) in sizes and len(sizes) > 4
    assert set(sizes) == {(height, width) for width, height in sizes}
    for width, height in set(sizes) - {(resolution, resolution)}:
        assert width % (step or unit) == height % (step or unit) == 0
        assert width * height <= resolution**2 and max(width, height) <= 2 * resolution
        assert (min(width, height) + (step or resolution // 16 // unit * unit or unit)) * max(
            width, height
        ) > resolution**2


def test_what_no_network_of_that_unit_takes_is_no_table() -> None:
    assert all(side % 64 == 0 for size in table(512, 64) for side in size)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        table(512, 16, 24)


def test_a_picture_goes_to_the_nearest_aspect_by_its_logarithm() -> None:
    """Between 1:1 and 2:1 the middle is the root of 2, in both directions."""
    shapes = Shapes((((128, 64), (64, 64), (64, 128)),))
    for wide, size in ((1.40, (64, 64)), (1.43, (128, 64)), (9.0, (128, 64))):
        assert shapes.of((round(1000 * wide), 1000)) == size
        assert shapes.of((1000, round(1000 * wide))) == size[::-1]


def test_of_several_resolutions_a_picture_gets_the_largest_that_it_fills() -> None:
    shapes = Shapes((square(64), square(128), square(256)))
    for side, size in ((40, 64), (64, 64), (127, 64), (128, 128), (300, 256)):
        assert shapes.of((side, side + 5)) == (size, size)


def test_what_becomes_of_a_picture_is_measured() -> None:
    assert enlarged((100, 50), (200, 200)) == 4 and cropped((100, 50), (200, 200)) == 0.5
    assert enlarged((800, 400), (200, 100)) == 0.25 and cropped((800, 400), (200, 100)) == 0


# Views


def test_random_crops_are_spread_evenly_and_all_pictures_have_as_many_views() -> None:
    rows = [Row(Path(), caption, "") for caption in ("a cat", "a cat to the left", "a cat")]
    sized = Sized(rows, [(64, 64)] * 3, [(100, 64), (100, 64), (640, 641)])
    wide, one_sided, whole = map(list, sized.views(Data(folder="", crop="random", crops=2, flip=True)))
    assert wide == [Fit((64, 64), at, mirrored) for mirrored in (False, True) for at in (0.25, 0.75)]
    assert one_sided == wide[:2] * 2
    assert whole == [Fit((64, 64), 0.5, mirrored) for mirrored in (False, False, True, True)]  # nothing to cut away
    assert sized.views(Data(folder="")) == [(Fit((64, 64)),)] * 3
    assert sized.views(Data(folder="", crop="none")) == [(Fit((64, 64), None),)] * 3


@pytest.mark.parametrize(
    ("caption", "may"),
    [
        ("a dog, blob", True),
        ("bright leftovers of a wordless signature", True),  # no such word stands alone
        ("a dog looking LEFT", False),
        ("1girl, english_text, sky", False),
        ("the leftmost tree", False),
        ("turning counterclockwise", False),
        ("a sign, „Zoo‟", False),
        ("a right-handed man", False),
        ("a shop sign", False),
        ('a card that says "yes"', False),
        ("the number 7", False),
    ],
)
def test_captions_of_sides_and_writing_forbid_the_mirror(caption: str, may: bool) -> None:
    assert Row(Path(), caption, "").may_be_mirrored == may
    assert Row(Path(), "a cat", "", others=(caption,), shares=(0.5, 0.5)).may_be_mirrored == may


# Small buckets


THREE = Shapes((((32, 128), (64, 64), (128, 32)),))


def test_small_buckets_are_kept_left_out_or_given_to_the_nearest() -> None:
    pictures = {(64, 64): 8, (128, 32): 3, (120, 30): 2, (32, 100): 1}
    assert settled(THREE, pictures, 4, "repeat") == (THREE, set())
    assert settled(THREE, pictures, 4, "drop") == (THREE, {(32, 128)})
    merged, left_out = settled(THREE, pictures, 4, "merge_nearest")
    assert not left_out and merged.of((32, 100)) == (64, 64) and merged.of((120, 30)) == (128, 32)
    alone, _ = settled(THREE, pictures, 9, "merge_nearest")  # the three go to the eight, and then there are nine
    assert {alone.of(picture) for picture in pictures} == {(64, 64), (128, 32)} or len(alone.tables[0]) == 1


def test_nothing_left_is_an_error_with_the_remedies() -> None:
    with pytest.raises(UserError, match=r"of 2 sizes none has the 9 pictures.*repeat or merge_nearest"):
        settled(THREE, {(64, 64): 8, (128, 32): 3}, 9, "drop")
    shapes, left_out = settled(THREE, {(64, 64): 8, (128, 32): 3}, 90, "merge_nearest")
    assert not left_out and shapes.of((128, 32)) == shapes.of((64, 64))


# The order of draws


def ranks_of(step: int, world: int, micro_batch: int, accumulation: int) -> list[range]:
    """The draws of each process's micro-batches, as the trainer deals them out."""
    starts = range(
        step * world * micro_batch * accumulation, (step + 1) * world * micro_batch * accumulation, micro_batch
    )
    return [range(start, start + micro_batch) for start in starts]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_step_is_of_one_bucket_and_every_pass_shows_every_picture_once(world: int, policy: SmallBuckets) -> None:
    """Over random histograms, batches and accumulations: the same size for every process and micro-batch of a step;
    after any number of epochs each bucket has had its share of draws but for less than a step, and the pictures of a
    bucket are as often seen as each other, to one."""
    tried = random.Random(f"{world} {policy}")
    for trial in range(4):
        micro_batch, accumulation = tried.randint(1, 3), tried.randint(1, 2)
        together = world * micro_batch * accumulation
        sizes = table(512, 16)
        chosen = tried.sample(sizes, tried.randint(2, 6))
        whole = trial == 0  # then every epoch shows every picture exactly once
        pictures = {size: together * tried.randint(1, 3) if whole else tried.randint(1, 30) for size in chosen}
        try:
            shapes, left_out = settled(Shapes((sizes,)), pictures, together, policy)
        except UserError:
            assert policy == "drop" and max(pictures.values()) < together
            continue
        counts = Counter[tuple[int, int]]()
        for picture, count in pictures.items():
            counts[shapes.of(picture)] += count
        kept = tuple(count for size, count in sorted(counts.items()) if size not in left_out)
        if policy == "drop":
            assert all(count < together for size, count in counts.items() if size in left_out)
        elif policy == "merge_nearest":
            assert sum(kept) == sum(pictures.values()) and (len(kept) == 1 or min(kept) >= together)
        check_order(Order(kept, together), seed=tried.randint(0, 99), deal=(world, micro_batch, accumulation))


def check_order(order: Order, seed: int, deal: tuple[int, int, int]) -> None:
    bucket_of = [bucket for bucket, count in enumerate(order.counts) for _ in range(count)]
    seen, steps = Counter[int](), 0
    for epoch in range(1, 4):
        while steps < sum(order.turns(seed, epoch)):
            shown = [[order.sample(seed, draw) for draw in draws] for draws in ranks_of(steps, *deal)]
            assert len({bucket_of[sample] for samples in shown for sample in samples}) == 1
            assert len({len(samples) for samples in shown}) == 1
            seen.update(sample for samples in shown for sample in samples)
            steps += 1
        first = 0
        for count in order.counts:
            times = [seen[sample] for sample in range(first, first + count)]
            assert max(times) - min(times) <= 1, "the pictures of a bucket are seen as often as each other"
            assert abs(sum(times) - epoch * count) < order.together, "and a bucket as often as its share"
            if all(other % order.together == 0 for other in order.counts):
                assert set(times) == {epoch} and steps == epoch * sum(order.counts) // order.together
            first += count


def test_one_bucket_is_drawn_epoch_after_epoch_whatever_the_batch() -> None:
    orders = [[Order((7,), together).sample(3, draw) for draw in range(21)] for together in (1, 4)]
    assert orders[0] == orders[1]
    assert all(sorted(orders[0][start : start + 7]) == list(range(7)) for start in (0, 7, 14))


def test_the_order_belongs_to_the_seed_and_any_draw_can_be_asked_first() -> None:
    order, other = Order((9, 5, 12), 4), Order((9, 5, 12), 4)
    told = [order.sample(1, draw) for draw in range(200)]
    assert [other.sample(1, draw) for draw in reversed(range(200))][::-1] == told
    assert [order.sample(2, draw) for draw in range(200)] != told


def test_small_buckets_come_as_often_as_their_share_from_the_first_epoch_on() -> None:
    """Twenty of one picture beside a large one, steps of eight: over seeds their share of the first epoch is 20 / 8."""
    order, seeds = Order((80, *[1] * 20), 8), 100
    early = [sum(order.turns(seed, 1)[1:]) - sum(order.turns(seed, 0)[1:]) for seed in range(seeds)]
    assert abs(sum(early) / seeds - 2.5) < 4 * math.sqrt(20 * (1 / 8) * (7 / 8) / seeds)


def test_an_order_of_any_set_is_a_few_numbers() -> None:
    order = Order((10**12, 3 * 10**11, 7), 64)
    assert order.sample(0, 10**14) < sum(order.counts) and order == eval(repr(order))
