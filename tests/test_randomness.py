"""Draws as functions of (seed, index, purpose). Oracles: properties; a seed worked out with sha256sum."""

import itertools
import math
from collections import Counter

import pytest
import torch

from pixart_ft.randomness import generator, normal, permuted, uniform


def test_batch_composition_never_changes_a_draw() -> None:
    whole, parts = (
        normal(0, range(8), "noise", (4, 2, 2)),
        [normal(0, [i], "noise", (4, 2, 2)) for i in range(8)],
    )
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(normal(0, [5, 2], "noise", (4, 2, 2)), whole[[5, 2]])
    assert torch.equal(uniform(0, [3, 1], "t"), uniform(0, range(4), "t")[[3, 1]])


def test_seed_index_and_purpose_each_change_the_draw() -> None:
    draws = torch.cat([uniform(seed, range(3), purpose) for seed in (0, 1) for purpose in ("t", "drop")])
    assert len(set(draws.tolist())) == len(draws)


def test_the_seed_is_the_documented_hash() -> None:
    # First 8 bytes of sha256("0/noise/1"), big-endian, without the last bit, computed with sha256sum.
    assert generator(0, 1, "noise").initial_seed() == 0x570BA99C3CDD0ADE >> 1


def test_distributions_and_types() -> None:
    z, u = normal(0, range(4_000), "z", (1,)), uniform(0, range(4_000), "u")
    assert z.dtype == torch.float32 and z.shape == (4_000, 1) and u.dtype == torch.float64 and u.shape == (4_000,)
    # Four standard errors of mean and variance.
    assert abs(z.mean().item()) < 4 / 4_000**0.5 and abs(z.var().item() - 1) < 4 * (2 / 4_000) ** 0.5
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean().item() - 0.5) < 4 * (1 / 12 / 4_000) ** 0.5


def order(seed: int, epoch: int, count: int) -> list[int]:
    return [permuted(seed, epoch, "order", count, number) for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 50, 1001])
def test_every_epoch_is_an_order_of_its_own_with_each_number_once(count: int) -> None:
    orders = [order(seed, epoch, count) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(one) == list(range(count)) for one in orders)
    assert orders[0] == order(0, 0, count)
    assert count < 16 or len(set(map(tuple, orders))) == len(orders)
    assert permuted(0, 0, "another", 10**6, 5) != permuted(0, 0, "order", 10**6, 5)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_all_orders_of_a_few_are_equally_frequent(count: int) -> None:
    """Pearson's chi-squared, four standard deviations of its law."""
    expected = 20
    orders = math.factorial(count)
    seen = Counter(tuple(order(seed, 0, count)) for seed in range(expected * orders))
    squares = sum((seen[one] - expected) ** 2 for one in itertools.permutations(range(count))) / expected
    assert abs(squares - (orders - 1)) < 4 * (2 * (orders - 1)) ** 0.5


def test_neighbours_of_a_large_set_part_and_no_table_is_made() -> None:
    """Where a million million are, the steps from one to the next have the triangular law of uniform draws."""
    count, tried = 10**12, 500
    found = [permuted(0, 0, "order", count, number) for number in range(tried)]
    assert len(set(found)) == tried and min(found) >= 0 and max(found) < count
    steps = torch.tensor(found, dtype=torch.float64).diff().abs() / count
    assert abs(steps.mean().item() - 1 / 3) < 4 * (1 / 18 / tried) ** 0.5 * 1.5  # those that share an end go together


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    normal(0, [0], "noise", (2,)), uniform(0, [0], "t"), permuted(0, 0, "order", 5, 2)
    assert torch.equal(before, torch.get_rng_state())
