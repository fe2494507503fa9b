"""Files and folders that are whole or absent, one message for each thing that the system may refuse, and versions.

What is being written stands aside under a name that says whose it is, `.pixart_ft-HOST-PROCESS-NUMBER.part`, so that
`sweep` can tell what a killed process left from what another one is writing.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from pixart_ft.errors import UserError

__version__ = "0.1.0"

_REASONS = {
    errno.ENOSPC: "no space is left on the disk; make room, or choose another place",
    errno.EDQUOT: "your quota of disk space is used up; make room, or choose another place",
    errno.EFBIG: "the file is too large for this file system; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; change the permissions, or choose another place",
    errno.EPERM: "the system does not allow it; change the permissions, or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another place",
    errno.EEXIST: "a file is in the way of a folder; remove it, or choose another place",
    errno.EISDIR: "it is a folder, not a file; remove it, or choose another place",
    errno.ENOENT: "there is no such file or folder",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "too many files are open; allow more (ulimit -n 4096)",
    errno.ENFILE: "the system has too many files open; close other programs",
    errno.EIO: "the disk, or the connection to it, fails",
}
_REPLACED = ".replaced-by-pixart_ft"
_LEFT = re.compile(
    r"\.pixart_ft-(?P<host>\w*)-(?P<process>\d+)-\d+\.part"
    r"|([0-9a-f]{64}\.safetensors|files\.json|\..+\.png)\.(?P<old>\d+)\.part"  # as earlier versions named them
)
_OTHERS_AGE = 24 * 3600  # seconds after which another machine's process counts as dead
_HOST = re.sub(r"\W", "_", platform.node())[:40]
_numbers = count()
_mine: set[Path] = set()  # what this process is writing


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file aside, flush it to disk, then give it its name; its folder is made where it is absent.

    At every moment the file is whole, or as it was. Its permissions are those of any new file (the umask), whatever
    `write` made of them. Raises UserError for what the system refuses; then nothing is left behind.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _aside(path.parent) as aside:
            aside.touch()
            permissions = aside.stat().st_mode
            write(aside)
            aside.chmod(permissions)
            sync(aside)
            aside.replace(path)
            sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of these bytes, as `write_file` does."""
    write_file(path, lambda aside: aside.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, as `write_file` does."""
    write_bytes(path, text.encode())


def sha256(content: Path | bytes) -> str:
    """The SHA-256 of a file, or of bytes, as 64 hex digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder aside, flush it to disk, then give it its name; an earlier one is replaced.

    Whole or absent, permissions and refusals as with `write_file`; if `write` fails, the earlier folder stays.
    """
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with _aside(folder.parent) as aside:
            aside.mkdir()
            sample = aside / "permissions"
            sample.touch()
            permissions = sample.stat().st_mode
            sample.unlink()
            write(aside)
            for path in [*aside.rglob("*"), aside]:
                if path.is_file():
                    path.chmod(permissions)
                sync(path)
            if folder.exists():
                folder.rename(replaced)
            aside.rename(folder)
            sync(folder.parent)
        _delete(replaced)


def remove_folder(folder: Path) -> None:
    """Delete a folder that never stands half-deleted under its name."""
    with explained(folder, "removed"), _aside(folder.parent) as aside:
        folder.rename(aside)


def sweep(folder: Path) -> None:
    """Delete what dead processes left aside in `folder`, and put back a folder whose replacement was cut short.

    What another machine's process writes (the disk may be shared) is left for a day.
    """
    with suppress(OSError):  # no such folder, or not ours to tidy
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(_REPLACED):
                whole = path.with_name(path.name[1 : -len(_REPLACED)])
                _delete(path) if whole.exists() else path.rename(whole)
            elif path not in _mine and (left := _LEFT.fullmatch(path.name)) and _is_dead(path, left):
                _delete(path)


def probe(folder: Path, key: str) -> None:
    """Raise UserError, naming `key`, unless files can be written into `folder`; leaves nothing, and sweeps it."""
    with explained(folder, "written", key):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            for attempt in range(3):
                with suppress(*[FileNotFoundError] * (attempt < 2)):  # another probe removed what it had made
                    folder.mkdir(parents=True, exist_ok=True)
                    with _aside(folder) as aside:
                        aside.write_bytes(bytes(4096))
                        sync(aside)
                    sweep(folder)
                    return
        finally:
            for place in made:
                with suppress(OSError):  # not made, or in use by now
                    place.rmdir()


def read_object(path: Path, subject: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, with `subject` before and `remedy` after it, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = reason_of(error) or str(error)
    except (ValueError, RecursionError) as error:
        reason = f"it is no JSON ({error})"
    else:
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__} instead of keys and values"
    raise UserError(f"{subject}: cannot read {path}: {reason}; {remedy}")


@contextmanager
def explained(path: object, what: str = "written", key: str = "") -> Iterator[None]:
    """Turn what the system refuses inside into a UserError that names `path`, the reason and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        raise UserError(f"{key}: {path} cannot be {what}: {reason}".removeprefix(": ")) from error


def reason_of(error: Exception) -> str | None:
    """Why the system refused, and the remedy, by the number it gave; None where there is no such number."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # as safetensors reports it
        number = int(found[1])
    return None if number is None else _REASONS.get(number, os.strerror(number))


def stamp(path: Path) -> list[int]:
    """What changes when a file does, without reading it.

    Size and time of change are no proof: fine-tunes of one model have one size, and `cp -p`, rsync and unpacking set
    the time of another file. Its inode changes with a file moved into its place, and the time at which the inode
    changed cannot be set (on Windows that is the file's birth, which what is written into it there leaves alone).
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that its numbers depend on."""
    return dict(_versions())


@cache  # every picture's recipe asks, and each answer takes milliseconds
def _versions() -> dict[str, str]:
    found = {"pixart_ft": __version__}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored build without metadata
            found[name] = "unknown"
    return found


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A name in `folder` for what is not whole yet; whatever still has it afterwards is deleted."""
    path = folder / f".pixart_ft-{_HOST}-{os.getpid()}-{next(_numbers)}.part"
    _mine.add(path)
    try:
        yield path
    finally:
        _delete(path)
        _mine.remove(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_dead(path: Path, left: re.Match[str]) -> bool:
    """Whether the process that named `path` so is gone."""
    if left["host"] not in (_HOST, None) or os.name != "posix":  # Windows' os.kill would end it
        return time.time() - path.stat().st_mtime > _OTHERS_AGE
    process = int(left["process"] or left["old"])
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return process == os.getpid()  # an earlier process had our number
