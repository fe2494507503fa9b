"""How well a network models data, on data whose exact denoiser, entropy and smoothed density are known.

Oracles: closed forms of Gaussian data and of a mixture of two Gaussians. The bound's terms are quadratic in x0 and in
the noise, so that Gauss-Hermite sums of three nodes each are their expectations exactly. See also test_golden.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion.flow import Network
from pixart_ft.diffusion.likelihood import Bound, ode_likelihood, prior_bits, variational_bound
from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.process import to_posterior_mean, to_score, to_step_noise
from pixart_ft.diffusion.respacing import spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule
from tests.helpers.networks import best_variance, best_variance_half, gaussian_output, left_variance, level


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Three kinds of Gaussian data: narrower than the noise, as wide, and wider.
MEANS, STDS = float64(0.3, -0.2, 0.5), float64(0.5, 1.0, 2.0)
# Gauss-Hermite: the mean of f(z) for z ~ N(0, 1), exact for f up to the fifth degree.
NODES, SHARES = float64(-math.sqrt(3), 0, math.sqrt(3)), float64(1 / 6, 2 / 3, 1 / 6)

NATIVES: dict[str, NoiseSchedule] = {  # what the networks of the respaced ones were trained on
    "respaced": NoiseSchedule.linear(),
    "trailing": NoiseSchedule.cosine(300),
    "zero_snr_respaced": NoiseSchedule.scaled_linear().zero_terminal_snr(),
}
SCHEDULES: dict[str, tuple[Callable[[int], NoiseSchedule], PredictionType]] = {
    "linear": (lambda count: NoiseSchedule.linear(count, rescale=True), "epsilon"),
    "cosine": (NoiseSchedule.cosine, "sample"),
    "respaced": (lambda count: NATIVES["respaced"].respaced(count), "epsilon"),
    "trailing": (lambda count: NATIVES["trailing"].respaced(spaced_indices(300, count, "trailing")), "sample"),
    "zero_snr": (lambda count: NoiseSchedule.linear(count, rescale=True).zero_terminal_snr(), "v_prediction"),
    "zero_snr_respaced": (lambda count: NATIVES["zero_snr_respaced"].respaced(count), "v_prediction"),
}


def weight_of_x0(schedule: NoiseSchedule) -> Tensor:
    """c_1 (T,), the weight of x0 in the mean of q(x_{t-1} | x_t, x0)."""
    return schedule.alpha_bar_prev.sqrt() * schedule.betas / (1 - schedule.alpha_bar)


def per_sample(values: Tensor) -> Tensor:
    """Entries (3,) for the three kinds of data as (27, 1, 1, 1): each meets three nodes of x0 times three of eps."""
    return values.repeat_interleave(9).view(27, 1, 1, 1)


def expectation(values: Tensor) -> Tensor:
    """(27, ...) over the nodes -> (3, ...)."""
    weights = torch.outer(SHARES, SHARES).flatten()
    return (values.view(3, 9, -1) * weights[:, None]).sum(dim=1).view(3, *values.shape[1:])


X0 = per_sample(MEANS) + per_sample(STDS) * NODES.repeat_interleave(3).repeat(3).view(27, 1, 1, 1)
EPS = NODES.repeat(9).view(27, 1, 1, 1)


def gaussian_network(native: NoiseSchedule, kind: PredictionType) -> Network:
    """The best mean and, in the variance half, what makes the best variance of the steps of `native`."""
    half = best_variance_half(native, STDS)

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        index = int((native.timesteps - timestep[0]).abs().argmin())
        mean, std = per_sample(MEANS).to(x.dtype), per_sample(STDS).to(x.dtype)
        output = gaussian_output(kind, x, *level(native, native.timesteps[index]), mean, std)
        return torch.cat([output, per_sample(half[:, index]).to(x.dtype)], dim=1)

    return network


@functools.cache
def bound_of(name: str, count: int, variance: Any = "learned", dtype: torch.dtype = torch.float64) -> Bound:
    build, kind = SCHEDULES[name]
    schedule = build(count)
    x0, eps, network = X0.to(dtype), EPS.to(dtype), gaussian_network(NATIVES.get(name, schedule), kind)
    return variational_bound(schedule, network, x0, kind, noise=lambda t: eps, variance=variance)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear", 25), ("linear", 100), ("linear", 1000), ("cosine", 25), ("cosine", 100),
        ("respaced", 10), ("respaced", 25), ("trailing", 20), ("zero_snr", 50), ("zero_snr_respaced", 10),
    ],
)  # fmt: skip
def test_with_the_best_variance_the_bound_is_tight(name: str, count: int) -> None:
    """Its expectation is the entropy and KL(q(x_T) || N(0, I)), for every T: Gaussian steps can be reversed exactly."""
    signal = SCHEDULES[name][0](count).alpha_bar[-1]
    variance = signal * STDS**2 + 1 - signal
    entropy = 0.5 * torch.log2(2 * math.pi * math.e * STDS**2)
    mismatch = 0.5 * (variance + signal * MEANS**2 - 1 - variance.log()) / math.log(2)
    total = expectation(bound_of(name, count).total)
    torch.testing.assert_close(total, entropy + mismatch, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["posterior_mean", "step_noise", "score"])
def test_the_bound_of_few_steps_is_the_same_whatever_a_network_says_of_the_trained_ones(kind: PredictionType) -> None:
    native = NATIVES["respaced"]
    said = {"posterior_mean": to_posterior_mean, "step_noise": to_step_noise, "score": to_score}[kind]
    by_noise = gaussian_network(native, "epsilon")

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        eps, half = by_noise(x, timestep).chunk(2, dim=1)
        return torch.cat([said(native, eps, x, timestep, "epsilon"), half], dim=1)

    found = variational_bound(native.respaced(10), network, X0, kind, noise=lambda t: EPS)
    torch.testing.assert_close(found.terms, bound_of("respaced", 10).terms, rtol=1e-9, atol=1e-9)


# name, T, then for each of the three kinds of data the bound with variance beta_tilde, and with variance beta
FIXED = [
    ("linear", 25, (5.81848966864, 7.87113165761, 9.40574906836), (1.11442186581, 2.05072009358, 3.10844288228)),
    ("linear", 100, (2.88249299159, 4.02221294318, 5.10541189703), (1.09474449767, 2.07964545292, 3.09254494041)),
    ("cosine", 25, (2.29598135425, 3.57710697329, 4.77615407707), (1.12398403035, 2.09430145138, 3.13168778460)),
    ("cosine", 100, (2.19178317851, 3.25806710415, 4.30413988122), (1.13946782074, 2.13146071098, 3.14054019381)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "beta_tilde", "beta"), FIXED)
def test_with_fixed_variances_the_bound_is_that_of_the_tables(
    name: str, count: int, beta_tilde: tuple[float, ...], beta: tuple[float, ...]
) -> None:
    for variance, expected in (("beta_tilde", beta_tilde), ("beta", beta)):
        total = expectation(bound_of(name, count, variance).total)
        torch.testing.assert_close(total, float64(*expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variance", ["learned", "beta_tilde", "beta"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_term_has_its_expectation_in_closed_form(name: str, variance: str) -> None:
    schedule, bound = SCHEDULES[name][0](100), bound_of(name, 100, variance)
    mse, posterior = left_variance(schedule, STDS), schedule.posterior_variance
    clipped = torch.cat([posterior[1:2], posterior[1:]])
    beta = torch.cat([posterior[1:2], schedule.betas[1:]])
    var = {"learned": best_variance(schedule, STDS), "beta_tilde": clipped, "beta": beta}[variance].expand(3, -1)
    moved = weight_of_x0(schedule) ** 2 * mse
    kl = 0.5 * ((var / clipped).log() - 1 + clipped / var + moved / var)
    decoder = 0.5 * ((2 * math.pi * var[:, :1]).log() + mse[:, :1] / var[:, :1])
    terms = torch.cat([decoder, kl[:, 1:]], dim=1) / math.log(2)
    torch.testing.assert_close(expectation(bound.terms), terms, rtol=1e-10, atol=1e-10)
    signal = schedule.alpha_bar[-1]
    prior = 0.5 * (-(1 - signal).log() - signal + signal * (MEANS**2 + STDS**2)) / math.log(2)
    torch.testing.assert_close(expectation(bound.prior), prior, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(expectation(bound.x0_mse), mse, rtol=1e-10, atol=1e-12)
    eps_mse = mse * schedule.alpha_bar / (1 - schedule.alpha_bar)
    torch.testing.assert_close(expectation(bound.eps_mse), eps_mse, rtol=1e-10, atol=1e-12)
    # Calibration: x_{t-1} strays from the best mean by the best variance, which beta tilde falls short of.
    torch.testing.assert_close(expectation(bound.predicted_variance), var, rtol=1e-10, atol=0)
    torch.testing.assert_close(expectation(bound.empirical_variance), posterior + moved, rtol=1e-10, atol=0)


def test_the_standard_error_over_noises_is_that_of_the_closed_form() -> None:
    """Beside a best mean, x0's guess is g x0 + h eps off, so that a term is const + k (g x0 + h eps)^2, whose variance
    over eps is k^2 (4 (g x0 h)^2 + 2 h^4), and terms have noises of their own. M times the squared error estimates it:
    to its own spread over a thousand samples, five times.
    """
    schedule, std, count = NoiseSchedule.linear().respaced(5), 0.5, 8
    a2, s2 = schedule.alpha_bar, 1 - schedule.alpha_bar
    x0 = std * torch.randn(1000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    averaged = Bound.averaged(
        [
            variational_bound(
                schedule,
                lambda x, step: gaussian_output("epsilon", x, *level(schedule, step[0]), 0.0, std),
                x0,
                "epsilon",
                noise=lambda t: torch.randn(x0.shape, generator=draw, dtype=torch.float64),
                variance="beta",
            )
            for _ in range(count)
        ]
    )
    k = weight_of_x0(schedule) ** 2 / (2 * schedule.large_log_variance.exp()) / math.log(2)
    whole = a2 * std**2 + s2
    g, h = s2 / whole, (a2 * s2).sqrt() * std**2 / whole
    expected = (k**2 * (4 * (g * h) ** 2 * x0.view(-1, 1) ** 2 + 2 * h**4)).sum(dim=1)
    found = count * averaged.noise_error**2 - expected
    assert abs(found.mean()) < 5 * found.std() / len(found) ** 0.5 < 0.2 * expected.mean()


def test_the_prior_term_of_one_sample() -> None:
    """A difference of numbers near 1: its digits are kept where hardly any signal is left."""
    schedule = NoiseSchedule.linear()
    x0 = torch.cat([torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)]).double()
    expected = float64(5.874783886762e-10, 2.911294542029e-05)
    torch.testing.assert_close(prior_bits(schedule, x0), expected, rtol=1e-6, atol=0)
    assert prior_bits(schedule.zero_terminal_snr(), x0).tolist() == [0, 0]


def test_the_discretized_decoder_counts_the_bins_of_8_bit_data() -> None:
    """127.5 bins to the unit: where the decoder is far wider than one, that many more bits, and no other term moves."""
    schedule, network = NoiseSchedule.from_betas([0.3, 0.3, 0.5]), lambda x, timestep: 0.5 * x
    plain, counted = (
        variational_bound(schedule, network, 0.3 * EPS, "sample", noise=lambda t: X0, variance="beta", decoder=decoder)
        for decoder in ("gaussian", "discretized")
    )
    torch.testing.assert_close(counted.terms[:, 0], plain.terms[:, 0] + math.log2(127.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(counted.terms[:, 1:], plain.terms[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(counted.prior, plain.prior, rtol=0, atol=0)


def test_the_bound_in_float32() -> None:
    exact, ours = bound_of("linear", 100), bound_of("linear", 100, "learned", torch.float32)
    assert {ours.total.dtype, ours.x0_mse.dtype, ours.empirical_variance.dtype} == {torch.float32}
    torch.testing.assert_close(ours.total.double(), exact.total, rtol=1e-4, atol=1e-4)


def test_the_network_receives_every_timestep_once() -> None:
    """int64 where the schedule has those, float32 where they are fractional: a schedule matched to another's."""
    reference = NoiseSchedule.linear()
    matched = NoiseSchedule.scaled_linear(30, beta_end=0.2).matched_to(reference)
    for schedule, dtype in ((reference.respaced(7), torch.int64), (matched, torch.float32)):
        received: list[Tensor] = []

        def network(x: Tensor, timestep: Tensor, received: list[Tensor] = received) -> Tensor:
            received.append(timestep)
            return x

        variational_bound(schedule, network, X0, "epsilon", noise=lambda t: EPS, variance="beta")
        expected = schedule.timesteps.to(dtype)[:, None].expand(-1, 27)
        torch.testing.assert_close(torch.stack(received), expected, rtol=0, atol=0)


def test_a_learned_variance_needs_its_channels() -> None:
    with pytest.raises(ValueError, match="2 output channels, not 1"):
        variational_bound(NoiseSchedule.linear(25), lambda x, _: x, X0, "epsilon", noise=lambda t: EPS)


# --- the probability-flow likelihood

POINTS = torch.cat([MEANS + offset * STDS for offset in (-2.0, 0.1, 1.0)]).repeat_interleave(2).view(9, 2, 1, 1)
POINTS[:, 1] += 0.4
CENTRES, WIDTHS = MEANS.repeat(3).view(9, 1, 1, 1), STDS.repeat(3).view(9, 1, 1, 1)


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return -0.5 * ((x - mean) ** 2 / variance + (2 * math.pi * variance).log())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("probed", [False, True])
def test_gaussian_data_has_its_smoothed_density(probed: bool, kind: PredictionType) -> None:
    """log N(x0; m, s^2 + sigma_0^2), and what the last level, N(a m, a^2 s^2 + 1 - a^2), is not N(0, 1).

    The flow keeps (y - m) / sqrt(s^2 + sigma^2). Its Jacobian is diagonal: any probe of signs gives the trace.
    """
    schedule = NoiseSchedule.cosine() if probed else NoiseSchedule.linear().respaced(50)
    probe = torch.ones(9, 2, 1, 1)
    probe[::2, 1] = -1

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32 and bool((timestep == timestep[0]).all())
        return gaussian_output(kind, x, *level(schedule, timestep[0]), CENTRES, WIDTHS)

    found = ode_likelihood(schedule, network, POINTS, kind, probe=probe if probed else None, rtol=1e-6, atol=1e-6)
    first, last, signal = schedule.sigmas[0], schedule.sigmas[-1], schedule.alpha_bar[-1]
    spread = ((WIDTHS**2 + last**2) / (WIDTHS**2 + first**2)).sqrt()
    latent = signal.sqrt() * (CENTRES + (POINTS - CENTRES) * spread)
    torch.testing.assert_close(found.latent, latent, rtol=0, atol=2e-5)
    smoothed = log_normal(POINTS, CENTRES, WIDTHS**2 + first**2)
    mismatch = log_normal(latent, 0, 1) - log_normal(latent, signal.sqrt() * CENTRES, signal * WIDTHS**2 + 1 - signal)
    expected = (smoothed + mismatch).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found.log_density, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.bits_per_dim, -expected / (2 * math.log(2)), rtol=0, atol=2e-5)


# Two unequal Gaussians in the plane, off the axes: the Jacobian of the flow is not diagonal. Their mean is 0, so that
# the last level is N(0, I) to the eighth digit.
WEIGHTS, PEAKS, BREADTHS = float64(0.3, 0.7), torch.stack([float64(-1.4, 0.7), float64(0.6, -0.3)]), float64(0.3, 0.6)
SCHEDULE = NoiseSchedule.cosine()


def mixture_log_density(x: Tensor, a: float, noise: Tensor | float) -> Tensor:
    """log density (N,) of a x0 + sqrt(noise) eps at x (N, 2, 1, 1)."""
    variance = (a * BREADTHS) ** 2 + noise
    parts = log_normal(x.view(-1, 1, 2), a * PEAKS, variance[:, None]).sum(dim=2)
    return torch.logsumexp(WEIGHTS.log() + parts, dim=1)


def mixture_network(x: Tensor, timestep: Tensor) -> Tensor:
    a, s = level(SCHEDULE, timestep[0])
    (score,) = torch.autograd.grad(mixture_log_density(x, a, s**2).sum(), x, create_graph=True)
    return -s * score


PLACES = float64(-1.4, 0.5, -0.4, 0.4, 0.5, 0.5, -0.3, -0.8).view(4, 2, 1, 1)
SMOOTHED = mixture_log_density(PLACES, 1.0, SCHEDULE.sigmas[0] ** 2)


def test_a_mixture_has_its_smoothed_density_the_closer_the_finer_the_steps() -> None:
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = ode_likelihood(SCHEDULE, mixture_network, PLACES, "epsilon", rtol=tolerance, atol=tolerance)
        errors.append((found.log_density - SMOOTHED).abs().max().item())
        calls.append(found.calls)
    assert errors[2] < 2e-5 and errors[2] < 0.1 * errors[1] and errors[1] < 0.1 * errors[0]
    assert calls == sorted(calls)


def test_probes_are_right_on_average() -> None:
    """Over all four patterns of signs the mean is the exact density, and no single pattern gives it."""
    points = PLACES.repeat_interleave(4, dim=0)
    probe = float64(1, 1, 1, -1, -1, 1, -1, -1).view(4, 2, 1, 1).repeat(4, 1, 1, 1)
    found = ode_likelihood(SCHEDULE, mixture_network, points, "epsilon", probe=probe, rtol=1e-6, atol=1e-6)
    by_pattern = found.log_density.view(4, 4)
    torch.testing.assert_close(by_pattern.mean(dim=1), SMOOTHED, rtol=0, atol=2e-5)
    assert bool(((by_pattern - SMOOTHED[:, None]).abs() > 1e-2).all())


def test_the_likelihood_in_float32() -> None:
    """And where gradients are off, as in an evaluation; of the network's two halves the variance takes no part."""
    dtypes = []

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return torch.cat([mixture_network(x, timestep), torch.ones_like(x)], dim=1)

    with torch.no_grad():
        found = ode_likelihood(SCHEDULE, network, PLACES.float(), "epsilon")
    assert set(dtypes) == {torch.float32} and found.calls == len(dtypes)
    assert found.log_density.dtype == found.latent.dtype == torch.float64
    torch.testing.assert_close(found.log_density, SMOOTHED, rtol=0, atol=1e-3)


def test_what_has_no_likelihood_is_refused() -> None:
    def refused(message: str, network: Network, kind: PredictionType, schedule: NoiseSchedule = SCHEDULE) -> None:
        with pytest.raises(ValueError, match=message):
            ode_likelihood(schedule, network, PLACES, kind)

    refused("infinite here", lambda x, _: x, "v_prediction", NoiseSchedule.linear().zero_terminal_snr())
    refused("no meaning between two steps", lambda x, _: x, "posterior_mean")
    refused("without torch.no_grad", lambda x, _: x.detach(), "sample")
    refused("not finite at sigma 0.006", lambda x, _: x * math.nan, "epsilon")
