"""Gradients that are not finite: a step with one leaves no trace, and the host does not wait to know."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def clip_gradients(parameters: Sequence[Parameter], limit: float) -> tuple[Tensor, Tensor]:
    """Scale the gradients down to a whole norm of at most `limit`, which may be infinite; waits for no device.

    Returns the norm of each parameter's gradient (P,), 0 where it has none, and of all together (), before.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    found = dict(zip(map(id, with_gradient), norms, strict=True))
    return torch.stack([found.get(id(p), torch.zeros_like(norm)) for p in parameters]), norm


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, taken: Tensor) -> None:
    """`optimizer.step()` where `taken`, a bool () on the device of the weights, is true; else nothing changes.

    On another device than the CPU the host does not wait for `taken`. torch's fused optimizers skip by themselves
    when they are told. Around any other the weights and the state are copied and put back where they should not have
    changed; only a count that it keeps on the host, such as Adam's of its steps, then goes on.
    """
    if _is_known(taken):
        if taken:
            optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as GradScaler tells it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        before = [(x, x.clone()) for x in _changing(optimizer, taken.device)]
        for p in _parameters(optimizer):
            if p.grad is not None:  # state that the optimizer begins now is of zeros
                p.grad.masked_fill_(~taken, 0)
        optimizer.step()
        for now, then in before:
            torch.where(taken, now, then, out=now)


def _is_known(flag: Tensor) -> bool:
    """Whether reading it makes nobody wait."""
    return flag.device.type == "cpu"


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _changing(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """The weights, and what the optimizer keeps of them, on this device."""
    state = (x for kept in optimizer.state.values() for x in kept.values() if isinstance(x, Tensor))
    return [x.detach() for x in (*_parameters(optimizer), *state) if x.device == device]
