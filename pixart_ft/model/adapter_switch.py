"""The switch of adapters that act in intervals of timesteps: the bare base elsewhere, whoever calls it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pixart_ft.diffusion.intervals import WHOLE, Interval, holds, shown

# peft's names: of what is trained, or loaded first; of what a LoRA that starts from the weights began as; and of those
# that are loaded beside the first. See `adapters.attach`.
FIRST, BEGINNING = "default", "beginning"
_OF_ADAPTER = re.compile(rf"\.({FIRST}|{BEGINNING}|beside\d+)(\.|$)")


def beside(number: int) -> str:
    """peft's name of an adapter beside the first."""
    return f"beside{number}"


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, and not the base's own."""
    return _OF_ADAPTER.search(name) is not None


class AdapterSwitch:
    """Lets each adapter of a transformer act in calls at the timesteps of its interval alone.

    It stands before the network itself, so that every sampler, pipeline and likelihood meets the same one.

    intervals   by peft's name of the adapter
    acting      those that act in the present call
    """

    def __init__(self, transformer: nn.Module, intervals: Mapping[str, Interval]) -> None:
        self.intervals = dict(intervals)
        self.acting = tuple(self.intervals)
        self._layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        self._hooks = (
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        """Leave the transformer's calls alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._turn(tuple(self.intervals))  # where Ctrl-C ended the call before, no hook came after it
        # in training every t is drawn from the interval, and a look at it would make the host wait for the device
        if transformer.training or all(interval == WHOLE for interval in self.intervals.values()):
            return
        timesteps: Tensor = kwargs["timestep"] if "timestep" in kwargs else args[2]
        told = timesteps.flatten().tolist()
        inside = {name: {holds(interval, one) for one in told} for name, interval in self.intervals.items()}
        if split := [shown(self.intervals[name]) for name, sides in inside.items() if len(sides) > 1]:
            raise ValueError(
                f"one call of the network has timesteps inside and outside of {', '.join(split)}, where its adapter "
                "acts; call it for each side"
            )
        self._turn(tuple(name for name, sides in inside.items() if sides != {False}))

    def _after(self, *_: object) -> None:
        self._turn(tuple(self.intervals))

    def _turn(self, acting: tuple[str, ...]) -> None:
        if acting == self.acting:
            return
        self.acting = acting
        for layer in self._layers:
            layer._disable_adapters = not acting  # peft's `enable_adapters` would ask for gradients as well
            if len(self.intervals) > 1:
                layer._active_adapter = list(acting)


def acting_adapters(transformer: nn.Module) -> tuple[str, ...]:
    """The adapters of a network that act in the present call, by peft's names."""
    switch = getattr(transformer, "adapter_switch", None)
    return () if switch is None else switch.acting


def adapter_intervals(transformer: nn.Module) -> tuple[Interval, ...]:
    """The timesteps at which each of a network's adapters acts."""
    switch = getattr(transformer, "adapter_switch", None)
    return () if switch is None else tuple(switch.intervals.values())
