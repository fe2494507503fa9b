"""Optimizer steps inside the backward pass: the gradients of all weights are never in memory together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from pixart_ft.training.guard import guarded_step


class InBackward:
    """Steps each weight as soon as its gradient is there, and drops the gradient.

    A weight whose gradient is not finite stays as it is; the others of that step move, since they may have by then.
    The optimizer must keep and count what it remembers for each weight apart.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._norms: dict[Tensor, Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms[parameter] = norm
        guarded_step(self._optimizer, norm.isfinite())  # no other weight has a gradient now
        parameter.grad = None

    def norms(self) -> tuple[Tensor, Tensor]:
        """As of `clip_gradients`, of the gradients since this was asked last."""
        found, self._norms = self._norms, {}
        zero = torch.zeros((), device=self._parameters[0].device)
        norms = torch.stack([found.get(parameter, zero) for parameter in self._parameters])
        return norms, torch.linalg.vector_norm(norms)
