"""Every picture read and decoded once before it is used: what names it, how large it is, whether it can be read."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pixart_ft.data.pixels import Box, Size
from pixart_ft.data.rows import UNREAD, Row, listed
from pixart_ft.errors import UserError
from pixart_ft.files import write_text

Item = TypeVar("Item")
Found = TypeVar("Found")


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

    memo      a JSON file of what was decoded before, by digest: such pictures are read and not decoded again
    remember  add to it what is decoded now
    """
    known = _remembered(memo)
    before = len(known)

    def look(row: Row) -> Seen | str:
        try:
            content = row.content()
            digest = row.digest(content)
            if digest not in known:
                opened = row.opened(content, small=True)
                known[digest] = Seen(digest, opened.size, opened.notes, _shown(row, opened.size))
        except UserError as error:
            return str(error)
        return known[digest]

    found = list(tqdm(in_threads(look, rows), "pictures read", len(rows), delay=1, disable=None if progress else True))
    if memo and remember and len(known) > before:
        with suppress(UserError):  # it is only a memory, and a full cache may be read-only
            entries = {
                one.digest: [*one.size, *([one.shown] if one.shown else []), *one.notes] for one in known.values()
            }
            write_text(memo, json.dumps(entries))
    return found


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
    found = {}
    for digest, entry in entries.items() if isinstance(entries, dict) else ():
        match entry:
            case [int(width), int(height), [int(), int(), int(), int()] as box, *notes] if _are_text(notes):
                found[digest] = Seen(digest, (width, height), tuple(notes), tuple(box))
            case [int(width), int(height), *notes] if _are_text(notes):
                found[digest] = Seen(digest, (width, height), tuple(notes))
    return found


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
