"""What a network says at chosen steps of a process: bits, errors, and its variance against what it stands for.

Bits per dimension of whatever x0 is, here latents. Symbols: `pixart_ft.diffusion`; G is the number of steps measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pixart_ft.diffusion.names import Decoder, PredictionType, Variance
from pixart_ft.diffusion.objectives import vlb_term
from pixart_ft.diffusion.process import Noised, log_variance_of, predict, q_posterior
from pixart_ft.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Readings:
    """What was found of N samples, each (N,) at one step or (N, G) at all.

    bits       the bound's term: the decoder at t = 0, a divergence after it
    x0_mse     mean squared error of x0, and
    eps_mse    of the noise, whatever the network predicts
    predicted  mean of p's variance
    empirical  expected squared distance of x_{t-1} from p's mean, given x_t and x0: beta tilde, and w^2 times the
               squared error of x0 for the weight w of x0 in that mean; at t = 0 the error itself
    ratio      mean over the dimensions of that distance over p's variance: 1 on average for a calibrated one
    """

    bits: Tensor
    x0_mse: Tensor
    eps_mse: Tensor
    predicted: Tensor
    empirical: Tensor
    ratio: Tensor

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        output: Tensor,
        noised: Noised,
        prediction_type: PredictionType,
        variance: Variance,
        decoder: Decoder = "gaussian",
    ) -> Self:
        """Of one output (N, C or 2C, H, W) at a step of `schedule`.

        Raises ValueError for a learned variance of a network without the channels.
        """
        x0, x_t, t = noised.x0, noised.x_t, noised.t
        prediction = predict(schedule, output, x_t, t, prediction_type)
        q, mean = q_posterior(schedule, x0, x_t, t), q_posterior(schedule, prediction.x0, x_t, t).mean
        distance = (q.mean - mean) ** 2 + q.variance
        predicted = log_variance_of(schedule, prediction, x_t, t, variance).exp()
        bits = vlb_term(schedule, output, noised, prediction_type, decoder=decoder, variance=variance)
        fields = [
            (prediction.x0 - x0) ** 2,
            (prediction.eps - noised.eps) ** 2,
            predicted,
            distance,
            distance / predicted,
        ]
        return cls(bits, *(x.flatten(1).mean(dim=1) for x in fields))


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a process at which N samples are measured.

    t           (N, G) int64: indices into the schedule, for each sample its own
    stands_for  (G,) float64: how many steps each stands for; they add up to T
    """

    schedule: NoiseSchedule
    t: Tensor
    stands_for: Tensor

    @classmethod
    def every(cls, schedule: NoiseSchedule, count: int) -> Self:
        """All of them, for `count` samples."""
        steps = torch.arange(schedule.num_steps)
        return cls(schedule, steps.expand(count, -1), torch.ones_like(steps, dtype=torch.float64))

    @classmethod
    def drawn(cls, schedule: NoiseSchedule, parts: Sequence[range], uniform: Tensor) -> Self:
        """One of each part of the process, by uniform numbers (N, G) in [0, 1).

        Sums over the process are unbiased, and the error of drawing is among that of the samples.
        """
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        starts = torch.tensor([part.start for part in parts])
        return cls(schedule, starts + (uniform * sizes).long(), sizes)

    def total(self, values: Tensor) -> Tensor:
        """The sum (N,) over all steps of the process of values (N, G)."""
        return values.double() @ self.stands_for


def strata(num_steps: int, count: int) -> list[range]:
    """t = 0 alone, where the bound asks for the decoder; then parts of 1, 2, 4, ... steps, up to num_steps / count.

    Where there is little noise the bound's terms change by factors from step to step; elsewhere hardly.
    """
    parts, start, size = [range(1)], 1, 1
    while start < num_steps:
        size = max(1, min(size, round(num_steps / count)))
        parts.append(range(start, min(start + size, num_steps)))
        start, size = start + size, 2 * size
    return parts


def bits_to_save(ratio: Tensor) -> Tensor:
    """Bits per dimension (N, G) that the bound loses at each step where all variances are wrong by one factor.

    ratio (N, G) as in `Readings`. The factor is the mean ratio of the other samples, so that the mean of what comes out
    is an honest estimate: about zero, and a little below, for a calibrated variance. N must be above 1.
    """
    ratio = ratio.double()
    factor = (ratio.sum(dim=0) - ratio) / (len(ratio) - 1)
    return 0.5 * (ratio - ratio / factor - factor.log()) / math.log(2)
