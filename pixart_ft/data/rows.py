"""A captioned picture; what a source holds of them, to the last one; what the columns of a table say of each."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from PIL import Image

from pixart_ft.config.sources import PictureSource
from pixart_ft.config.text import visible
from pixart_ft.data.pixels import Opened, departs, read_mask, read_picture
from pixart_ft.errors import UserError
from pixart_ft.files import explained, sha256, stamp

CAPTION_COLUMNS = ("text", "caption")
_ONE_SIDED = re.compile(  # what a mirror image makes wrong, in English
    r"[\"“”«»„「」『』]|(?<![^\W_])(left(most|ward|wards)?|right(most|ward|wards)?|(anti|counter)?-?clockwise|texts?|letters?"
    r"|lettering|words?|writing|written|handwriting|inscription|inscribed|caption|logo|signs?|labels?|numbers?|digits?"
    r"|clock|map)(?![^\W_])",  # an underscore parts words too, as in tags
    re.IGNORECASE,
)
UNREAD = "pictures that cannot be read (repair them or move them out)"


class Inside(Protocol):
    """Where the bytes of a picture lie within something larger; as text it is named in messages."""

    def read_bytes(self) -> bytes: ...

    def stamp(self) -> list[int] | None:
        """See `files.stamp`; None where only reading tells."""


Place = Path | Inside


@dataclass(frozen=True, slots=True)
class File:
    """A file below a folder, in a fifth of a Path's memory."""

    folder: Path
    name: str

    def read_bytes(self) -> bytes:
        """All of it."""
        return (self.folder / self.name).read_bytes()

    def stamp(self) -> list[int]:
        """See `files.stamp`."""
        return stamp(self.folder / self.name)

    def __str__(self) -> str:
        return str(self.folder / self.name)


Said = dict[str, float]  # the captions of a picture and the share of the draws that each has; {}: it has none


@dataclass(frozen=True, slots=True)
class Row:
    """One captioned picture.

    name     its path relative to the data folder, with forward slashes
    others   further captions of it
    shares   of the draws that each caption has, the first before the others, where there are several; 1 together
    background   the colour behind what is transparent
    mask     a grey picture as large, white where this one is trained on, or `where` itself: where it is not transparent
    """

    where: Place
    caption: str
    name: str
    others: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    background: str = "white"
    mask: Place | None = None

    @classmethod
    def of(cls, where: Place, said: Said, name: str, background: str, mask: Place | None) -> "Row":
        """With the captions by their shares."""
        first, *others = said
        return cls(where, first, name, tuple(others), tuple(said.values()) if others else (), background, mask)

    @property
    def captions(self) -> tuple[str, ...]:
        """All of them, the one that is measured first."""
        return (self.caption, *self.others)

    @property
    def may_be_mirrored(self) -> bool:
        """Whether its captions say nothing of sides, writing or numbers, which would be wrong of the mirror image."""
        return not any(map(_ONE_SIDED.search, self.captions))

    def content(self) -> bytes:
        """The bytes of its file. Raises UserError naming it."""
        return _bytes(self.where)

    def digest(self, content: bytes) -> str:
        """What names the picture in a cache: the SHA-256 of its bytes and, where it is not read as usual, how; and its
        mask's. Raises UserError naming a mask that cannot be read."""
        name = f"{sha256(content)} {departs(content, self.background)}".rstrip()
        if self.mask is None:
            return name
        return f"{name} shown by {'its alpha' if self.mask is self.where else sha256(_bytes(self.mask))}"

    def stamps(self) -> list[list[int]] | None:
        """What changes when its file does, or its mask's, without reading them. Raises OSError."""
        places = [self.where, *([] if self.mask is None or self.mask is self.where else [self.mask])]
        every = [stamp(place) if isinstance(place, Path) else place.stamp() for place in places]
        found = [one for one in every if one is not None]
        return found if len(found) == len(every) else None

    def shown(self) -> Image.Image | None:
        """Its mask, see `read_mask`. Raises UserError naming it."""
        return None if self.mask is None else read_mask(self.mask, _bytes(self.mask), alpha=self.mask is self.where)

    def opened(self, content: bytes | None = None, *, small: bool = False) -> Opened:
        """The picture, of its bytes where they were read before; see `read_picture`. Raises UserError naming it."""
        return read_picture(self.where, self.content() if content is None else content, self.background, small=small)


def _bytes(place: Place) -> bytes:
    with explained(place, "read"):
        return place.read_bytes()


@dataclass(frozen=True)
class Account:
    """What a source holds, to the last picture.

    source    what it is, in words: the picture folder X
    rows      that can be used
    pictures  in it, with or without a caption, also those of types that are not read and links that lead nowhere
    orphans   captions without a picture
    wrong     by kind, what keeps the other pictures and captions from being used
    """

    source: str
    rows: list[Row]
    pictures: int
    orphans: int
    wrong: dict[str, list[str]]

    def usable(self, *, strict: bool = True) -> list[Row]:
        """The rows. Raises UserError with all that is wrong; not strict, it warns of that unless no row is left."""
        if self.wrong and strict:
            hint = "\n  --data.strict false leaves out what is named here" if self.rows else ""
            raise UserError(self._told(f"{self.source} cannot be used as it is:") + hint)
        if not self.rows:
            raise UserError(self._told(f"{self.source} has no picture that can be used:"))
        if self.wrong:
            warnings.warn(self._told(f"left out of {self.source}:"), stacklevel=3)
        return self.rows

    def without(self, unread: Mapping[Row, str]) -> "Account":
        """The same once it was found why some pictures cannot be read."""
        rows = [row for row in self.rows if row not in unread]
        return replace(self, rows=rows, wrong=self.wrong | ({UNREAD: list(unread.values())} if unread else {}))

    def _told(self, subject: str) -> str:
        return "\n".join([subject, *(listed(kind, items) for kind, items in self.wrong.items())])


class Report:
    """Everything wrong, kind by kind with the paths concerned."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        self.found.setdefault(kind, []).append(visible(item))


def listed(kind: str, items: Sequence[str], most: int = 10) -> str:
    """A kind of fault, how many there are, and the first of them."""
    shown = [f"    {item}" for item in items[:most]]
    rest = [f"    and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {kind}: {len(items)}", *shown, *rest])


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and `fraction` of them held out, both in the given order.

    The held-out rows are those whose (seed, name) hash lowest, so pictures added later hardly change who is
    held out. At least one is (unless `fraction` is 0) and at least one is left to train on; a single row
    cannot be split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.held_out_fraction must be at least 0 and below 1, not {fraction}")
    if fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise UserError(f"data.held_out_fraction {fraction} needs two pictures or more; there is {len(rows)}")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{row.name}".encode()).digest())
    held_out = {id(row) for row in ranked[:count]}  # names of several sources may be equal
    return [row for row in rows if id(row) not in held_out], [row for row in rows if id(row) in held_out]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows, each once, where some stand several times."""
    return list({id(row): row for row in rows}.values())


def said_by(cells: Mapping[str, object], asked: PictureSource, usual: Sequence[str] = CAPTION_COLUMNS) -> Said | None:
    """The captions in the cells of a picture; None where one is no text.

    A list is so many captions, in a column that was asked for: in another it may be tags.
    """
    columns = asked.caption or [column for column in usual if cells.get(column) not in (None, "")][:1]
    said: Said = {}
    for column, weight in zip(columns, asked.caption_weights or [1.0] * len(columns), strict=True):
        words = texts_in(cells.get(column), asked)
        if words is None:
            return None
        for text in words:
            said[text] = said.get(text, 0.0) + weight / len(words)
    whole = sum(said.values())
    return {text: weight / whole for text, weight in said.items()}


def texts_in(cell: object, asked: PictureSource) -> list[str] | None:
    """What a cell says, [] if nothing; None where something of it is no text."""
    texts = [text for text in (cell if isinstance(cell, list) and asked.caption else [cell]) if text is not None]
    words = [text.strip() for text in texts if isinstance(text, str)]
    return [text for text in words if text] if len(words) == len(texts) else None


def named_columns(asked: PictureSource, usual: Sequence[str] = CAPTION_COLUMNS) -> list[Sequence[str]]:
    """The columns of captions and masks that a table must have, each by the names that will do."""
    captions: list[Sequence[str]] = [(column,) for column in asked.caption]
    return (captions or [usual]) + ([(asked.mask_column,)] if asked.mask_column else [])


def point_at_columns(name: str, columns: Sequence[str], needed: Sequence[Sequence[str]], report: Report) -> None:
    """Report the columns that no row has, and what may be meant for them."""
    for wanted in needed:
        if not set(wanted) & set(columns):
            near = [(column, get_close_matches(column.strip().lower(), wanted, 1)) for column in columns]
            meant = "".join(f'; write {match[0]} instead of "{column}"' for column, match in near if match)
            there = ", ".join(f'"{column}"' for column in columns)
            report.add(f"columns that {name} lacks", f"{' or '.join(wanted)}: it has {visible(there)}{visible(meant)}")
