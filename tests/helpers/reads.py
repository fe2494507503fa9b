"""Which files are opened to be read, and by whom. Shared."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("pixart_ft", "diffusers", "transformers", "tokenizers", "huggingface_hub", "peft", "safetensors")

_opened: list[tuple[str, str]] | None = None  # a hook can never be removed, so this turns it off


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is None or event != "open":
        return
    path, _, flags = arguments
    if isinstance(path, str | bytes) and isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY:
        _opened.append((os.path.abspath(os.fsdecode(path)), _reader()))


def _reader() -> str:
    """Package and function that reads: the innermost of those that may."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in PACKAGES:
            return f"{package} {frame.f_code.co_name}"
        frame = frame.f_back
    return "another"


@contextmanager
def reads_below(folder: Path) -> Iterator[Counter[tuple[str, str]]]:
    """How often each file below `folder` is opened to be read inside, by (its path there, who).

    What is read from native code, as safetensors' weights, is not seen.
    """
    global _opened
    if _hook not in _hooks:
        _hooks.append(_hook)
        sys.addaudithook(_hook)
    found: Counter[tuple[str, str]] = Counter()
    _opened = []
    try:
        yield found
    finally:
        root, opened, _opened = Path(os.path.abspath(folder)), _opened, None
        paths = [(Path(path), who) for path, who in opened]
        found.update((str(p.relative_to(root)), who) for p, who in paths if p.is_relative_to(root) and p.is_file())


_hooks: list[object] = []
