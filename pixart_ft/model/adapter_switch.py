"""The switch of an adapter that acts in an interval of timesteps: the bare base elsewhere, whoever calls it."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pixart_ft.diffusion.intervals import WHOLE, Interval, holds, shown

# peft's names of what is trained, and of what a LoRA that starts from the weights began as, see `adapters.lora`.
ADAPTER_NAMES = ("default", "beginning")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, and not the base's own."""
    return any(f".{adapter}." in f"{name}." for adapter in ADAPTER_NAMES)


class AdapterSwitch:
    """Turns the adapter's layers of a transformer off for each call at a timestep outside `interval`, and on after it.

    It stands before the network itself, so that every sampler, pipeline and likelihood meets the same one.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.interval: Interval = WHOLE
        self.off = False  # for the present call
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
        self._turn(off=False)  # where Ctrl-C ended the call before, no hook came after it
        # in training every t is drawn from the interval, and a look at it would make the host wait for the device
        if self.interval == WHOLE or transformer.training:
            return
        timestep: Tensor = kwargs["timestep"] if "timestep" in kwargs else args[2]
        inside = {holds(self.interval, one) for one in timestep.flatten().tolist()}
        if len(inside) > 1:
            raise ValueError(
                f"one call of the network has timesteps inside and outside of {shown(self.interval)}, where its "
                "adapter acts; call it for each side"
            )
        self._turn(off=inside == {False})

    def _after(self, *_: object) -> None:
        self._turn(off=False)

    def _turn(self, *, off: bool) -> None:
        if off == self.off:
            return
        self.off = off
        for layer in self._layers:
            layer._disable_adapters = off  # peft's `enable_adapters` would ask for gradients as well


def adapter_is_off(transformer: nn.Module) -> bool:
    """Whether the present call of a network does without its adapter."""
    switch = getattr(transformer, "adapter_switch", None)
    return switch is not None and switch.off


def adapter_interval(transformer: nn.Module) -> Interval:
    """The timesteps at which a network's adapter acts; all of them where it has none."""
    switch = getattr(transformer, "adapter_switch", None)
    return WHOLE if switch is None else switch.interval
