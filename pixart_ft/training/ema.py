"""The weights that are used in place of the trained ones: their moving average, or that of an optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy
import torch
from torch import Tensor
from torch.nn import Parameter

from pixart_ft.config.train import EmaProfile
from pixart_ft.errors import UserError
from pixart_ft.model.weights import chunks, is_known, local


class Ema:
    """Float32 shadows of some parameters: shadow <- d shadow + (1 - d) parameter, once per optimizer step.

    profile, after n earlier updates:
      warmup    d = min(decay, (1 + n) / (10 + n)), so that the average forgets its start quickly
      constant  d = decay
      power     d = (n / (n + 1))^(gamma + 1): weights that grow as n^gamma, whose spread is always `width` of the steps
                done (Karras et al. 2024, sec. 3.1); decay does not count

    The shadows stay on the device of the parameters, or on the CPU if asked: then a copy is taken while the device goes
    on, and averaged when the next one is due.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        decay: float,
        profile: EmaProfile = "warmup",
        *,
        width: float = 0.1,
        on_cpu: bool = False,
    ) -> None:
        assert 0 <= decay < 1, decay
        self.decay, self.profile = decay, profile
        self._gamma = _gamma(width) if profile == "power" else 0.0
        self._num_updates = 0
        self._parameters = dict(parameters)
        self._shadows = {
            name: p.detach().to("cpu" if on_cpu else p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }
        self._copies = {
            name: torch.empty_like(shadow, pin_memory=True)
            for name, shadow in self._shadows.items()
            if shadow.device != parameters[name].device
        }
        self._taken = torch.ones((), dtype=torch.bool, pin_memory=bool(self._copies))
        self._copied: torch.Event | None = None  # when the copies are whole, of an update that is to be taken in

    @classmethod
    def off(cls) -> Self:
        """An average over nothing: it may be updated, saved, restored and applied, and does nothing."""
        return cls({}, decay=0.0)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to average; if not, the parameters themselves are the weights to use."""
        return bool(self._shadows)

    @property
    def num_updates(self) -> int:
        """How many there were."""
        self._take_in_copies()
        return self._num_updates

    @property
    def shadows(self) -> dict[str, Tensor]:
        """The average by name, live."""
        self._take_in_copies()
        return self._shadows

    @property
    def weights(self) -> Mapping[str, Tensor] | None:
        """What is used in place of the parameters, by name; None: they are used themselves."""
        return self.shadows or None

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> None:
        """Take in the parameters as they are now, if `taken`, a bool () on their device, is true; waits for no device.

        An update that is not taken leaves the shadows as they are and counts all the same.
        """
        if not self.is_on:
            return
        self._take_in_copies()
        if not self._copies:
            self._take_in([self._parameters[name] for name in self._shadows], taken)
            return
        if taken is not None:
            self._taken.copy_(taken, non_blocking=True)
        for name, copy in self._copies.items():
            copy.copy_(self._parameters[name].detach(), non_blocking=True)
        self._copied = torch.Event(next(iter(self._parameters.values())).device)
        self._copied.record()

    def _take_in_copies(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # a whole step has gone by since, where this is asked by the next update
            self._copied = None
            self._take_in(list(self._copies.values()), self._taken)

    @torch.no_grad()
    def _take_in(self, fresh: Sequence[Tensor], taken: Tensor | None = None) -> None:
        weight, shadows = 1 - self._decay(), [local(shadow) for shadow in self._shadows.values()]
        values = [local(x).to(shadow) for x, shadow in zip(fresh, shadows, strict=True)]
        if taken is not None and not is_known(taken):
            # A weight that the device alone knows: torch's lerp of lists would be a kernel for each shadow.
            fresh_of = dict(zip(shadows, values, strict=True))
            for part in chunks(shadows):
                moves = torch._foreach_sub([fresh_of[shadow] for shadow in part], part)
                torch._foreach_mul_(moves, weight * taken)
                torch._foreach_add_(part, moves)
        elif taken is None or taken:
            torch._foreach_lerp_(shadows, values, weight)
        self._num_updates += 1

    def _decay(self) -> float:
        n = self._num_updates
        match self.profile:
            case "constant":
                return self.decay
            case "warmup":
                return min(self.decay, (1 + n) / (10 + n))
            case "power":
                return (n / (n + 1)) ** (self._gamma + 1)

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
                "resume with the train.ema_decay (0 or not) and adapter that the run began with"
            )
        self._num_updates = int(state["num_updates"])
        for name, shadow in self.shadows.items():
            shadow.copy_(saved[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters hold the weights to use; afterwards their own values again, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._apply()
            yield
        finally:
            self._restore(own)

    def _apply(self) -> None:
        self._assign(self.shadows)

    def _restore(self, own: Mapping[str, Tensor]) -> None:
        self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


class OwnAverage(Ema):
    """The average that an optimizer keeps by itself, which it puts into the parameters in eval mode (schedule-free).

    There are no shadows to update, and no second set of weights to keep: what is trained is only where gradients are
    taken.
    """

    def __init__(self, parameters: Mapping[str, Parameter], optimizer: Any) -> None:
        super().__init__({}, decay=0.0)
        self._parameters, self._optimizer = dict(parameters), optimizer

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What is used in place of the parameters, by name."""
        with self.applied():
            return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _apply(self) -> None:
        self._optimizer.eval()

    def _restore(self, own: Mapping[str, Tensor]) -> None:
        self._optimizer.train()  # goes back by arithmetic, which rounds
        self._assign(own)


def _gamma(width: float) -> float:
    """The exponent whose profile t^gamma has this standard deviation, as a share of its length."""
    inverse = width**-2
    return max(float(root.real) for root in numpy.roots([1, 7, 16 - inverse, 12 - inverse]))
