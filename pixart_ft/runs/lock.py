"""One process at a time writes into a run folder."""

import json
import os
import socket
import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pixart_ft.errors import UserError
from pixart_ft.files import explained

try:
    import fcntl
except ImportError:  # Windows has no such locks; there the user takes care
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"


class RunLock:
    """The lock of a run folder, taken by `take` and given back at the end of the `with` block.

    The system gives it back when the process ends, however it ends: a killed run never blocks its own continuation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Take the lock of the folder, which exists; UserError names the process that holds it."""
        if self._file is not None or fcntl is None:
            return
        with explained(self.folder / LOCK_NAME):
            file = (self.folder / LOCK_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise UserError(
                    f"run.folder: {self.folder} is in use by {_holder(file)}; wait for it to end, stop it, or choose "
                    "another run.name"
                ) from None
        except OSError as error:  # a file system without locks
            warnings.warn(
                f"{self.folder} cannot be locked ({error.strerror}); let no other run write into it", stacklevel=2
            )
        file.truncate(0)
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}, file
        )
        file.flush()
        self._file = file


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        found = json.load(file)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):  # read in the moment between its lock and its name
        return "another process"
