"""Gradients that are not finite: a step with one leaves no trace, and the host does not wait to know."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from pixart_ft.model.weights import is_known, local
from pixart_ft.training.optimizers import COUNTED
from pixart_ft.training.sharding import norms_of

_MOST_COPIED = 2**28  # bytes, of a step that may have to be undone: an adapter's


def clip_gradients(parameters: Sequence[Parameter], limit: float) -> tuple[Tensor, Tensor]:
    """Scale the gradients down to a whole norm of at most `limit`, which may be infinite; waits for no device.

    Returns the norm of each parameter's gradient (P,), 0 where it has none, and of all together (), before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = norms_of(gradients)
    norm = torch.linalg.vector_norm(norms)
    if limit < math.inf:  # by torch's formula, but not in lists of shards
        torch._foreach_mul_([local(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    if len(gradients) < len(parameters):
        found = iter(norms)
        norms = torch.stack([norm.new_zeros(()) if p.grad is None else next(found) for p in parameters])
    return norms, norm


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, taken: Tensor) -> None:
    """`optimizer.step()` where `taken`, a bool () on the device of the weights, is true; else nothing changes.

    On another device than the CPU the host does not wait for `taken`. torch's fused optimizers skip by themselves
    when they are told. Around any other the weights with a gradient and their state are copied and put back where they
    should not have changed; only a count that it keeps on the host, such as Adam's of its steps, then goes on. Where
    these copies would be large, which such an optimizer is often chosen to avoid, or what it remembers lies elsewhere
    too, the host waits instead.
    """
    skips_by_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    changing = [] if skips_by_itself else _changing(optimizer, taken.device)
    too_large = sum(x.numel() * x.element_size() for x in changing) > _MOST_COPIED
    if is_known(taken) or too_large or (not skips_by_itself and _remembers_elsewhere(optimizer)):
        if taken:
            optimizer.step()
    elif skips_by_itself:
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as GradScaler tells it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        before = [(x, x.clone()) for x in changing]
        for p in _stepped(optimizer):  # state that the optimizer begins now is of zeros
            assert p.grad is not None
            p.grad.masked_fill_(~taken, 0)
        optimizer.step()
        for now, then in before:
            torch.where(taken, now, then, out=now)


def _remembers_elsewhere(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it keeps more than counts and its state on the device: averages in its groups, or pages of memory."""
    return bool(COUNTED & optimizer.param_groups[0].keys()) or getattr(optimizer, "is_paged", False)


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that a step moves: those with a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _changing(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """The weights that a step moves, and what the optimizer keeps of them, on this device."""
    weights = _stepped(optimizer)
    state = (x for p in weights for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor))
    return [x.detach() for x in (*weights, *state) if x.device == device]
