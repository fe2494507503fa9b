"""The processes of one run: how many the launcher promised, and that these are the ones that train together."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from pixart_ft.errors import UserError

TORCHRUN = "torchrun --nproc_per_node N scripts/train.py ..."
# Where launchers write the number of processes: torchrun and accelerate, then the MPIs.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_ELSEWHERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "FSDP",
}


def asked_for(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started, by the variables it left; UserError for what it cannot give us."""
    for variable, name in _ELSEWHERE.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"accelerate is configured for {name}; only plain data-parallel training is offered: choose no "
                f"{name} in `accelerate config`, or unset {variable}"
            )
    sizes = [int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()]
    # accelerate names a meeting point for several processes, and on a processor or with one GPU it starts a single one
    if not sizes and "MASTER_PORT" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does without a second GPU; use "
            f"{TORCHRUN}, or --num_processes 1"
        )
    return max(sizes, default=1)


def join(environment: Mapping[str, str], *, mixed_precision: str, log_with: Any, project_dir: str) -> Accelerator:
    """The accelerator of this process, once it has met all others; the options as accelerate takes them.

    Raises UserError unless it is one of as many processes as the launcher started.
    """
    asked = asked_for(environment)
    device = torch.accelerator.current_accelerator()
    AcceleratorState._reset_state()  # a program may train twice, in another precision
    accelerator = Accelerator(
        # without a GPU accelerate takes each process for a run of its own, unless it is told to stay on the processor
        cpu=asked > 1 and (device is None or device.type == "mps"),
        # the others wait while one process encodes a large folder; ten minutes, the default, would not do
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_dir=project_dir,
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
