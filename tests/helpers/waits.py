"""Traps for what a GPU alone would show, on a machine without one: waits, and operators that know no shards. Shared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What gives the host a number of a tensor, by the operators that all of these come to,
_READ = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
# and what brings a tensor to the host, which on a CPU comes to no operator.
_BROUGHT = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in _BROUGHT, f"{function.__name__} waits for the device"
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        assert name not in _READ, f"{name} waits for the device"
        return operator(*args, **(kwargs or {}))


class _Lists(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        shards = any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs)))
        assert not (name.startswith("_foreach") and shards), f"{name} of shards is not in every torch"
        return operator(*args, **(kwargs or {}))


@contextmanager
def no_lists_of_shards() -> Iterator[None]:
    """Raise AssertionError inside, in this thread, at an operator on a list that is given a network's shards: which of
    these operators know of shards is another matter in each version of torch."""
    with _Lists():
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise AssertionError inside, in this thread, at whatever reads a number of a tensor or brings it to the host."""
    with _Functions(), _Operators():
        yield
