"""Random draws as functions of (seed, index, purpose): the same whatever the batch, the rank or the past."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def generator(seed: int, index: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one use of randomness, such as the noise of draw 17.

    Seeded with 63 bits of the sha256 of "seed/purpose/index", so that neighbours and purposes are unrelated.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(seed: int, indices: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal (N, *shape) float32 on the CPU; row i depends on indices[i] alone."""
    rows = [torch.randn(*shape, generator=generator(seed, index, purpose), dtype=torch.float32) for index in indices]
    return torch.stack(rows)


def uniform(seed: int, indices: Sequence[int], purpose: str) -> Tensor:
    """Uniform (N,) float64 in [0, 1) on the CPU; entry i depends on indices[i] alone."""
    rows = [torch.rand((), generator=generator(seed, index, purpose), dtype=torch.float64) for index in indices]
    return torch.stack(rows)


@lru_cache(maxsize=4)  # a batch may straddle two epochs of two sets; a shuffle of 20 million a step would be felt
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch number `epoch` visits `count` samples: a permutation of range(count), int64."""
    return torch.randperm(count, generator=generator(seed, epoch, "epoch_order"))
