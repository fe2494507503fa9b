"""The processes of one run. Oracle: what torchrun and accelerate launch leave in the environment, and one process for
two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pixart_ft.cli import main
from pixart_ft.errors import UserError
from pixart_ft.training.nested import load_nested, tensors_of
from pixart_ft.training.processes import (
    ENDED,
    EXIT_ENDED,
    Together,
    _explained_meeting,
    asked_for,
    join,
    shards_asked_for,
)
from pixart_ft.training.sharding import gathered
from pixart_ft.training.stopping import AllStopped
from pixart_ft.training.trainer import Trainer
from tests.helpers.launched import launch
from tests.helpers.runs import STEPS, Options, command, short_run, train
from tests.helpers.toy_run import toy_trainer

ROOT = Path(__file__).parents[2]
# Variables as these launchers were seen to set them.
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ACCELERATE_ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
OWN: Options = {"adapter.dropout": 0.0, "train.keep_checkpoints": 9, "optim.clip_norm": 0.01}  # clips every gradient
ACCELERATE_TWO_ON_A_CPU = ACCELERATE_ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run of this test's own, without dropout, which each process draws for its own part of a batch."""
    shared = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    return shared | OWN


@pytest.fixture(scope="module")
def straight(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `options` by one process; read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return train(short_run(tiny, pictures, folder, tmp_path_factory.getbasetemp() / "cache") | OWN)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        (TORCHRUN | ACCELERATE_ONE, 2),  # accelerate launch --multi_gpu
        (ACCELERATE_ONE, 1),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, 3),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"MASTER_PORT": "29500"}, 1),  # left by something else
        (TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "false"}, 2),
    ],
)
def test_number_of_processes_that_a_launcher_promised(environment: dict[str, str], count: int) -> None:
    assert asked_for(environment) == count


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ACCELERATE_TWO_ON_A_CPU, "asked for several processes and started one.*torchrun --nproc_per_node N"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed.*unset ACCELERATE_USE_DEEPSPEED"),
        (TORCHRUN | {"ACCELERATE_USE_MEGATRON_LM": "True"}, "configured for Megatron-LM"),
    ],
)
def test_launch_that_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        asked_for(environment)


def test_processes_that_cannot_meet_are_told_why() -> None:
    no_address = ValueError("`MASTER_ADDR` env was not set\nand more")
    told = r"of 2 processes \(WORLD_SIZE\), which cannot begin together: `MASTER_ADDR` env was not"
    with pytest.raises(UserError, match=told), _explained_meeting(2):
        raise no_address
    with pytest.raises(ValueError, match="and more"), _explained_meeting(1):
        raise no_address


def test_shards_that_are_asked_for() -> None:
    """The shipped configuration of accelerate is the one there is; DeepSpeed's offloading and others are refused."""
    file = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    renamed = {"TRANSFORMER_LAYER_CLS_TO_WRAP": "TRANSFORMER_CLS_TO_WRAP", "VERSION": "VERSION"}
    words = {key.removeprefix("fsdp_").upper(): str(value) for key, value in file["fsdp_config"].items()}
    shipped = {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{renamed.get(key, key)}": word for key, word in words.items()}
    assert shards_asked_for(shipped) and not shards_asked_for({"ACCELERATE_USE_FSDP": "false"})
    for variable, value in (("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true")):
        with pytest.raises(UserError, match=f"FSDP with {variable} {value}; only .*configs/accelerate/fsdp2.yaml"):
            shards_asked_for(shipped | {variable: value})


def records(run: Path) -> list[dict[str, Any]]:
    """What the run logged of each step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["train"] | {"gradient_norm": line["gradient_norm"]} for line in lines if "train" in line]


def assert_equal_to_rounding(one: Path, other: Path) -> None:
    """Every loss and gradient norm, and the state after the last step."""
    assert len(records(one)) == len(records(other)) == STEPS
    for a, b in zip(records(one), records(other), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name in ("trained", "ema", "optimizer"):
        ours, theirs = (
            load_nested(run / "checkpoints" / f"step-{STEPS:06d}" / f"{name}.safetensors") for run in (one, other)
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6)
    results = [path.relative_to(one / "final") for path in (one / "final").rglob("*.safetensors")]
    assert len(results) >= 4  # averaged and not, each with its null caption
    for path in results:
        ours, theirs = (load_file(run / "final" / path) for run in (one, other))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6)


def assert_keeps_its_share(trainer: Trainer, rank: int) -> None:
    """About half of what is trained; the whole network, its average and a gathered state are the first process's."""
    own = sum(p.to_local().numel() for p in trainer.trained.values() if isinstance(p, DTensor))
    every = sum(p.numel() for p in trainer.trained.values())
    assert abs(own / every - 0.5) < 0.1
    assert trainer.whole is not None
    assert trainer.whole.ema.is_on == (rank == 0)
    assert (trainer.whole.transformer is trainer.transformer) == (rank == 1)
    held = list(tensors_of(gathered(trainer._state()["trained"], kept=rank == 0)))
    assert sum(x.numel() for x in held) == (every if rank == 0 else 0)


FULL: Options = {"adapter.kind": "full", "optim.learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("shards", "kind"),
    [(False, {}), (True, {}), pytest.param(True, FULL, marks=pytest.mark.slow)],
    ids=["copies", "shards", "shards of all weights"],
)
def test_any_number_of_processes_continues_a_run(
    shards: bool, kind: Options, options: Options, straight: Path, tmp_path: Path
) -> None:
    """Two processes go on from a checkpoint of one, and one from theirs: all as one process from end to end.

    With a copy of the network for each process, and with one in shards. What is loaded is what was saved, to the bit.
    """
    if kind:
        options = {key: value for key, value in options.items() if not key.startswith("adapter.")} | kind
        straight = train(options)
    run = Path(shutil.copytree(straight, tmp_path / "two"))
    first, second = (run / "checkpoints" / f"step-{step:06d}" for step in (2, 4))
    saved = {path.stem: load_nested(path) for path in first.glob("*.safetensors")}

    def body(rank: int) -> None:
        whole_run = Trainer.run

        def checked(self: Trainer) -> None:
            assert self.accelerator.num_processes == 2
            assert {isinstance(p, DTensor) for p in self.trained.values()} == {shards}
            units = sum(isinstance(module, FSDPModule) for module in self.transformer.modules())
            assert units == (3 if shards else 0)  # two blocks, and what is left
            torch.testing.assert_close(gathered(self._state()), saved, rtol=0, atol=0)
            if shards:
                assert_keeps_its_share(self, rank)
            whole_run(self)

        Trainer.run = checked  # type: ignore[method-assign]  # in this process alone
        again = {"model__gradient_checkpointing": True} if shards else {}  # the same gradients, in fewer bytes
        train(options, run__folder=run, train__batch_size=2, resume=str(first), **again)

    launched = launch(body, tmp_path, environment={"ACCELERATE_USE_FSDP": str(shards).lower()})
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    assert_equal_to_rounding(straight, run)
    train(options, run__folder=run, resume=str(second))
    assert_equal_to_rounding(straight, run)


def test_processes_that_were_started_otherwise_are_refused_together(
    options: Options, straight: Path, pictures: Path, tmp_path: Path
) -> None:
    """Other settings, pictures and checkpoint in the second process: one message names them all, nobody waits."""
    run = Path(shutil.copytree(straight, options["run.folder"]))
    before = run.joinpath("log.jsonl").read_bytes()
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    (other / "metadata.jsonl").write_text((other / "metadata.jsonl").read_text().replace("red", "green"))

    def body(rank: int) -> int:
        changed = {"run.seed": 5, "optim.learning_rate": 2e-3, "train.steps": 9, "data.folder": other}
        given = options | {"train.batch_size": 2} | (changed if rank else {})
        return main(["train", *command(given), "--resume", str(run / "checkpoints" / f"step-00000{4 + 2 * rank}")])

    launched = launch(body, tmp_path)
    assert launched.end() == [2, 2]
    assert launched.said(1) == ""  # the first process says it for all
    assert re.findall(r"^  - (.*) is ", launched.said(0), flags=re.M) == [
        "--resume",
        "held-out captions",
        "held-out pictures",
        "optim.learning_rate",
        "run.seed",
        "train.steps",
        "training captions",
        "training pictures",
    ]
    assert "optim.learning_rate is 0.01 in process 0 and 0.002 in process 1" in launched.said(0)
    assert run.joinpath("log.jsonl").read_bytes() == before


def waits(rank: int, ends: int, how: Callable[[], object], ready: Path) -> None:
    """Wait for all other processes, in the middle of a run, but for the one that ends."""
    accelerator = join(os.environ, mixed_precision="no")
    with Together(accelerator):
        (ready / str(rank)).touch()
        if rank == ends:
            how()
        accelerator.wait_for_everyone()
        time.sleep(rank / 2)  # the first leaves, and the others may go on


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        (0, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        (2, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        (0, lambda: fail(UserError("its own fault"))),
        (2, lambda: fail(RuntimeError("its own fault"))),
    ],
    ids=["the first is killed", "another is killed", "a mistake", "a failure"],
)
def test_when_one_process_ends_the_others_do(ends: int, how: Callable[[], object], tmp_path: Path) -> None:
    """By one line and a code of their own, and no traceback of the group; the one that fails gives its own reason."""
    launched = launch(lambda rank: waits(rank, ends, how, tmp_path), tmp_path, count=3)
    codes = launched.end(within=30)
    for rank in {0, 1, 2} - {ends}:
        assert (codes[rank], launched.said(rank)) == (EXIT_ENDED, f"error: {ENDED}\n")
    assert codes[ends] not in (0, None, EXIT_ENDED)
    assert launched.said(ends) == "" or "its own fault" in launched.said(ends)


def test_the_echo_of_another_end_waits_to_be_told_of_it(tmp_path: Path) -> None:
    """The group's own error comes before the connection is known to be closed: one line all the same."""

    def how() -> None:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    def body(rank: int) -> None:
        waits(rank, rank, how if rank == 0 else lambda: fail(RuntimeError("Connection closed by peer")), tmp_path)

    launched = launch(body, tmp_path)
    assert launched.end(within=30) == [-signal.SIGKILL, EXIT_ENDED]
    assert launched.said(1) == f"error: {ENDED}\n"


def test_all_stop_by_one_message(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        try:
            with Together(join(os.environ, mixed_precision="no")):
                raise AllStopped("stopped after step 7")
        except KeyboardInterrupt as stop:
            print(stop, file=sys.stderr)
            return 130

    launched = launch(body, tmp_path)
    assert launched.end() == [130, 130]
    assert [launched.said(rank) for rank in (0, 1)] == ["stopped after step 7\n", ""]


@pytest.mark.slow
def test_torchrun_waits_for_a_process_that_stands_still_and_not_for_one_that_is_killed(
    options: Options, tmp_path: Path
) -> None:
    """The real program: a process is stopped for a minute, goes on, and is killed; the launcher ends within another."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    more = {"train__steps": 100_000, "train__batch_size": 2, "optim__warmup_steps": 0, "train__checkpoint_every": 50}
    line = [*launcher, str(ROOT / "scripts" / "train.py"), *command(options, **more)]
    checkpoints = Path(options["run.folder"]) / "checkpoints"

    def newest() -> int:
        return max((int(path.name[5:]) for path in checkpoints.glob("step-??????")), default=0)

    def wait_until(true: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not true():
            assert run.poll() is None and time.monotonic() < until, (tmp_path / "stderr").read_text()
            time.sleep(0.1)

    with (tmp_path / "stderr").open("w") as stderr:
        run = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until(lambda: newest() > 0)
        victim = next(p for p in psutil.Process(run.pid).children() if p.environ()["RANK"] == "1")
        victim.suspend()
        time.sleep(60)
        stood_at = newest()
        victim.resume()
        wait_until(lambda: newest() > stood_at + 50)
        victim.kill()
        assert run.wait(60) != 0
    finally:
        run.kill()
    said = (tmp_path / "stderr").read_text()
    assert said.count(f"error: {ENDED}\n") == 1 and "gloo" not in said and "RuntimeError" not in said


def test_a_process_that_is_stopped_for_a_while_goes_on(tmp_path: Path) -> None:
    launched = launch(lambda rank: waits(rank, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP), tmp_path), tmp_path)
    launched.processes[0].join(1)
    assert launched.processes[0].is_alive()  # it waits
    os.kill(launched.processes[1].pid, signal.SIGCONT)
    assert launched.end(within=30) == [0, 0], launched.said(0) + launched.said(1)


def fills_the_disk(rank: int, folder: Path) -> int:
    """A training whose first checkpoint meets a full disk; ends as the command line does."""
    trainer = toy_trainer(folder / "run", folder / f"data-{rank}", batch_size=2, checkpoint_every=2, log_every=20)
    trainer.describe = lambda checkpoint: Path("/dev/full").write_text("the rest")  # type: ignore[assignment]
    try:
        with Together(trainer.accelerator):
            trainer.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_what_ends_all_processes_is_said_once(tmp_path: Path) -> None:
    """The one that writes the checkpoints meets the full disk, and no other calls that the end of another process."""
    launched = launch(lambda rank: fills_the_disk(rank, tmp_path), tmp_path)
    assert launched.end(within=60) == [2, 2]
    message = r"error: .*step-000002 cannot be written: no space is left .*; then begin again with --resume auto\n"
    assert re.fullmatch(message, launched.said(0)) and launched.said(1) == ""
