"""The processes of one run. Oracle: what torchrun and accelerate launch leave in the environment, and one process for
two."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart_ft.cli import main
from pixart_ft.errors import UserError
from pixart_ft.training.processes import ENDED, EXIT_ENDED, Together, asked_for, join
from tests.helpers.launched import launch
from tests.helpers.runs import Options, command, losses, short_run, train

# Variables as these launchers were seen to set them.
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ACCELERATE_ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
ACCELERATE_TWO_ON_A_CPU = ACCELERATE_ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run of this test's own, without dropout, which each process draws for its own part of a batch."""
    shared = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    return shared | {"adapter.dropout": 0.0}


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


def test_a_launched_run_is_one_run(options: Options, tmp_path: Path) -> None:
    """Two processes on a processor, as torchrun starts them: one folder, one log, the losses and weights of one."""
    one = train(options)
    two = tmp_path / "two"
    launched = launch(lambda rank: train(options, run__folder=two, train__batch_size=2) and 0, tmp_path)
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    assert len(losses(one)) == len(losses(two))
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = (load_file(run / "final" / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6), key


def test_processes_that_were_started_otherwise_are_refused_together(
    options: Options, pictures: Path, tmp_path: Path
) -> None:
    """Other settings, pictures and checkpoint in the second process: one message names them all, nobody waits."""
    run = train(options, train__keep_checkpoints=9)
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
    accelerator = join(os.environ, mixed_precision="no", log_with=None, project_dir=".")
    with Together(accelerator):
        (ready / str(rank)).touch()
        if rank == ends:
            how()
        accelerator.wait_for_everyone()


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


def test_a_process_that_is_stopped_for_a_while_goes_on(tmp_path: Path) -> None:
    launched = launch(lambda rank: waits(rank, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP), tmp_path), tmp_path)
    launched.processes[0].join(1)
    assert launched.processes[0].is_alive()  # it waits
    os.kill(launched.processes[1].pid, signal.SIGCONT)
    assert launched.end(within=30) == [0, 0], launched.said(0) + launched.said(1)
