"""The repeated blocks of the transformer: which of them are computed again for their gradients, and compiling them."""

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(transformer: PixArtTransformer2DModel, every: int) -> None:
    """Keep of every `every`-th block its input alone, and compute the block again where its gradient is needed.

    The gradients are the same to the bit; 1 is all blocks.
    """
    again = set(list(transformer.transformer_blocks)[::every])

    def call(block: nn.Module, *args: Any) -> Tensor:
        found: Tensor = checkpoint(block.__call__, *args, use_reentrant=False) if block in again else block(*args)
        return found

    transformer.enable_gradient_checkpointing(call)


def compile_blocks(transformer: PixArtTransformer2DModel, backend: str = "inductor") -> None:
    """Compile the blocks, which have one code, so that one of them is compiled for all, at its first call.

    Names and weights stay; another adapter, precision or mode is compiled at its own first call.
    """
    for block in transformer.transformer_blocks:
        block.compile(backend=backend)


def compile_fault(device: torch.device) -> str | None:
    """What keeps torch from compiling for a device, by a tiny function; None: nothing."""
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or Triton raises almost anything
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
