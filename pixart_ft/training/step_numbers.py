"""What an optimizer step met, brought from the device without waiting for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch met in all processes, in the order of its draws: t (N,) int64; weight and each term (N,)."""

    t: Tensor
    weight: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class StepNumbers:
    """What an optimizer step met, on the host.

    asked    whether a process was asked to stop
    taken    whether the step was taken: loss and gradient were finite
    norm     of the whole gradient, before clipping
    norms    of each trained parameter's gradient, (P,)
    """

    step: int
    micro_batches: list[MicroBatch]
    asked: bool
    taken: bool
    norm: float
    norms: Tensor


class Underway:
    """The numbers of a step on their way: copied when the device comes to it; the host waits in `read` alone."""

    def __init__(self, step: int, names: Sequence[str], rows: Tensor, norms: Tensor, norm: Tensor) -> None:
        """`rows` (micro-batch, N, [asked, t, weight, *terms]) of all processes, in the order of the draws.

        `taken` (), a bool on the device, is true where every loss and the norm are finite.
        """
        self.step, self._names, self._shape = step, tuple(names), rows.shape
        losses = rows[..., 3 + self._names.index("loss")]
        self.taken = losses.isfinite().all() & norm.isfinite()
        packed = torch.cat([rows.flatten(), norms, torch.stack([norm, self.taken.to(norm.dtype)])])
        self._packed, self._arrival = packed, None
        if packed.device.type == "cuda":  # others are copied when they are read
            self._packed = packed.to("cpu", non_blocking=True)  # into pinned memory
            self._arrival = torch.Event(packed.device)
            self._arrival.record()

    def read(self) -> StepNumbers:
        """Wait until the device has done the step, then the numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        rows, norms, (norm, taken) = self._packed.cpu().split(
            [self._shape.numel(), len(self._packed) - self._shape.numel() - 2, 2]
        )
        micro_batches, asked = [], False
        for each in rows.view(self._shape):
            flags, t, weight, *terms = each.unbind(1)
            asked = asked or bool(flags.any())
            micro_batches.append(MicroBatch(t.long(), weight, dict(zip(self._names, terms, strict=True))))
        return StepNumbers(self.step, micro_batches, asked, bool(taken), float(norm), norms)
