"""A second device on a machine that has none: tensors that are the CPU's own, under the name of another device. Shared.

The numbers are the CPU's to the bit, and every copy between the two is seen, as is every read.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# The one name beside "cpu" that torch has on every machine; what lies there under it alone has no values.
THERE = torch.device("meta")
# What gives the host a number of a tensor, by the operators that all of these come to.
_READ = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class Far(Tensor):
    """A tensor on the second device; `held` is the same on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Far":
        made: Far = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=THERE,
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU, and what comes out under the name of the device that it belongs to."""
    far = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Far)]
    device = kwargs.get("device")
    if not far and device != THERE:
        return operator(*args, **kwargs)
    given, named = tree_map_only(Far, lambda x: x.held, (args, kwargs))
    if device is not None:
        named |= {"device": torch.device("cpu")}
    own = {id(x.held): x for x in far}
    found = operator(*given, **named)
    if device is not None and device != THERE:
        return found.clone() if any(found is x.held for x in far) else found
    return tree_map_only(Tensor, lambda x: own[id(x)] if id(x) in own else Far(x), found)


class SecondDevice(TorchDispatchMode):
    """The device.

    watching   whether copies and reads that make the host wait are noted; in this thread
    waits      what was
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []

    def pin(self, tensors: Iterable[Tensor]) -> None:
        """Take these for tensors in pinned memory, which are copied while the host goes on if it says so."""
        self._pinned = list(tensors)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if self.watching and (fault := self._fault(operator.overloadpacket.__name__, args, given)):
            self.waits.append(fault)
        return _run(operator, args, given)

    def _fault(self, name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        near = [x for x in tensors if not isinstance(x, Far)]
        far, device = len(near) < len(tensors), kwargs.get("device")
        shapes = ", ".join(f"{tuple(x.shape)} {'there' if isinstance(x, Far) else 'here'}" for x in tensors)
        if name in _READ:
            return f"{name} of {shapes}" if far else None
        brought = near if device == THERE else far and device is not None
        if name == "_to_copy" and brought:
            free = kwargs.get("non_blocking") and all(any(x is pinned for pinned in self._pinned) for x in near)
            return None if free else f"a copy of {shapes} to {device}"
        if name == "index" and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            return f"{name} by flags of {shapes}"  # how many are set is the device's to know
        # A number of the host is an argument of the kernel; more is copied, or refused.
        return f"{name} of {shapes}" if far and any(x.ndim for x in near) else None


class _Made(TorchFunctionMode):
    """What torch does with tensors under this name, or of a kind of one's own, before it asks another mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        device = given.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == THERE:
            return function(*args, **given | {"device": "cpu"}).to(THERE)
        if function in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], Far):
            return function(args[0].cpu(), *args[1:], **given)
        return function(*args, **given)


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Within, in this thread, `THERE` is a device whose tensors have values."""
    with SecondDevice() as device, _Made():
        yield device
