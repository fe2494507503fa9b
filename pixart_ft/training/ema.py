"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter

from pixart_ft.errors import UserError


class Ema:
    """Float32 shadows of some parameters: shadow <- d shadow + (1 - d) parameter, once per optimizer step.

    d = min(decay, (1 + n) / (10 + n)) after n earlier updates, so that the average forgets its start quickly.
    The shadows stay on the device they were made on.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        assert 0 <= decay < 1, decay
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(parameters)
        self.shadows = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @classmethod
    def off(cls) -> Self:
        """An average over nothing: it may be updated, saved, restored and applied, and does nothing."""
        return cls({}, decay=0.0)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to average; if not, the parameters themselves are the weights to use."""
        return bool(self.shadows)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        if not self.is_on:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        shadows = list(self.shadows.values())
        fresh = [self._parameters[name].detach().to(shadow) for name, shadow in self.shadows.items()]
        torch._foreach_lerp_(shadows, fresh, 1 - decay)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly; the shadows are the live ones, not copies."""
        return {"num_updates": self.num_updates, "shadows": self.shadows}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raises UserError unless it averages exactly the same parameters."""
        saved: Mapping[str, Tensor] = state["shadows"]
        strangers = sorted(saved.keys() ^ self.shadows.keys())
        strangers += [n for n in saved.keys() & self.shadows.keys() if saved[n].shape != self.shadows[n].shape]
        if strangers:
            raise UserError(
                f"the saved average is of other weights ({len(strangers)} differ, such as {strangers[0]}); "
                "resume with the train.ema_decay (0 or not) and lora settings that the run began with"
            )
        self.num_updates = int(state["num_updates"])
        for name, shadow in self.shadows.items():
            shadow.copy_(saved[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters hold the average; afterwards their own values again, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._assign(self.shadows)
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
