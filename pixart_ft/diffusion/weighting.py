"""Which t a training sample is noised to, and how much its error counts. Symbols: `pixart_ft.diffusion`.

The laws of t are functions of a uniform number (and, for importance sampling, of the losses seen so far), so that
whoever gives it decides what is random. The weights are tables over the whole schedule.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pixart_ft.diffusion.names import LossSpace, TimestepLaw, Weighting, unknown
from pixart_ft.diffusion.process import network_timesteps
from pixart_ft.diffusion.schedules import NoiseSchedule

# The debiased weight is capped here: it grows without bound where the signal vanishes.
MAX_DEBIASED = 1000.0
# The least share of a law of t that an interval may hold: further out in the law's tail, float64 tells no t apart.
LEAST_SHARE = 1e-9


def indices_within(schedule: NoiseSchedule, low: float, high: float) -> range:
    """The indices t at which the network is told a timestep from `low` to `high`, both included.

    Raises ValueError where there is none.
    """
    told = network_timesteps(schedule, torch.arange(schedule.num_steps)).double()  # beside a number, float32 rounds it
    inside = ((told >= low) & (told <= high)).nonzero().flatten().tolist()
    if not inside:
        first, last = told[[0, -1]].tolist()
        raise ValueError(f"[{low:g}, {high:g}] holds none of the network's timesteps, {first:g} to {last:g}")
    return range(inside[0], inside[-1] + 1)  # timesteps never fall


def uniform_timesteps(u: Tensor, num_steps: int) -> Tensor:
    """t (N,) int64, uniform on 0..num_steps-1, from u (N,) float64 uniform on [0, 1)."""
    return (u.to(torch.float64) * num_steps).to(torch.int64).clamp(0, num_steps - 1)


def stratified_timesteps(u: Tensor, draw_indices: Tensor, global_batch: int, num_steps: int) -> Tensor:
    """t (N,) int64, one in each of `global_batch` equal strata of 0..num_steps-1: uniform over the batch.

    The stratum is the draw index (N,) modulo the global batch, however ranks and accumulation share it out.
    """
    stratum = draw_indices.to(u.device) % global_batch
    return uniform_timesteps((stratum + u.to(torch.float64)) / global_batch, num_steps)


def logit_normal_timesteps(
    u: Tensor, num_steps: int, *, mean: float = 0.0, std: float = 1.0, within: range | None = None
) -> Tensor:
    """t (N,) int64 with logit(t / T) ~ N(mean, std^2) (Esser et al. 2024, eq. 19), from u (N,) uniform on [0, 1).

    No weight corrects for it: it is a choice of which noise levels matter. A negative mean prefers little noise.
    within: the law given that t lies in it. Raises ValueError where less than `LEAST_SHARE` of the law does.
    """
    if std <= 0:
        raise ValueError(f"the deviation of the logit-normal law must be positive, got {std:g}")
    within = within or range(num_steps)
    edges = torch.tensor([within.start, within.stop], dtype=torch.float64) / num_steps
    below, above = torch.special.ndtr((edges.logit() - mean) / std).tolist()  # 0 and 1 for the whole process
    if above - below < LEAST_SHARE:
        raise ValueError(
            f"the logit-normal law of mean {mean:g} and deviation {std:g} leaves almost nothing (a share of "
            f"{above - below:.1g}) for t from {within.start} to {within.stop - 1}"
        )
    t = torch.sigmoid(mean + std * torch.special.ndtri(below + (above - below) * u.to(torch.float64)))
    return uniform_timesteps(t, num_steps).clamp(within.start, within.stop - 1)


def timestep_probabilities(
    law: TimestepLaw, num_steps: int, *, mean: float = 0.0, std: float = 1.0, within: range | None = None
) -> Tensor:
    """The probability (T,) float64 of each t; of importance that of its beginning, when no loss is known."""
    within = within or range(num_steps)
    inside = torch.zeros(num_steps, dtype=torch.float64)
    inside[within.start : within.stop] = 1
    if law == "logit_normal":
        edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        inside *= torch.special.ndtr((edges.logit() - mean) / std).diff()
    return inside / inside.sum()


@dataclass(frozen=True)
class LossHistory:
    """The newest losses at every t, from which importance sampling takes its law (Nichol & Dhariwal 2021, sec. 3.3).

    losses  (T, K) float64, the K newest at each t, oldest first
    counts  (T,) int64, how many of them are there, up to K
    """

    losses: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, num_steps: int, kept: int = 10) -> Self:
        """No losses yet; the paper keeps 10 for each t."""
        return cls(torch.zeros(num_steps, kept, dtype=torch.float64), torch.zeros(num_steps, dtype=torch.int64))

    def updated(self, t: Tensor, losses: Tensor) -> Self:
        """With these losses (N,) at t (N,) added, in order; those that are not finite are left out."""
        history, counts = self.losses.clone(), self.counts.clone()
        for index, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            if counts[index] == history.shape[1]:
                history[index] = history[index].roll(-1)
                history[index, -1] = loss
            else:
                history[index, counts[index]] = loss
                counts[index] += 1
        return type(self)(history, counts)

    def probabilities(self, uniform_share: float = 0.001, *, within: range | None = None) -> Tensor:
        """The law (T,) float64, in proportion to sqrt(E[L_t^2]); uniform until every t has all its K losses.

        A share of the uniform law is mixed in, so that no t starves. within: the law (len(within),) of these t alone.
        """
        part = slice(None) if within is None else slice(within.start, within.stop)
        losses, counts = self.losses[part], self.counts[part]
        num_steps, kept = losses.shape
        uniform = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
        root = (losses**2).mean(dim=1).sqrt()
        if bool((counts < kept).any()) or not bool(root.sum() > 0):
            return uniform
        return (1 - uniform_share) * root / root.sum() + uniform_share * uniform


def importance_timesteps(u: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(t (N,) int64 of that law, from u (N,) uniform on [0, 1), and weights (N,) float64 that undo it).

    weight = 1 / (T p_t): the weighted mean of any f(t) is, in expectation, its mean over all t.
    """
    cumulative = probabilities.to(torch.float64).cumsum(0)
    t = torch.searchsorted(cumulative / cumulative[-1], u.to(torch.float64), right=True)
    t = t.clamp(max=len(probabilities) - 1)
    return t, 1 / (len(probabilities) * probabilities.to(torch.float64)[t])


def loss_weights(
    schedule: NoiseSchedule,
    weighting: Weighting,
    space: LossSpace,
    *,
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
) -> Tensor:
    """The factor (T,) float64 on the squared error in `space`, the same weight of one prediction in any space.

    As factors on the eps error:
        constant      1
        min_snr       min(snr, g) / snr (Hang et al. 2023)
        soft_min_snr  g / (snr + g) (Crowson et al. 2024)
        p2            1 / (1 + snr)^gamma (Choi et al. 2022)
        debiased      1 / sqrt(snr), at most `MAX_DEBIASED` (Yu et al. 2023)
        elbo          what the bound gives it under the variance beta tilde, in nats: as a factor on the x0 error
                      (snr_prev - snr) / 2, and at t = 0 the decoder's 1 / (2 var) (Kingma et al. 2021, eq. 14)
    Times snr they act on the x0 error, times snr / (snr + 1) on the v error. `none` is 1 in every space: the plain
    error. Raises ValueError for a weight that is infinite: some at zero SNR.
    """
    if weighting == "none":
        return torch.ones(schedule.num_steps, dtype=torch.float64)
    snr = schedule.snr
    if weighting == "elbo":
        before = torch.cat([torch.zeros(1, dtype=torch.float64), snr[:-1]])
        on_x0 = (before - snr) / 2
        on_x0[0] = 0.5 * torch.exp(-schedule.posterior_log_variance[0])
        on_eps = on_x0 / snr
    else:
        if weighting == "constant":
            on_eps = torch.ones_like(snr)
        elif weighting == "min_snr":
            on_eps = (_positive(min_snr_gamma) / snr).clamp(max=1)
        elif weighting == "soft_min_snr":
            on_eps = _positive(min_snr_gamma) / (snr + min_snr_gamma)
        elif weighting == "p2":
            on_eps = (1 + snr) ** -p2_gamma
        elif weighting == "debiased":
            on_eps = snr.rsqrt().clamp(max=MAX_DEBIASED)
        else:
            raise unknown(weighting, "weighting", Weighting)
        on_x0 = on_eps * snr
    if space == "epsilon":
        weights = on_eps
    elif space == "v_prediction":
        weights = on_x0 / (snr + 1)
    elif space == "sample":
        weights = on_x0
    elif space == "posterior_mean":
        weights = on_x0 / schedule.posterior_x0_weight**2
    elif space == "score":
        weights = on_eps * schedule.noise**2
    elif space == "step_noise":
        weights = on_eps * (schedule.noise / schedule.step_noise) ** 2
    else:
        raise unknown(space, "loss space", LossSpace)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"weighting {weighting} is infinite on the {space} error where this schedule leaves no signal")
    return weights


def _positive(gamma: float) -> float:
    if gamma <= 0:
        raise ValueError(f"the gamma of min-SNR must be positive, got {gamma:g}")
    return gamma
