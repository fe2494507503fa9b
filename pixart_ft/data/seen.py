"""Every picture read and decoded once before it is used: what names it, how large it is, whether it can be read."""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pixart_ft.data.pixels import TRANSFORM, Box, Size
from pixart_ft.data.rows import UNREAD, Row, listed
from pixart_ft.errors import UserError
from pixart_ft.files import write_text

Item = TypeVar("Item")
Found = TypeVar("Found")
_PLACES = "places.json"
_UNSETTLED = 2 * 10**9  # ns since a file changed, the longest tick of a file system


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that was decoded in full.

    digest  what names it in a cache, see `Row.digest`
    size    (width, height) in pixels, upright
    notes   what its owner should know of how it is read
    shown   where its mask leaves something; None: it leaves all, or there is none
    """

    digest: str
    size: Size
    notes: tuple[str, ...]
    shown: Box | None = None


def look_at(
    rows: Sequence[Row], memo: Path | None = None, *, remember: bool = False, progress: bool = True
) -> list[Seen | str]:
    """What is found of each picture, or why it cannot be read.

    memo      a JSON file of what was decoded before, by digest: such pictures are read and not decoded again. Those
              whose files are as they were, by places.json beside it, are not even read
    remember  add to both what is found now
    """
    known = _remembered(memo)
    places = _remembered_places(memo, known)
    before = len(known), len(places)

    def look(number: int) -> Seen | str:
        row, mark = rows[number], marks[number]
        try:
            content = row.content()
            digest = row.digest(content)
            if digest not in known:
                opened = row.opened(content, small=True)
                known[digest] = Seen(digest, opened.size, opened.notes, _shown(row, opened.size))
        except UserError as error:
            return str(error)
        if mark is not None:
            places[mark] = digest
        return known[digest]

    marks = [_mark(row) if memo else None for row in rows]
    as_before = [known[places[mark]] if mark in places else None for mark in marks]
    new = [number for number, one in enumerate(as_before) if one is None]
    read = iter(tqdm(in_threads(look, new), "pictures read", len(new), delay=1, disable=None if progress else True))
    found: list[Seen | str] = [next(read) if one is None else one for one in as_before]
    if memo and remember and (len(known), len(places)) != before:
        with suppress(UserError):  # it is only a memory, and a full cache may be read-only
            entries = {
                one.digest: [*one.size, *([one.shown] if one.shown else []), *one.notes] for one in known.values()
            }
            write_text(memo, json.dumps(entries))
            write_text(memo.with_name(_PLACES), json.dumps(places))
    return found


def _mark(row: Row) -> str | None:
    """What changes when a picture's file or its mask's does, or how they are read, without reading them.

    None for one that changed just now: what is written into it in the same tick of the clock would not show.
    """
    now = time.time_ns()
    try:
        stamps = row.stamps()
    except OSError:  # told where it is read
        return None
    if stamps is None or any(now - max(times) < _UNSETTLED for _, *times, _ in (one[:4] for one in stamps)):
        return None
    about = json.dumps([TRANSFORM, row.background, str(row.where), str(row.mask), stamps])
    return hashlib.sha256(about.encode()).hexdigest()[:24]


def _shown(row: Row, size: Size) -> Box | None:
    mask = row.shown()
    if mask is None:
        return None
    if mask.size != size:
        raise UserError(f"{row.mask}: a mask of {mask.size} pixels for {row.where} of {size}; give it the same size")
    if (box := mask.getbbox()) is None:
        raise UserError(f"{row.mask}: a mask that leaves nothing of {row.where} to train on")
    return None if mask.getextrema() == (255, 255) else box


def verified(rows: Sequence[Row], *, progress: bool = True) -> list[Seen]:
    """What is found of each picture. Raises one UserError that lists those that cannot be read."""
    found = look_at(rows, progress=progress)
    if unread := [one for one in found if isinstance(one, str)]:
        raise UserError(f"some pictures cannot be used:\n{listed(UNREAD, unread)}")
    return [one for one in found if isinstance(one, Seen)]


def _remembered(memo: Path | None) -> dict[str, Seen]:
    try:
        entries = json.loads(memo.read_text(encoding="utf-8")) if memo else {}
    except (OSError, ValueError, RecursionError):  # absent or damaged: it is only a memory
        entries = {}
    found, sizes = {}, dict[Size, Size]()  # one of a kind: of many pictures there are few sizes
    for digest, entry in entries.items() if isinstance(entries, dict) else ():
        match entry:
            case [int(width), int(height), [int(), int(), int(), int()] as box, *notes] if _are_text(notes):
                size = sizes.setdefault((width, height), (width, height))
                found[digest] = Seen(digest, size, tuple(notes), tuple(box))
            case [int(width), int(height), *notes] if _are_text(notes):
                size = sizes.setdefault((width, height), (width, height))
                found[digest] = Seen(digest, size, tuple(notes))
    return found


def _remembered_places(memo: Path | None, known: Mapping[str, Seen]) -> dict[str, str]:
    try:
        entries = json.loads(memo.with_name(_PLACES).read_text(encoding="utf-8")) if memo else {}
    except (OSError, ValueError, RecursionError):
        entries = {}
    pairs = entries.items() if isinstance(entries, dict) else ()
    return {mark: known[digest].digest for mark, digest in pairs if isinstance(digest, str) and digest in known}


def _are_text(notes: Sequence[object]) -> bool:
    return all(isinstance(note, str) for note in notes)


def in_threads(work: Callable[[Item], Found], items: Iterable[Item], ahead: int = 1024) -> Iterator[Found]:
    """`work` of each item, in order, by as many threads as there are processors; so many are worked on ahead."""
    waiting = deque[Future[Found]]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
