"""The processes of one run: they meet, see that they do the same, and end together, whatever ends one of them."""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from pixart_ft.errors import UserError
from pixart_ft.training.stopping import AllFailed, AllStopped

ENDED = "another process of this run has ended; see its message"
EXIT_ENDED = 3  # the exit code that goes with it

TORCHRUN = "torchrun --nproc_per_node N scripts/train.py ..."
# Where launchers write the number of processes: torchrun and accelerate, then the MPIs.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_ELSEWHERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# Shards (FSDP2) as `sharding` makes them, in the words of accelerate's configuration; nothing else is offered.
_SHARDS = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",  # that is model.gradient_checkpointing
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",  # T5 would be empty in all processes but the first
}
_USE_SHARDS = "ACCELERATE_USE_FSDP"


def asked_for(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started, by the variables it left; UserError for what it cannot give us."""
    for variable, name in _ELSEWHERE.items():
        if _is_on(environment, variable):
            raise UserError(
                f"accelerate is configured for {name}; plain data-parallel training and FSDP2 are offered: choose no "
                f"{name} in `accelerate config`, or unset {variable}"
            )
    sizes = [int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()]
    # accelerate names a meeting point for several processes, and on a processor or with one GPU it starts a single one
    if not sizes and "MASTER_PORT" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does without a second GPU; use "
            f"{TORCHRUN}; or --num_processes 1, with MASTER_PORT unset"
        )
    return max(sizes, default=1)


def shards_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the launcher asks for the network in shards; UserError for other ones than there are."""
    if not _is_on(environment, _USE_SHARDS):
        return False
    for variable, value in _SHARDS.items():
        if environment.get(variable, value).lower() != value.lower():
            raise UserError(
                f"accelerate is configured for FSDP with {variable} {environment[variable]}; only {value} is offered: "
                "use --config_file configs/accelerate/fsdp2.yaml"
            )
    return True


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("1", "true", "yes", "on")


@contextmanager
def _hidden(variable: str) -> Iterator[None]:
    """Without this variable: accelerate's own shards are not ours, and it makes none on a processor, silently."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


@contextmanager
def _explained_meeting(asked: int) -> Iterator[None]:
    """What keeps several processes from meeting, such as an address that nobody gave or that another run has."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if asked == 1:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the environment speaks of {asked} processes (WORLD_SIZE), which cannot begin together: {reason}; start "
            f"them with {TORCHRUN}, or unset it"
        ) from error


def join(environment: Mapping[str, str], *, mixed_precision: str) -> Accelerator:
    """The accelerator of this process, once it has met all others; mixed_precision as accelerate takes it.

    Raises UserError unless it is one of as many processes as the launcher started.
    """
    asked = asked_for(environment)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    AcceleratorState._reset_state()  # a program may train twice, in another precision
    with _hidden(_USE_SHARDS), _explained_meeting(asked):
        accelerator = Accelerator(
            # without a GPU accelerate takes each process for a run of its own, unless told to stay on the processor
            cpu=asked > 1 and (device is None or device.type == "mps"),
            # the others wait while one process encodes a large folder; ten minutes, the default, would not do
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
            mixed_precision=mixed_precision,
        )
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in plain:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; only plain data-parallel training is "
            "offered: choose no such thing in `accelerate config`"
        )
    if accelerator.num_processes != asked:
        raise UserError(
            f"the environment speaks of {asked} processes (WORLD_SIZE), and {accelerator.num_processes} met: start "
            f"them with {TORCHRUN}, or unset it"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("set train.accumulation here and leave gradient accumulation out of accelerate's configuration")
    return accelerator


# By when the system asks whether a silent machine is still there, how often again, and how many times: 40 seconds.
_ANSWERS = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}


def agree(accelerator: Accelerator, facts: Mapping[str, object]) -> None:
    """Raise `AllFailed` in every process unless all bring the same facts, by name; it says which differ."""
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([dict(facts)])
    lines = []
    for name in facts.keys() | {name for theirs in others for name in theirs}:
        for rank, theirs in enumerate(others, start=1):
            if theirs.get(name) != first.get(name):
                lines.append(f"{name} is {first.get(name)} in process 0 and {theirs.get(name)} in process {rank}")
                break
    if lines:
        found = "".join(f"\n  - {line}" for line in sorted(lines))
        raise AllFailed(f"the processes of this run were not started alike; give all the same command:{found}")


class Together:
    """Within the block, no process goes on waiting for one that has ended: it ends too, and says why in one line.

    Each process keeps a connection to the first one. The system closes it when a process ends, however that happens,
    and keeps it open for one that is slow or stopped for a while, so nothing has to be waited for. A process that
    comes to the end of the block, or stops as all do, says so first.
    """

    _KEY, _BYE = 32, b"."

    def __init__(self, accelerator: Accelerator) -> None:
        self._is_first, self._count = accelerator.is_main_process, accelerator.num_processes
        self._lines: list[socket.socket] = []
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._count > 1:
            self._connect()
            self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._count == 1:
            return
        if error is None or isinstance(error, AllStopped | AllFailed):
            for line in self._lines:
                with suppress(OSError):
                    line.send(self._BYE)
            if error is not None and not self._is_first:  # what there is to say, the first process says
                self._watching.join(10)  # until it has: a launcher kills the others as soon as one is gone
                raise SystemExit(130 if isinstance(error, AllStopped) else 2)
        elif isinstance(error, RuntimeError):  # perhaps the echo of another's end, which is then told of
            time.sleep(5)

    def _connect(self) -> None:
        """The first process listens, and tells all others where and what to say to be let in."""
        server = _server() if self._is_first else None
        meeting = [0, b""] if server is None else [server.getsockname()[1], secrets.token_bytes(self._KEY)]
        port, key = broadcast_object_list(meeting)
        if server is None:
            self._lines = [_reach(port)]
            self._lines[0].sendall(key)
        else:
            with server:
                while len(self._lines) < self._count - 1:
                    line = _accepted(server)
                    if line.recv(self._KEY, socket.MSG_WAITALL) == key:
                        self._lines.append(line)
        for line in self._lines:
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _ANSWERS.items():
                if hasattr(socket, option):  # by the system
                    line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def _watch(self) -> None:
        """Until every connection is closed: one that was not said to be ends this process."""
        open_lines, leaving = selectors.DefaultSelector(), set()
        for line in self._lines:
            open_lines.register(line, selectors.EVENT_READ, line)
        while open_lines.get_map():
            for key, _ in open_lines.select():
                line, word = key.data, b""
                with suppress(OSError):
                    word = line.recv(1)
                if word:
                    leaving.add(line)
                elif line in leaving:
                    open_lines.unregister(line)
                else:
                    self._end()

    def _end(self) -> NoReturn:
        """End this process from a thread, while the main one may wait for ever; the others first, who wait for it."""
        line_of_its_own = "\n" if sys.stderr.isatty() else ""  # a bar may stand there
        os.write(2, f"{line_of_its_own}error: {ENDED}\n".encode())
        for line in self._lines:
            line.close()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(EXIT_ENDED)


def _server() -> socket.socket:
    """Listens at a free port, by either version of IP where the machine has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket) -> socket.socket:
    server.settimeout(60)
    try:
        return server.accept()[0]
    except TimeoutError:
        raise UserError(ENDED) from None


def _reach(port: int) -> socket.socket:
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")  # of the first process's machine, by every launcher
    try:
        return socket.create_connection((address, port), timeout=60)
    except OSError as error:
        raise UserError(
            f"the first process of this run cannot be reached at {address}, port {port} ({error}); let the machines of "
            "a run connect to each other at every port"
        ) from error
