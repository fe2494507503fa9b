"""How the network is called in training: checkpointed blocks, the kernels of attention, compiled blocks."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import PixArtTransformer2DModel

from pixart_ft.config.train import TrainConfig
from pixart_ft.model.attention import Kernels, use_kernels
from pixart_ft.model.engine import Calls, fastest_kernels, where
from pixart_ft.model.repeated import checkpoint_blocks, compile_blocks
from pixart_ft.training.encode import Encoded, compute_dtype

_KERNELS, _WHERE = "attention", "attention_timed_on"


def set_up(
    config: TrainConfig,
    transformer: PixArtTransformer2DModel,
    encoded: Encoded,
    accelerator: Accelerator,
    environment: Path,
) -> dict[str, object]:
    """Choose the kernels of attention for `transformer`, whose adapter is attached, as section model says.

    environment   the record of the run that is continued, where there is one: kernels that were timed are taken again,
                  since another would round otherwise, unless they were timed on another device

    Returns what belongs into the record.
    """
    record: dict[str, object] = {}
    kernels = Kernels(config.model.attention, config.model.attention)
    if config.model.attention == "auto":
        kernels = _timed(config, transformer, encoded, accelerator, _recorded(environment, accelerator.device))
        record = {_KERNELS: vars(kernels), _WHERE: where(accelerator.device)}
    use_kernels(transformer, kernels)
    return record


def set_up_blocks(config: TrainConfig, network: PixArtTransformer2DModel, accelerator: Accelerator) -> None:
    """Make the blocks of the network that is trained ready as section model says: checkpointed, compiled."""
    if every := int(config.model.gradient_checkpointing):
        checkpoint_blocks(network, every)
    if config.model.compile:
        accelerator.print(
            "compiling          one block for all of them, at its first call: the first steps take minutes"
        )
        compile_blocks(network)


def _timed(
    config: TrainConfig,
    transformer: PixArtTransformer2DModel,
    encoded: Encoded,
    accelerator: Accelerator,
    recorded: Kernels | None,
) -> Kernels:
    """What the main process finds the fastest, for all processes."""
    found = [recorded]
    if recorded is None and accelerator.is_main_process:
        mean, _ = encoded.train.latents([0])
        texts = encoded.train.texts(range(min(64, len(encoded.train))))
        calls = Calls(
            rows=config.train.batch_size,
            image=mean[0, 0].numel() // transformer.config.patch_size**2,
            text=max(len(text) for text in texts),
            dtype=compute_dtype(config),
            device=accelerator.device,
            backward=True,
        )
        found[0], line = fastest_kernels(transformer, calls)
        print(f"attention          {line}")
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _recorded(environment: Path, device: torch.device) -> Kernels | None:
    try:
        record: dict[str, Any] = json.loads(environment.read_text())
        return Kernels(**record[_KERNELS]) if record[_WHERE] == where(device) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
