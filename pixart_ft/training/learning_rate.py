"""The learning rate of each optimizer step. No torch."""

import math
from dataclasses import dataclass

from pixart_ft.config.train import Decay


@dataclass(frozen=True)
class LearningRate:
    """Up to `peak` in a straight line over the warm-up, then down to 0 at the end of the run unless constant."""

    peak: float
    warmup_steps: int
    decay: Decay
    steps: int  # of the run

    def at(self, step: int, peak: float | None = None) -> float:
        """That of optimizer step number `step`, counted from 0; of weights with a peak of their own."""
        peak = self.peak if peak is None else peak
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.decay:
            case "constant":
                return peak
            case "linear":
                return peak * (1 - done)
            case "cosine":
                return peak * (0.5 * (1 + math.cos(math.pi * done)))


def fitting_warmup(asked: int, steps: int) -> int:
    """The steps of a warm-up in a run of `steps`; one that would not end within them is cut to a tenth of them."""
    return asked if asked <= steps else steps // 10
