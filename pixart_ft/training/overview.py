"""What the pictures and captions of a run are like before anything is made of them: lines, histograms, a sheet."""

import math
import statistics
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Self

from PIL import Image, ImageEnhance, ImageOps
from transformers import PreTrainedTokenizerBase

from pixart_ft.config.text import numbered, visible
from pixart_ft.data.pixels import Fit, Size, cropped, cut, enlarged
from pixart_ft.data.rows import Row, listed
from pixart_ft.data.seen import Seen, in_threads
from pixart_ft.model.captions import warn_of_trigger_words
from pixart_ft.model.text import token_counts
from pixart_ft.pictures.sheets import grid, marked, save_png

SHEET = "contact_sheet"  # the key by which the recipe of such a sheet is known
_COLUMNS, _ROWS, _CELL = 6, 6, 192  # of a sheet, its cells in pixels
_DIMMED = 0.25  # what a mask leaves out
_COUNTED = 100_000  # captions, evenly chosen; to count the tokens of millions takes minutes
_WIDTH = 140


@dataclass(frozen=True)
class Pair:
    """A picture with its caption.

    size     of the picture in its file
    fit      how the VAE sees it
    tokens   of its longest caption, whole and its end included; None where they were not counted
    """

    row: Row
    size: Size
    fit: Fit
    tokens: int | None

    @property
    def enlarged(self) -> float:
        """By what its sides are multiplied until it covers that size."""
        return enlarged(self.size, self.fit.size)

    @property
    def lost(self) -> float:
        """The share of the picture that is cut off, see `cropped`."""
        return 0.0 if self.fit.at is None else cropped(self.size, self.fit.size)


@dataclass(frozen=True)
class Overview:
    """The pairs of a run, those that are measured last; `max_tokens` are kept of a caption."""

    pairs: Sequence[Pair]
    max_tokens: int

    @classmethod
    def of(
        cls,
        seen: Mapping[Row, Seen],
        rows: Sequence[Row],
        fit: Callable[[Size], Fit],
        tokenizer: PreTrainedTokenizerBase | None,
        max_tokens: int,
    ) -> Self:
        """Of rows that were seen; `fit` is of a picture's own size."""
        every = math.ceil(len(rows) / _COUNTED)
        captions = [caption for row in rows[::every] for caption in row.captions]
        counts = {} if tokenizer is None else token_counts(tokenizer, captions)

        def pair(row: Row) -> Pair:
            own, tokens = seen[row].size, [counts[caption] for caption in row.captions if caption in counts]
            return Pair(row, own, fit(own), max(tokens, default=None))

        return cls([pair(row) for row in rows], max_tokens)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest caption, as it is cut."""
        return max((min(pair.tokens or 0, self.max_tokens) for pair in self._counted), default=None)

    @property
    def _counted(self) -> list[Pair]:
        """Those whose tokens were counted, the longest first."""
        return sorted((pair for pair in self.pairs if pair.tokens is not None), key=lambda pair: -(pair.tokens or 0))

    @property
    def _cut(self) -> list[Pair]:
        return [pair for pair in self._counted if (pair.tokens or 0) > self.max_tokens]

    @property
    def _enlarged(self) -> list[Pair]:
        """Those smaller than the VAE sees them, the smallest first."""
        return sorted((pair for pair in self.pairs if pair.enlarged > 1), key=lambda pair: -pair.enlarged)

    @property
    def _cropped(self) -> list[Pair]:
        """Those of which something is cut off, the most first."""
        return sorted((pair for pair in self.pairs if pair.lost), key=lambda pair: -pair.lost)

    def facts(self) -> list[str]:
        """Sizes, tokens and the first pairs, a few lines."""
        return [
            *_fact("picture sizes", self._sizes()),
            *_fact("caption tokens", self._tokens()),
            *chain(*(_fact("" if number else "first pairs", _pair(p.row)) for number, p in enumerate(self.pairs[:3]))),
        ]

    def _sizes(self) -> str:
        count = len(self.pairs)
        sizes = sorted({pair.size for pair in self.pairs}, key=math.prod)
        told = [" to ".join(map(_size, sizes[:: max(1, len(sizes) - 1)]))]
        if small := self._enlarged:
            told.append(f"{len(small)} of {count} enlarged, up to {small[0].enlarged:.3g} times: {_name(small[0].row)}")
        if cropped := self._cropped:
            half = sum(pair.lost > 0.5 for pair in cropped)
            over = f", {half} of them by over half" if half else ""
            told.append(f"{len(cropped)} cropped, up to {cropped[0].lost:.0%}: {_name(cropped[0].row)}{over}")
        return "; ".join(told)

    def _tokens(self) -> str:
        counts = [pair.tokens or 0 for pair in self._counted]
        if not counts:
            return "not counted: the base's tokenizer is not at hand"
        told = f"{counts[-1]} to {counts[0]}, half of them up to {statistics.median_low(counts)}"
        if len(counts) < len(self.pairs):
            told += f", of {len(counts):,} captions that were counted"
        if cut := self._cut:
            told += (
                f"; {len(cut)} of {len(counts):,} exceed data.max_tokens {self.max_tokens} and are cut, the longest "
            )
            told += f"of {_name(cut[0].row)}"
        return told

    def details(self) -> list[str]:
        """The facts with histograms and names."""
        cut = [f"{_name(pair.row)}: {pair.tokens} tokens" for pair in self._cut]
        small = [f"{_name(p.row)}: {_size(p.size)}, {p.enlarged:.3g} times" for p in self._enlarged]
        cropped = [f"{_name(p.row)}: {_size(p.size)}, {p.lost:.0%} lost" for p in self._cropped]
        return [
            *self.facts(),
            *(["captions by tokens"] if self._counted else []),
            *_histogram([pair.tokens or 0 for pair in self._counted], self.max_tokens),
            *(listed(f"captions of more than {self.max_tokens} tokens, cut", cut).splitlines() if cut else []),
            *(listed("pictures enlarged and so blurred", small).splitlines() if small else []),
            *(listed("pictures of which something is cropped", cropped).splitlines() if cropped else []),
        ]

    def warn(self, seen: Mapping[Row, Seen], triggers: Sequence[str] = ()) -> None:
        """Warn of pictures that are not read as they may seem, and of words that are not read as they are written."""
        if told := [f"{_name(pair.row)}: {note}" for pair in self.pairs for note in seen[pair.row].notes]:
            warnings.warn(listed("pictures that are not read as they may seem", told, 3), stacklevel=2)
        warn_of_trigger_words([caption for pair in self.pairs for caption in pair.row.captions], triggers)

    def sheet(self) -> Image.Image:
        """Pictures as the VAE sees them with their captions: the worst of each kind, marked, then others evenly chosen.

        What masks leave out is dark.

        Raises UserError for one that cannot be read any more.
        """
        worst = _alternately([self._cut, self._enlarged, [pair for pair in self._cropped if pair.lost > 0.5]])
        room = _COLUMNS * _ROWS
        shown = worst[: max(room // 2, room - len(self.pairs) + len(worst))]
        chosen = {pair.row.name for pair in shown}
        others = [pair for pair in self.pairs if pair.row.name not in chosen]
        count = min(room - len(shown), len(others))
        shown += [others[number * len(others) // count] for number in range(count)]
        pictures = list(in_threads(lambda row: row.opened().picture, [pair.row for pair in shown]))
        cells = [self._cell(pair, picture) for pair, picture in zip(shown, pictures, strict=True)]
        captions = [pair.row.caption for pair in shown]
        return grid(
            [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)],
            title=f"{len(shown)} of {numbered(len(self.pairs), 'picture')} as the VAE sees them"
            + (f", {len(worst):,} of all marked" if worst else ""),
            captions=[captions[start : start + _COLUMNS] for start in range(0, len(captions), _COLUMNS)],
            caption_lines=3,
            cell=_CELL,
        )

    def _cell(self, pair: Pair, picture: Image.Image) -> Image.Image:
        shown, mask = cut(picture, pair.fit), pair.row.shown()
        if mask is not None:
            shown = Image.composite(shown, ImageEnhance.Brightness(shown).enhance(_DIMMED), cut(mask, pair.fit))
        return marked(ImageOps.contain(shown, (_CELL, _CELL)), ", ".join(self._marks(pair)))

    def _marks(self, pair: Pair) -> list[str]:
        """What is bad about a pair."""
        found = {
            f"{pair.tokens} tokens, cut": (pair.tokens or 0) > self.max_tokens,
            f"enlarged {pair.enlarged:.3g} x": pair.enlarged > 1,
            f"{pair.lost:.0%} cropped": pair.lost > 0.5,
        }
        return [mark for mark, applies in found.items() if applies]

    def save_sheet(self, path: Path) -> None:
        """Write that as a PNG."""
        save_png(self.sheet(), path, {SHEET: len(self.pairs), "pictures": len(self.pairs)})


def _fact(name: str, told: str) -> list[str]:
    first, *more = textwrap.wrap(told, _WIDTH - 19, break_on_hyphens=False) or [""]
    return [f"{name:<18} {first}", *(19 * " " + line for line in more)]


def _pair(row: Row) -> str:
    return f'{_name(row)}: "{textwrap.shorten(row.caption, 80, placeholder=" ...")}"'


def _name(row: Row) -> str:
    """The name of a picture, its end where it is long."""
    name = visible(row.name)
    return name if len(name) <= 50 else f"...{name[-47:]}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _alternately(kinds: Iterable[Sequence[Pair]]) -> list[Pair]:
    """The first of each, then the second of each, every one once."""
    return list({id(pair): pair for pair in chain(*zip_longest(*kinds)) if pair is not None}.values())


def _histogram(values: Sequence[int], limit: int) -> list[str]:
    """Lines of bars: how many values lie in each interval up to a limit, and how many above it."""
    inside = [value for value in values if value <= limit]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if 8 * step >= max(inside, default=1))
    counts = Counter((value - 1) // step for value in inside)
    bars = {}
    for number in range(min(counts, default=0), max(counts, default=-1) + 1):
        first, last = number * step + 1, min((number + 1) * step, limit)
        bars[f"{first} to {last}" if first < last else str(last)] = counts[number]
    if len(inside) < len(values):
        bars[f"over {limit}, cut"] = len(values) - len(inside)
    unit = max(bars.values(), default=1) / 50
    return [f"  {name:>16}  {'#' * math.ceil(count / unit)} {count:,}" for name, count in bars.items()]
