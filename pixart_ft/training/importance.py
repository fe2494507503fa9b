"""The law of t under importance sampling, step by step."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pixart_ft.diffusion.weighting import LossHistory

# Steps between the newest losses that a law knows and the step that draws by it: its batch is made while the step
# before runs, and what the one before that met is still on its way from the device then.
DELAY = 3


class Importance:
    """The law by which each step draws t: of the losses of all steps up to `DELAY` before it.

    The delay is counted in steps, whatever was known when, so that a resumed run and every process draw by the same.
    """

    def __init__(self, num_steps: int, within: range) -> None:
        self.within = within
        self.step = 0  # whose law the history gives
        self.history = LossHistory.empty(num_steps)
        self._later: dict[int, tuple[Tensor, Tensor]] = {}  # t and losses of the steps that only later laws know

    def add(self, step: int, t: Tensor, losses: Tensor) -> None:
        """Take in what a step met: losses (N,) at t (N,), on the CPU, in the order of the draws."""
        self._later[step] = (t, losses)

    def law(self, step: int) -> Tensor:
        """The law (len(within),) of a step, when all it is of was added; steps are asked for in their order."""
        self._go_on(step)
        return self.history.probabilities(within=self.within)

    def _go_on(self, step: int) -> None:
        while self.step < step:
            self.step += 1
            if (known := self._later.pop(self.step - DELAY, None)) is not None:
                self.history = self.history.updated(*known)

    def state_dict(self, step: int) -> dict[str, Any]:
        """What `load_state_dict` continues from at this step."""
        self._go_on(step)
        return {**vars(self.history), "later": self._later}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue at the step of which this was saved."""
        self.history = LossHistory(state["losses"], state["counts"])
        self.step, self._later = step, dict(state.get("later", {}))
