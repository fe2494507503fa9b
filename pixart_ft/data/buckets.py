"""Sizes for pictures of any aspect, and an order of draws in which every step is of one size.

A bucket is the pictures of one size.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Self

from pixart_ft.config.text import numbered
from pixart_ft.config.train import Crop, Data, SmallBuckets
from pixart_ft.data.pixels import Fit, Size, cropped, enlarged
from pixart_ft.data.rows import Row
from pixart_ft.errors import UserError
from pixart_ft.randomness import permuted

FAR_RATIO = 4.0  # of the sides: there PixArt-Sigma's own sizes end


def square(resolution: int) -> tuple[Size, ...]:
    """The one size of a resolution without buckets."""
    return ((resolution, resolution),)


def table(resolution: int, unit: int, step: int | None = None) -> tuple[Size, ...]:
    """The sizes of a resolution, from the tallest to the widest, none of more pixels than its square.

    step   what sides are multiples of; None: PixArt's own table, or where it has none or `unit` does not fit it, a
           sixteenth of the resolution, as there

    Raises ValueError for a step that is no multiple of `unit` (patch size times VAE factor).
    """
    if step is None:
        own = _of_pixart().get(resolution, ())
        if own and not any(side % unit for size in own for side in size):
            return own
        step = max(unit, resolution // 16 // unit * unit)
    if step % unit:
        raise ValueError(f"must be a multiple of {unit} (patch size times VAE factor)")
    long = range(resolution // step * step + step, int(resolution * FAR_RATIO**0.5) + 1, step)
    wide = {(width, height) for width in long if (height := resolution**2 // width // step * step)}
    found = {*square(resolution), *wide, *((height, width) for width, height in wide)}
    return tuple(sorted(found, key=_aspect))


def _of_pixart() -> dict[int, tuple[Size, ...]]:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

    tables = {
        256: alpha.ASPECT_RATIO_256_BIN,
        512: alpha.ASPECT_RATIO_512_BIN,
        1024: alpha.ASPECT_RATIO_1024_BIN,
        2048: sigma.ASPECT_RATIO_2048_BIN,
    }
    return {
        side: tuple(sorted({(int(width), int(height)) for height, width in sizes.values()}, key=_aspect))
        for side, sizes in tables.items()
    }


def _aspect(size: Size) -> float:
    return math.log(size[0] / size[1])


@dataclass(frozen=True)
class Shapes:
    """The sizes that pictures are brought to: a table for each resolution, the smallest first."""

    tables: tuple[tuple[Size, ...], ...]

    def of(self, picture: Size) -> Size:
        """The size of the nearest aspect, of the largest resolution that does not enlarge the picture, or the least."""
        nearest = [min(sizes, key=lambda size: abs(_aspect(size) - _aspect(picture))) for sizes in self.tables if sizes]
        return next((size for size in reversed(nearest) if enlarged(picture, size) <= 1), nearest[0])

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def among(self, sizes: Set[Size]) -> "Shapes":
        """Those that are among these."""
        return Shapes(tuple(tuple(size for size in table if size in sizes) for table in self.tables))


def settled(
    shapes: Shapes, pictures: Mapping[Size, int], together: int, policy: SmallBuckets
) -> tuple[Shapes, frozenset[Size]]:
    """The sizes to use, and those of them whose pictures are left out, once the policy has dealt with small buckets.

    A bucket is small that has fewer pictures than a step shows (`together`). They are kept by "repeat" and left out by
    "drop"; by "merge_nearest" their pictures go where they are nearest else, the smallest bucket first. Raises
    UserError where nothing is left.

    pictures   how many there are of each size of their own
    """
    counts = counted(shapes, pictures)
    while small := {size for size, count in counts.items() if count < together}:
        if policy == "drop" and len(small) == len(counts):
            raise UserError(
                f"data.small_buckets drop leaves no picture: of {len(counts)} sizes none has the {together} pictures "
                "that a step shows; choose repeat or merge_nearest, a smaller train.batch_size, or data.aspect square"
            )
        if policy != "merge_nearest" or len(counts) == 1:
            return shapes, frozenset(small if policy == "drop" else ())
        least = min(small, key=lambda size: (counts[size], size))
        shapes = shapes.among(set(counts) - {least})
        counts = counted(shapes, pictures)
    return shapes, frozenset()


def counted(shapes: Shapes, pictures: Mapping[Size, int]) -> dict[Size, int]:
    """How many pictures come to each size, of those that any comes to."""
    found: dict[Size, int] = {}
    for picture, count in pictures.items():
        size = shapes.of(picture)
        found[size] = found.get(size, 0) + count
    return found


@cache
def _fits(size: Size, parts: tuple[float | None, ...], mirrored: tuple[bool, ...]) -> tuple[Fit, ...]:
    return tuple(Fit(size, at, mirror) for mirror in mirrored for at in parts)


def whole_fit(size: Size, crop: Crop) -> Fit:
    """The one fit in which a picture is measured and shown to its owner."""
    return Fit(size, None if crop == "none" else 0.5)


def view_count(data: Data) -> int:
    """In how many ways each picture is encoded."""
    return (data.crops if data.crop == "random" else 1) * (1 + data.flip)


@dataclass(frozen=True)
class Sized:
    """Pictures with the sizes that they are brought to; those of one size follow each other.

    own   the pictures' own sizes, where they were asked for
    """

    rows: list[Row]
    sizes: list[Size]
    own: list[Size] = field(default_factory=list)

    @classmethod
    def square(cls, rows: list[Row], side: int) -> Self:
        """All of one size."""
        return cls(rows, [(side, side)] * len(rows))

    @classmethod
    def by(cls, shapes: Shapes, rows: Sequence[Row], own: Sequence[Size], left_out: Set[Size] = frozenset()) -> Self:
        """Each brought to the size that fits, in the order of the sizes and then as they are given."""
        size_of = {size: shapes.of(size) for size in set(own)}
        found = [(size_of[size], size, row) for row, size in zip(rows, own, strict=True)]
        kept = sorted((one for one in found if one[0] not in left_out), key=lambda one: (_aspect(one[0]), one[0]))
        return cls([row for _, _, row in kept], [size for size, _, _ in kept], [own for _, own, _ in kept])

    @property
    def counts(self) -> dict[Size, int]:
        """How many there are of each size."""
        return Counter(self.sizes)

    def views(self, data: Data) -> list[tuple[Fit, ...]]:
        """The fits in which each picture is encoded, and of which a draw shows one: of all pictures as many."""
        count = view_count(data) // (1 + data.flip)
        parts: tuple[float | None, ...] = tuple((number + 0.5) / count for number in range(count))
        parts = (None,) if data.crop == "none" else parts
        found = []
        for row, size, own in zip(self.rows, self.sizes, self.own or self.sizes, strict=True):
            fits_as_it_is = count > 1 and not cropped(own, size)
            mirrored = (False, row.may_be_mirrored) if data.flip else (False,)
            found.append(_fits(size, (0.5,) * count if fits_as_it_is else parts, mirrored))
        return found

    def table(self, together: int, crop: Crop, called: str = "") -> list[str]:
        """A line for each size: its pictures, its steps of so many in an epoch, what is cropped, squeezed, enlarged."""
        lines, of_size = [], dict[Size, list[tuple[Row, Size]]]()
        for row, size, own in zip(self.rows, self.sizes, self.own, strict=True):
            of_size.setdefault(size, []).append((row, own))
        for size, shown in of_size.items():
            own_sizes = list({id(row): own for row, own in shown}.values())  # a picture may be shown several times
            told = [
                f"{numbered(len(own_sizes), 'picture')}, {numbered(f'{len(shown) / together:.3g}', 'step')} an epoch"
            ]
            cuts = [lost for own in own_sizes if (lost := cropped(own, size))]
            if cuts and crop == "none":
                told.append(f"{len(cuts):,} squeezed, up to {1 / (1 - max(cuts)):.3g} times")
            elif cuts:
                told.append(
                    f"{len(cuts):,} cropped, by {sum(cuts) / len(cuts):.1%} on average, {max(cuts):.1%} at most"
                )
            if larger := [scale for own in own_sizes if (scale := enlarged(own, size)) > 1]:
                told.append(f"{len(larger):,} enlarged, up to {max(larger):.3g} times")
            lines.append(f"{f'{called}{size[0]} x {size[1]}':<18} {'; '.join(told)}")
        return lines


@dataclass(frozen=True)
class Order:
    """Which sample each draw shows, so that draws which belong together are of one bucket; nothing grows with the set.

    A bucket's samples are drawn pass after pass, in each pass every one once, in an order of its own; how many have
    been drawn by the end of an epoch is its share, rounded to whole steps. What a pass leaves of the last step begins
    the next: nothing is left out, and nothing is shown more often than the rest.

    counts     samples of each bucket; the samples of a bucket follow each other
    together   draws that are of one bucket: a step's; of one bucket alone it does not matter
    """

    counts: tuple[int, ...]
    together: int

    def sample(self, seed: int, draw: int) -> int:
        """The number of the sample."""
        if len(self.counts) == 1:
            bucket, number = 0, draw
        else:
            step, inside = divmod(draw, self.together)
            bucket, turn = _turn(self, seed, step)
            number = turn * self.together + inside
        count = self.counts[bucket]
        epoch, place = divmod(number, count)
        purpose = f"epoch order of bucket {bucket}" if bucket else "epoch order"
        return sum(self.counts[:bucket]) + permuted(seed, epoch, purpose, count, place)

    def turns(self, seed: int, epoch: int) -> list[int]:
        """How many steps each bucket has had when an epoch begins."""
        offsets = _offsets(seed, len(self.counts), self.together)
        pairs = zip(self.counts, offsets, strict=True)
        return [(epoch * count + offset) // self.together for count, offset in pairs]


@lru_cache(8)  # the draws of a step ask the same
def _turn(order: Order, seed: int, step: int) -> tuple[int, int]:
    """The bucket that a step is of, and the number of this step among the bucket's own."""
    epoch = step * order.together // sum(order.counts)
    while sum(order.turns(seed, epoch)) > step:
        epoch -= 1
    while sum(order.turns(seed, epoch + 1)) <= step:
        epoch += 1
    begin, end = order.turns(seed, epoch), order.turns(seed, epoch + 1)
    place = permuted(seed, epoch, "buckets", sum(end) - sum(begin), step - sum(begin))
    for bucket, (first, last) in enumerate(zip(begin, end, strict=True)):
        if place < last - first:
            return bucket, first + place
        place -= last - first
    raise AssertionError("a step belongs to some bucket")


@cache
def _offsets(seed: int, buckets: int, together: int) -> tuple[int, ...]:
    """By what each share is rounded: at random, so that all buckets smaller than a step do not come in one epoch."""
    return tuple(permuted(seed, bucket, "rounding", together, 0) for bucket in range(buckets))
