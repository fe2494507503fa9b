"""Which layers of a transformer an adapter is for, and what of it they can use."""

import difflib
from collections.abc import Sequence

from torch import nn

from pixart_ft.config.train import LAST_LAYER, TARGETS
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import is_of_adapter


def named(targets: Sequence[str], *, last_layer: bool) -> tuple[str, ...]:
    """`adapter.targets` with the sets that have a name written out, each layer once.

    last_layer: whether the layer that makes the mean and the variance alike may be among them.
    """
    layers: dict[str, None] = {}
    for target in targets:
        kept = [name for name in TARGETS.get(target, ()) if last_layer or name != LAST_LAYER]
        layers |= dict.fromkeys(kept if target in TARGETS else [target])
    return tuple(layers)


def check_targets(transformer: nn.Module, targets: Sequence[str] | str) -> None:
    """Raise UserError naming each of `adapter.targets` that matches no layer of `transformer`, with the nearest."""
    layers = _layers(transformer)
    targets = [] if isinstance(targets, str) else targets  # a pattern of peft's own, which it judges
    faults = []
    for target in targets:
        if not any(_is_meant(name, target) for name in layers):
            endings = {_ending(name) for name in layers}
            near = difflib.get_close_matches(target, sorted(endings), n=3, cutoff=0.5) or sorted(endings)
            faults.append(f"{target!r} matches no layer; near: {', '.join(near)}")
    if faults:
        raise UserError("adapter.targets: " + "; ".join(faults))


def check_rank(transformer: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Raise UserError unless `adapter.rank` is at most the smaller side of every adapted layer: more adds only cost."""
    sides = {
        min(module.weight.shape[0], module.weight[0].numel()): name
        for name, module in _layers(transformer).items()
        if any(_is_meant(name, target) for target in targets)
    }
    smallest = min(sides)
    if rank > smallest:
        raise UserError(f"adapter.rank {rank} is more than the {smallest} that {sides[smallest]} can use; lower it")


def _layers(transformer: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Those of the base, under the names that they have without any adapter."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not is_of_adapter(name)
    }


def _is_meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ending(name: str) -> str:
    """The shortest ending of a layer's name that says something: to_q, to_out.0, net.0.proj."""
    parts = name.split(".")
    count = 1
    while count < len(parts) and (parts[-count].isdigit() or parts[-count] in ("proj", "linear")):
        count += 1
    return ".".join(parts[-count:])
