"""A network in shards: every process keeps a part of each weight, its gradient, its moments and its average (FSDP2).

A block is gathered when it is its turn, and let go after it. What is saved is whole, in the same files as without
shards, so that any number of processes reads it.
"""

import copy
from collections.abc import Mapping, Sequence
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

from pixart_ft.training.ema import Ema


def in_shards(transformer: PixArtTransformer2DModel, accelerator: Accelerator) -> PixArtTransformer2DModel:
    """A copy of the network over all processes: each block a unit, and what is left of the network another.

    Weights stay in the precision they have; what is computed is what one process computes, to rounding.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded = copy.deepcopy(transformer)
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
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32))
    if gradients and isinstance(gradients[0], DTensor):
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=gradients[0].device_mesh.get_group())
        norms = squares.sqrt()
    return norms


@dataclass(frozen=True)
class Whole:
    """The network in one piece and its average, beside the shards, for what the first process does alone.

    transformer, ema   in one piece: measured, drawn with and saved
    shards, average    what is trained
    """

    transformer: PixArtTransformer2DModel
    ema: Ema
    shards: PixArtTransformer2DModel
    average: Ema

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the piece up to date. All processes call it."""
        places = dict(self.transformer.named_parameters())
        for name, parameter in self.shards.named_parameters():
            if parameter.requires_grad:
                places[name].copy_(gathered(parameter))
        self.ema.load_state_dict(gathered(self.average.state_dict()))
