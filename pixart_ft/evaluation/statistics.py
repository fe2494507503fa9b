"""Means over pictures, and what two models differ by on the same ones, with intervals that say how sure that is."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from pixart_ft.evaluation.held_out import mean_over_pictures

LEVEL = 0.95  # of every interval; what is less likely than 1 - LEVEL by chance is called significant
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """A mean over pictures of what one model's values exceed another's by, and its standard error.

    low, high  the interval of 95 % by Student's t
    p          of a mean at least as far from 0 if there were no difference
    corrected  the same by Holm's method, for several comparisons
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    corrected: float

    @property
    def is_significant(self) -> bool:
        """Whether it is more than chance, the number of comparisons taken into account."""
        return self.corrected < 1 - LEVEL


def differences(changes: Mapping[Key, Tensor]) -> dict[Key, Difference]:
    """Of changes (P,), each of another comparison of one family; P > 1."""
    if not changes:
        return {}
    values = torch.stack([change.double() for change in changes.values()])
    test = stats.ttest_1samp(values.numpy(), 0.0, axis=1)
    pvalues = np.nan_to_num(test.pvalue, nan=1.0).tolist()  # none where nothing changes
    lows, highs = (ends.tolist() for ends in test.confidence_interval(LEVEL))
    estimates = map(mean_over_pictures, values)
    rows = zip(estimates, lows, highs, pvalues, holm(pvalues), strict=True)
    return {
        key: Difference(estimate.mean, estimate.standard_error, *row)
        for key, (estimate, *row) in zip(changes, rows, strict=True)
    }


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's (1979) p-values: at any limit, the chance that even one of those below it is there by chance."""
    corrected, largest = list(pvalues), 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        corrected[i] = largest
    return corrected
