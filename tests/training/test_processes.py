"""The processes of one run. Oracle: what torchrun and accelerate launch leave in the environment, and one process for
two."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart_ft.errors import UserError
from pixart_ft.training.processes import asked_for
from tests.helpers.launched import launch
from tests.helpers.runs import Options, losses, short_run, train

# Variables as these launchers were seen to set them.
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ACCELERATE_ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
ACCELERATE_TWO_ON_A_CPU = ACCELERATE_ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run of this test's own, without dropout, which each process draws for its own part of a batch."""
    shared = short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    return shared | {"lora.dropout": 0.0}


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
