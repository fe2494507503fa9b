"""Several processes of one run, as a launcher starts them, on this machine. Shared.

They are forked, so they need not import for ten seconds; each has its own environment, and its stderr goes to a file.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState


class Launched:
    """Processes that run; `end` waits for all."""

    def __init__(self, body: Callable[[int], object], folder: Path, count: int, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        # CUDA does not survive a fork
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        self.processes = [
            context.Process(target=_run, args=(body, rank, self._stderr(rank), shared)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def end(self, within: float = 200) -> list[int | None]:
        """The exit codes, negative for a signal; None for a process that had not ended by then and is killed."""
        until = time.monotonic() + within
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int) -> str:
        """What a process wrote to stderr."""
        return self._stderr(rank).read_text()

    def _stderr(self, rank: int) -> Path:
        return self.folder / f"stderr-{rank}.txt"


def launch(
    body: Callable[[int], object], folder: Path, *, count: int = 2, environment: Mapping[str, str] | None = None
) -> Launched:
    """Start `body(rank)` in `count` processes, as torchrun does; what `body` returns is the exit code.

    folder: where their stderr goes. environment: variables beside those of torchrun.
    """
    return Launched(body, folder, count, environment or {})


def _run(body: Callable[[int], object], rank: int, stderr: Path, environment: Mapping[str, str]) -> None:
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # the one that pytest had put there is the parent's
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent was alone
    torch.set_num_threads(1)
    code = body(rank)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)
