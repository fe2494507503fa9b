"""What a network says at chosen steps. Oracle: Gaussian data, whose best network, entropy and variances are known.

The readings are quadratic in x0 and in the noise, so Gauss-Hermite sums of three nodes each are their expectations.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.likelihood import prior_bits
from pixart_ft.diffusion.names import IndexSpacing
from pixart_ft.diffusion.process import Noised, network_timesteps
from pixart_ft.diffusion.readings import Readings, Steps, bits_to_save, strata
from pixart_ft.diffusion.respacing import spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule
from tests.helpers.networks import Network, best_variance_half, gaussian_output, level

STD = torch.tensor(0.4, dtype=torch.float64)
NODES = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.float64)
SHARES = torch.outer(*[torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)] * 2).flatten()
X0 = STD * NODES.repeat_interleave(3).view(9, 1, 1, 1)
EPS = NODES.repeat(3).view(9, 1, 1, 1)
LINEAR = NoiseSchedule.linear()


def exact(native: NoiseSchedule, x: Tensor, timestep: Tensor, *, off: float = 1.0) -> Tensor:
    """The best mean, and the variance half of the best variance times `off`, on the steps of `native`."""
    index = int((native.timesteps - timestep[0]).abs().argmin())
    half = best_variance_half(native, STD)[index]
    low, high = native.posterior_log_variance[index], native.log_betas[index]
    half = half + 2 * math.log(off) / (high - low)
    output = gaussian_output("epsilon", x, *level(native, native.timesteps[index]), 0.0, STD)
    return torch.cat([output, half.expand_as(output)], dim=1)


def readings(schedule: NoiseSchedule, network: Network) -> Readings:
    """The expectation of each at every step, as one sample: (1, T)."""
    columns = []
    for index in range(schedule.num_steps):
        t = torch.full((9,), index)
        noised = Noised.of(schedule, X0, t, EPS)
        output = network(noised.x_t, network_timesteps(schedule, t))
        found = Readings.of(schedule, output, noised, "epsilon", "learned")
        columns.append([(value * SHARES).sum() for value in vars(found).values()])
    return Readings(*(torch.stack(column)[None] for column in zip(*columns, strict=True)))


@pytest.mark.parametrize(
    ("count", "spacing"), [(2, "iddpm"), (10, "trailing"), (25, "iddpm"), (50, "leading"), (250, "iddpm")]
)
def test_the_best_network_is_calibrated_at_every_respacing_and_its_bound_is_the_entropy(
    count: int, spacing: IndexSpacing
) -> None:
    """The reverse chain is then the exact one, but for the prior it starts from: H(x0) + KL(q(x_T) || N(0, 1))."""
    schedule = LINEAR.respaced(spaced_indices(1000, count, spacing))
    found = readings(schedule, partial(exact, LINEAR))
    torch.testing.assert_close(found.ratio, torch.ones_like(found.ratio), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.predicted, found.empirical, rtol=1e-8, atol=0)
    steps = Steps.every(schedule, 1)
    total = steps.total(found.bits) + (prior_bits(schedule, X0) * SHARES).sum()
    left = schedule.alpha_bar[-1] * STD**2 + 1 - schedule.alpha_bar[-1]
    entropy = 0.5 * torch.log2(2 * math.pi * math.e * STD**2)
    torch.testing.assert_close(total, (entropy + 0.5 * (left - 1 - left.log()) / math.log(2))[None], rtol=0, atol=1e-8)
    torch.testing.assert_close(
        steps.total(bits_to_save(found.ratio.expand(2, -1))), torch.zeros(2).double(), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("off", [0.5, 1.7])
def test_what_wrong_variances_cost_is_what_the_bound_loses_by_them(off: float) -> None:
    """On the steps of the training every variance is off by one factor, whatever it is."""
    schedule = NoiseSchedule.linear(20, beta_end=0.3)
    right, wrong = (readings(schedule, partial(exact, schedule, off=factor)) for factor in (1.0, off))
    torch.testing.assert_close(wrong.ratio, torch.full_like(wrong.ratio, 1 / off), rtol=1e-8, atol=0)
    saved = bits_to_save(wrong.ratio.expand(3, -1))
    torch.testing.assert_close(saved, (wrong.bits - right.bits).expand(3, -1), rtol=1e-7, atol=1e-10)


def test_nothing_is_saved_by_factors_that_are_chance() -> None:
    """Ratios of mean 1: each sample's factor is taken from the others, so the mean is a little below zero."""
    draw = torch.Generator().manual_seed(0)
    ratio = torch.randn(4_000, 16, 40, generator=draw, dtype=torch.float64).square().mean(dim=1)
    saved = torch.stack([bits_to_save(part).mean() for part in ratio.split(20)])
    error = saved.std() / len(saved) ** 0.5
    # a ratio of variance 2/16, and a factor 1 + m with Var m = 2/16/19: -Var m / 4 nats, to the third order
    assert saved.mean() < 0 and abs(saved.mean() + 2 / 16 / 19 / 4 / math.log(2)) < 5 * error + 1e-4


def test_strata_cover_the_process_once_and_begin_with_the_decoders_step() -> None:
    for num_steps, count in ((1000, 20), (1000, 1), (7, 1000), (1, 3), (2, 1), (25, 4)):
        parts = strata(num_steps, count)
        assert parts[0] == range(1)
        assert [t for part in parts for t in part] == list(range(num_steps))
        assert max(map(len, parts)) <= max(1, round(num_steps / count))
    assert [len(part) for part in strata(1000, 20)][:8] == [1, 1, 2, 4, 8, 16, 32, 50]


def test_a_drawn_step_of_each_part_stands_for_all_of_it() -> None:
    """Over even shares, sums over the process are exact."""
    schedule, parts = NoiseSchedule.linear(32), strata(32, 4)
    shares = ((torch.arange(8) + 0.5) / 8)[:, None].expand(-1, len(parts))
    steps = Steps.drawn(schedule, parts, shares.double())
    assert steps.stands_for.sum() == 32 and [len(part) for part in parts] == [1, 1, 2, 4, 8, 8, 8]
    values = torch.arange(32, dtype=torch.float64) ** 2
    assert steps.total(values[steps.t]).mean().item() == pytest.approx(values.sum().item())
    assert torch.equal(steps.t[0, :2], torch.tensor([0, 1]))
