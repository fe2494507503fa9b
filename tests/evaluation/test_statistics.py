"""Differences of models. Oracles: the textbook's formulas, a simulation, and a worked example of Holm's method."""

import math

import pytest
import torch

from pixart_ft.evaluation.statistics import differences, holm


def test_holms_method_on_a_worked_example() -> None:
    """Smallest times 4, next times 3, ...; never below one before it, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_the_interval_is_students() -> None:
    change = torch.tensor([0.3, 0.5, 0.1, 0.7])
    found = differences({"a": change})["a"]
    error = change.std().item() / 2
    assert found.mean == pytest.approx(0.4) and found.standard_error == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx((0.4 - 3.182446 * error, 0.4 + 3.182446 * error), abs=1e-6)
    assert found.p == found.corrected == pytest.approx(0.0534, abs=1e-4) and not found.is_significant


def test_equal_models_do_not_differ() -> None:
    found = differences({"a": torch.zeros(5), "b": torch.ones(5) + torch.tensor([1e-3, 0, 0, 0, 0])})
    assert (found["a"].p, found["a"].corrected, found["a"].low, found["a"].high) == (1, 1, 0, 0)
    assert not found["a"].is_significant and found["b"].is_significant


def test_intervals_cover_the_truth_at_their_rate_and_a_family_errs_at_its() -> None:
    """Paired values of pictures that differ much and change little: 95 % of the intervals hold the true change; of
    families of three comparisons without a difference 5 % at most call one significant. To four deviations."""
    draw = torch.Generator().manual_seed(0)
    trials, false = 300, 0
    for _ in range(trials):
        pictures = 5 + 2 * torch.randn(12, generator=draw)
        after = {name: pictures + 0.1 * torch.randn(12, generator=draw) for name in "abc"}
        found = differences({name: values - pictures for name, values in after.items()})
        false += any(one.is_significant for one in found.values())
    assert false < 0.05 * trials + 4 * math.sqrt(0.95 * 0.05 * trials)
    many = differences({n: 0.3 + 0.1 * torch.randn(12, generator=draw) for n in range(4000)}).values()
    covered = sum(one.low <= 0.3 <= one.high for one in many)
    assert abs(covered - 0.95 * 4000) < 4 * math.sqrt(0.95 * 0.05 * 4000)
