"""A network in shards: every process keeps a part of each weight, its gradient, its moments and its average (FSDP2).

A block is gathered when it is its turn, and let go after it. What is saved is whole, in the same files as without
shards, so that any number of processes reads it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pixart_ft.model.weights import local
from pixart_ft.training.ema import Ema


def in_shards(transformer: PixArtTransformer2DModel, accelerator: Accelerator) -> PixArtTransformer2DModel:
    """The network over all processes: each block a unit, and what is left of the network another.

    It comes from the computer's memory and goes to the devices a unit at a time, so that none ever holds all of it. In
    the first process it is a copy, see `Whole`. Weights stay in the precision they have; what is computed is what one
    process computes, to rounding.

    With accumulation each micro-batch's gradient is divided as it comes: that is k times the traffic, and no device
    holds a whole gradient.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded = copy.deepcopy(transformer) if accelerator.is_main_process else transformer
    for module in sharded.modules():
        if isinstance(module, BasicTransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


def prepared(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """As accelerate prepares them for training; a network in shards needs no more, and would be copied in vain."""
    if isinstance(network, FSDPModule):
        return network, accelerator.prepare(optimizer)
    model, stepped = accelerator.prepare(network, optimizer)
    return model, stepped


def gathered(tree: Any, *, kept: bool = True) -> Any:
    """The same tree of dicts, lists and tensors with the shards put together, on the CPU. All processes call it.

    Those that do not keep them have empty tensors in their place: the machine's memory holds one whole state, not one
    for each of its processes.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor().detach()
        return whole.cpu() if kept else whole.new_empty(0)
    if isinstance(tree, dict):
        return {key: gathered(value, kept=kept) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, kept=kept) for value in tree)
    return tree


def like(template: Tensor, value: Tensor) -> Tensor:
    """A whole `value` as `template` is: cut into the same shards, if it has any. All processes call it."""
    if not isinstance(template, DTensor) or value.shape != template.shape:
        return value
    return distribute_tensor(value.to(template.device, template.dtype), template.device_mesh, template.placements)


def moments_like(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer cut as its parameters are; what has not their shape is as it was."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        number: {key: like(parameters[number], x) if isinstance(x, Tensor) else x for key, x in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": cut}


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient (P,), whole where it is in shards: then all processes call it."""
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients], 2, dtype=torch.float32))
    if gradients and isinstance(gradients[0], DTensor):
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=gradients[0].device_mesh.get_group())
        norms = squares.sqrt()
    return norms


@dataclass(frozen=True)
class Whole:
    """The network in one piece and its average, in the computer's memory of the first process.

    That one measures, draws and saves alone, and has it on its device meanwhile. The others have nothing here: their
    `transformer` is what they train, and their `ema` is off.

    transformer, ema   in one piece
    shards, average    what is trained
    """

    accelerator: Accelerator
    transformer: PixArtTransformer2DModel
    ema: Ema
    shards: PixArtTransformer2DModel
    average: Ema

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within, the piece is up to date and on the device. All processes call it."""
        self._refresh()
        if not self.accelerator.is_main_process:
            yield
            return
        self.transformer.to(self.accelerator.device)
        try:
            yield
        finally:
            self.transformer.to("cpu")

    @torch.no_grad()
    def _refresh(self) -> None:
        kept = self.accelerator.is_main_process
        places = dict(self.transformer.named_parameters()) if kept else {}
        for name, parameter in self.shards.named_parameters():
            if parameter.requires_grad:
                value = gathered(parameter, kept=kept)
                if kept:
                    places[name].copy_(value)
        state = gathered(self.average.state_dict(), kept=kept)
        if kept:
            self.ema.load_state_dict(state)
