"""Files and folders whole or absent, and the system's refusals. Oracle: what the disk holds afterwards, and errno."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixart_ft import files
from pixart_ft.errors import UserError
from pixart_ft.files import (
    explained,
    probe,
    read_object,
    remove_folder,
    sha256,
    sweep,
    write_bytes,
    write_file,
    write_folder,
    write_text,
)

DEAD = 2**22 + 1  # no process has this number: Linux' highest is 2**22


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refuse(number: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if path.is_dir():
            (path / "half").write_text("half")
        else:
            path.write_text("half")
        raise OSError(number, os.strerror(number))

    return write


# Whole or absent


@pytest.mark.parametrize("number", sorted(files._REASONS))
def test_what_the_system_refuses_is_one_message_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    reason = re.escape(files._REASONS[number])
    for write, path in ((write_file, tmp_path / "file"), (write_folder, tmp_path / "folder")):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} cannot be written: {reason}$"):
            write(path, refuse(number))
    assert names(tmp_path) == []


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    """The first example of FIPS 180-2, B.1."""
    found = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    write_bytes(tmp_path / "file", b"abc")
    assert sha256(tmp_path / "file") == sha256(b"abc") == found


def test_a_number_without_words_of_ours_has_the_systems() -> None:
    said = r"^data\.cache: here cannot be read: Stale file handle$"
    with pytest.raises(UserError, match=said), explained(Path("here"), "read", "data.cache"):
        raise OSError(errno.ESTALE, "")
    with pytest.raises(OSError, match="of a library"), explained(Path("here")):  # no number: not the system's
        raise OSError("of a library")


def test_the_full_disk_that_safetensors_reports_as_text_counts_too() -> None:
    error = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert files.reason_of(error) == files._REASONS[errno.ENOSPC]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")
    write_folder(tmp_path / "folder", lambda aside: (aside / "a").write_text("before"))
    for stop in (KeyboardInterrupt, UserError):

        def fail(aside: Path, stop: type[BaseException] = stop) -> None:
            raise stop

        with pytest.raises(stop):
            write_file(tmp_path / "file", fail)
        with pytest.raises(stop):
            write_folder(tmp_path / "folder", fail)
    assert names(tmp_path) == ["file", "folder", "folder/a"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/a").read_text() == "before"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_permissions_of_a_new_one(tmp_path: Path, umask: int) -> None:
    """safetensors writes 0600 whatever the umask."""

    def save(path: Path) -> None:
        save_file({"a": torch.zeros(1)}, str(path))

    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", save)
        write_folder(tmp_path / "folder", lambda aside: save(aside / "file"))
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# What a killed process leaves


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from pixart_ft.files import *\n"
        "def die(aside): os.kill(os.getpid(), signal.SIGKILL)\n"
        "globals()[sys.argv[1]](Path(sys.argv[2]), die)"
    )
    for write, name in (("write_file", "a.json"), ("write_folder", "step-000010")):
        place = tmp_path / write / name
        process = subprocess.run([sys.executable, "-c", code, write, str(place)], cwd=Path(__file__).parents[1])
        assert process.returncode == -9
        assert len(names(place.parent)) == 1 and not place.exists()
        sweep(place.parent)
        assert names(place.parent) == []


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    digest, host = "0" * 64, files._HOST
    dead = [f".pixart_ft-{host}-{DEAD}-0.part", f"{digest}.safetensors.{DEAD}.part", f".grid.png.{DEAD}.part"]
    dead.append(f".pixart_ft-{host}-{os.getpid()}-77.part")  # an earlier process had our number
    stay = [f".pixart_ft-{host}-1-0.part", f".pixart_ft-elsewhere-{DEAD}-0.part", f"film.{DEAD}.part", ".bashrc.old"]
    for name in (*dead, *stay):
        (tmp_path / name).write_text("")
    with files._aside(tmp_path) as mine:
        mine.write_text("being written")
        sweep(tmp_path)
        assert mine.exists()
    assert names(tmp_path) == sorted(stay)
    os.utime(tmp_path / stay[1], (0, 0))  # another machine's, of long ago
    sweep(tmp_path)
    assert names(tmp_path) == sorted({*stay} - {stay[1]})
    sweep(tmp_path / "absent")


def test_a_folder_whose_replacement_was_cut_short_comes_back(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        (aside / "a").write_text("earlier")

    write_folder(tmp_path / "adapter", write)
    (tmp_path / "adapter").rename(tmp_path / f".adapter{files._REPLACED}")  # killed before the next rename
    sweep(tmp_path)
    assert names(tmp_path) == ["adapter", "adapter/a"]
    (tmp_path / f".adapter{files._REPLACED}").mkdir()  # killed after it
    sweep(tmp_path)
    assert names(tmp_path) == ["adapter", "adapter/a"]


def test_a_folder_is_never_half_deleted_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_delete", lambda path: None)  # killed here
        remove_folder(tmp_path / "old")
    assert not (tmp_path / "old").exists() and len(names(tmp_path)) == 2


# Destinations


def test_a_destination_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / f".pixart_ft-{files._HOST}-{DEAD}-0.part").write_text("")
    probe(tmp_path / "a" / "b", "out")
    probe(tmp_path, "out")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for folder, reason in (
        (tmp_path / "file", "a file is in the way of a folder"),
        (tmp_path / "file" / "b", "a part of this path is a file"),
        (tmp_path / "a" / ("x" * 300), "the name is too long"),
        (tmp_path / ("x" * 300), "the name is too long"),
    ):
        with pytest.raises(UserError, match=f"^out: {re.escape(str(folder))} cannot be written: {reason}"):
            probe(folder, "out")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "holds a list"),
        (b"7", "holds a int"),
        (b"9" * 5000, "is no JSON"),
        (None, "there is no such file"),
    ],
)
def test_a_damaged_json_file_is_one_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^adapter: cannot read .*a\.json: .*{message}.*; copy it again$"):
        read_object(path, "adapter", "copy it again")
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        read_object(path, "adapter", "copy it again")
