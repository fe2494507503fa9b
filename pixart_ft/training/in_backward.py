"""Optimizer steps inside the backward pass: the gradients of all weights are never in memory together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        self._places = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms[parameter] = norm
        with self._alone(parameter):
            guarded_step(self._optimizer, norm.isfinite())
        parameter.grad = None

    @contextmanager
    def _alone(self, parameter: Tensor) -> Iterator[None]:
        """Within, the optimizer knows no other weight: else each of P steps would look at P weights."""
        groups = self._optimizer.param_groups  # asked for each time: a loaded state brings new ones
        members = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [parameter] if number == self._places[parameter] else []
        try:
            yield
        finally:
            for group, all_of_it in zip(groups, members, strict=True):
                group["params"] = all_of_it

    def norms(self) -> tuple[Tensor, Tensor]:
        """As of `clip_gradients`, of the gradients since this was asked last."""
        found, self._norms = self._norms, {}
        zero = torch.zeros((), device=self._parameters[0].device)
        norms = torch.stack([found.get(parameter, zero) for parameter in self._parameters])
        return norms, torch.linalg.vector_norm(norms)
