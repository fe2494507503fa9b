"""Random draws as functions of (seed, index, purpose): the same whatever the batch, the rank or the past."""

import hashlib
from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

_TURNS = 16  # at 12 some orders of six samples come visibly more often than others


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


def permuted(seed: int, epoch: int, purpose: str, count: int, number: int) -> int:
    """Where `number` goes in a permutation of range(count) that belongs to (seed, epoch, purpose).

    No table is made, whatever the count: a Feistel network on rows x columns, the least such rectangle that holds
    `count`; a number that comes out beyond it goes through again until it does not (Black, Rogaway 2002).
    """
    rows = isqrt(count - 1) + 1
    columns = -(-count // rows)
    key = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/".encode(), digest_size=8)

    def word(turn: int, half: int) -> int:
        hashed = key.copy()
        hashed.update(b"%d/%d" % (turn, half))
        return int.from_bytes(hashed.digest(), "big")

    while True:
        row, column = divmod(number, columns)
        for turn in range(0, _TURNS, 2):
            row = (row + word(turn, column)) % rows
            column = (column + word(turn + 1, row)) % columns
        number = row * columns + column
        if number < count:
            return number
