"""What a folder held when it was written: the size and SHA-256 of each file, beside them. No torch."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from pixart_ft.errors import UserError
from pixart_ft.files import sha256

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe all that lies in `folder` now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
    (folder / MANIFEST).write_bytes(_bytes(entries))


def manifest_with(folder: Path, changed: Mapping[str, bytes]) -> bytes:
    """The manifest of a folder that has one and is whole, of a copy in which some files are others."""
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return _bytes(entries | {name: [len(content), sha256(content)] for name, content in changed.items()})


def _bytes(entries: Mapping[str, object]) -> bytes:
    return json.dumps(entries, indent=1).encode()


def fault_of(folder: Path, *, hashed: str = "*") -> str | None:
    """What is no more as it was written, naming the file, or None.

    hashed: the files whose SHA-256 is compared, as in a shell; of the others the size alone. Files that were added
    since then do not count.
    """
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        entries = {name: (size, digest) for name, (size, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{manifest} is missing or unreadable"
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if fnmatchcase(name, hashed) and sha256(path) != digest:
            return f"the contents of {path} have changed"
    return None


def check_whole(folder: Path, key: str, *, hashed: str = "*") -> None:
    """Raise UserError where what a run handed out is no more as it was; one from before there were manifests passes."""
    if (folder / MANIFEST).exists() and (fault := fault_of(folder, hashed=hashed)):
        raise UserError(
            f"{key}: {fault}; copy the folder again, or delete {MANIFEST} there if you changed the file yourself"
        )
