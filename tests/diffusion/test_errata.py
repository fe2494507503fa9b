"""The misprints of the two papers the package is built on: ours is the corrected formula, the printed one is not.

Oracle: an independent list of errata and the numbers in it. A is Su, "Topics on Diffusion Generative Models"; B is
Kuppa, "Diffusion Model Training"; the letters and numbers are those of that list. Where it gives numbers, A has Su's
own schedule at index 400, B the linear one at index 300 with x0 = 0.8 and eps = -0.3; elsewhere three steps do.
"""

import math

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process, solvers
from pixart_ft.diffusion.names import Quantity
from pixart_ft.diffusion.objectives import su_factors, su_term, vlb_term
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.weighting import loss_weights

LINEAR, SU, COSINE = NoiseSchedule.linear(), NoiseSchedule.su_linear(), NoiseSchedule.cosine()
THREE = NoiseSchedule.from_betas([0.1, 0.2, 0.3])
K = torch.tensor([300])
BETA, ALPHA, BEFORE = LINEAR.betas[300].item(), LINEAR.alphas[300].item(), LINEAR.alphas[299].item()
BAR, BAR_PREV = LINEAR.alpha_bar[300].item(), LINEAR.alpha_bar_prev[300].item()


def number(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def near(digits: float) -> object:
    """A number of the errata, which gives three digits or more."""
    return pytest.approx(digits, rel=2e-3)


def posterior(schedule: NoiseSchedule, t: int) -> tuple[float, float, float]:
    """The weights of x_t and of x0 in the posterior's mean, and its variance."""
    index = torch.tensor([t])
    of_x0 = process.q_posterior(schedule, number(1), number(0), index)
    of_xt = process.q_posterior(schedule, number(0), number(1), index)
    return of_xt.mean.item(), of_x0.mean.item(), of_x0.variance.item()


def test_a1_squares_of_the_amplitudes_add_up() -> None:
    amplitudes = torch.eye(4, dtype=torch.float64)  # of x0 and of the three noises, each followed through the steps
    x = amplitudes[:, :1]
    for index in range(3):
        x = process.q_step(THREE, x, torch.full((4,), index), amplitudes[:, index + 1 : index + 2])
    assert (x**2).sum().item() == pytest.approx(1)
    assert (x[1:] ** 2).sum().item() == pytest.approx(1 - THREE.alpha_bar[2].item())
    assert x[1:].sum().item() == near(1.1585)  # as printed: unsquared, and without x0, they would add up to 1


def test_a2_a_step_from_the_accumulated_noise_keeps_the_cumulative_signal() -> None:
    x_before = process.q_sample(THREE, number(1), torch.tensor([1]), number(0))
    signal = process.q_step(THREE, x_before, torch.tensor([2]), number(0)).item()
    assert signal == pytest.approx(math.sqrt(0.9 * 0.8 * 0.7))
    assert abs(signal - math.sqrt(0.7)) > 0.1  # as printed


def test_a3_the_two_noises_are_rotated() -> None:
    before, step = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)
    eps, rest = process.merge_noises(SU, before, step, torch.tensor([400, 400]))
    rotation = torch.stack([eps, rest]).view(2, 2)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2, dtype=torch.float64))
    back = process.merge_noises(SU, eps, rest, torch.tensor([400, 400]))
    torch.testing.assert_close(torch.stack(back), torch.stack([before, step]))


def test_a4_the_constant_of_the_reduced_loss() -> None:
    """A network that says the accumulated noise exactly is left with what the rest holds of the step's noise."""
    noised = process.Noised.of(SU, number(0.8), torch.tensor([400]), number(-0.3))
    left = su_term(SU, number(-0.3), noised, number(1), "epsilon", "su_noises")
    alpha, bar, bar_prev = (table[400].item() for table in (SU.alphas, SU.alpha_bar, SU.alpha_bar_prev))
    assert left.item() == pytest.approx(alpha * (1 - bar_prev) / (1 - bar), rel=1e-12)
    assert left.item() == pytest.approx(su_factors(SU)["constant"][400].item(), rel=1e-12)


def test_a5_an_accumulated_noise_network_is_scaled_before_it_is_subtracted() -> None:
    """Variance of 1000 steps on Gaussian data of variance 0.25, noise beta at all but the last."""
    t, x = torch.arange(1000), torch.ones(1000, 1, dtype=torch.float64)
    eps = ((1 - SU.alpha_bar).sqrt() / (0.25 * SU.alpha_bar + 1 - SU.alpha_bar)).view(-1, 1)

    def final_variance(kind: Quantity) -> float:
        slopes, variance = process.to_posterior_mean(SU, eps, x, t, kind).flatten().tolist(), 1.0
        for index in reversed(range(1000)):
            variance = slopes[index] ** 2 * variance + (SU.betas[index].item() if index else 0.0)
        return variance

    assert final_variance("epsilon") == near(0.2508)
    assert final_variance("step_noise") == pytest.approx(0.0304, abs=1e-4)  # as printed: read as the step's own


def test_a6_a7_sus_schedule() -> None:
    amplitude = SU.alpha_bar[-1].sqrt().item()
    assert amplitude == near(6.482e-3) and math.log(amplitude) == near(-5.0387)
    assert math.log(amplitude) < -0.005 * 1001 and amplitude**2 == near(4.20e-5)
    assert amplitude > 100 * 1e-5  # as printed
    # It is not Ho's, beyond 3.5 percent up to t = 100.
    ratio = LINEAR.betas / SU.betas
    assert SU.betas[0].item() == pytest.approx(2e-5) and LINEAR.betas[0].item() == pytest.approx(1e-4)
    assert (ratio[:99] > 1.035).all() and (ratio[100:] < 1.036).all()
    # A7b: the 0.02 is for 1000 steps; a hundred of them leave 60 percent of the signal.
    assert NoiseSchedule.su_linear(100).alpha_bar[-1].sqrt().item() == pytest.approx(0.60, abs=5e-3)
    assert NoiseSchedule.su_linear(100, rescale=True).alpha_bar[-1].sqrt().item() < 0.01


def test_a8_the_weight_of_the_divergence_is_in_variances() -> None:
    bound = loss_weights(SU, "elbo", "epsilon")[400].item() * 0.7**2
    alpha, bar = SU.alphas[400].item(), SU.alpha_bar[400].item()
    variance = SU.posterior_variance[400].item()
    assert bound == near(0.0024767)
    assert (1 - alpha) ** 2 / (alpha * (1 - bar)) / (2 * variance) * 0.7**2 == near(0.0024767)
    # as printed, read in the paper's own amplitudes
    alpha, bar = alpha**0.5, bar**0.5
    assert (1 - alpha) ** 2 / (alpha * (1 - bar)) / (2 * variance) * 0.7**2 == near(0.000895)


def test_b1_a_state_depends_on_both_neighbours() -> None:
    """q(x_t | x_{t-1}, x_{t+1}) is the posterior of a process of these two steps that starts at x_{t-1}."""
    of_next, of_previous, variance = posterior(NoiseSchedule.from_betas([0.1, 0.2]), 1)
    assert (of_previous, of_next) == (near(0.678), pytest.approx(0.319, abs=5e-4))
    assert variance == pytest.approx(0.1 * 0.2 / 0.28)
    assert math.sqrt(0.9) == near(0.949)  # as printed: q(x_t | x_{t-1}), with nothing of x_{t+1}


def test_b2_bayes_rule_has_the_marginal_of_x_t_once() -> None:
    def density(x: Tensor, mean: Tensor, variance: float) -> float:
        return torch.distributions.Normal(mean, variance**0.5).log_prob(x).exp().item()

    x0, x_before, x_t, t = number(0.8), number(0.1), number(0.5), torch.tensor([2])
    backward = process.q_posterior(THREE, x0, x_t, t)
    step = density(x_t, process.q_step(THREE, x_before, t, number(0)), 0.3)
    before = density(x_before, process.q_sample(THREE, x0, t - 1, number(0)), 1 - 0.72)
    marginal = density(x_t, process.q_sample(THREE, x0, t, number(0)), 1 - 0.504)
    ours = density(x_before, backward.mean, backward.variance.item())
    assert step * before / marginal == pytest.approx(ours)
    assert abs(step * before / marginal**2 / ours - 1) > 0.5  # as printed


def test_b3_the_posterior() -> None:
    of_xt, of_x0, variance = posterior(LINEAR, 300)
    assert (of_xt, of_x0, variance) == (near(0.992995), near(0.0063129), near(0.00605183))
    # as printed, alpha per step and alpha cumulative
    for alpha, before, weights, spread in (
        (ALPHA, BEFORE, (0.993689, 0.996967), 0.00303),
        (BAR, BAR_PREV, (0.6252, 0.6296), 0.370),
    ):
        printed = ((1 - before) * alpha**0.5 / (1 - alpha), before**0.5)
        assert printed == (near(weights[0]), near(weights[1]))
        assert (1 - alpha) * (1 - before**0.5) / (1 - alpha) == near(spread)
        assert abs(before**0.5 - of_x0) > 0.5 and abs(spread - variance) > 0.003
    assert near(0.00371) == BETA * (1 - BAR_PREV**0.5) / (1 - BAR)  # B3b: the bars put back alone


def test_b4_the_weight_on_x0() -> None:
    assert loss_weights(LINEAR, "elbo", "sample")[300].item() == near(0.0032926)
    variance = LINEAR.posterior_variance[300].item()
    assert BEFORE / (2 * variance) == near(82.1) and BAR_PREV / (2 * variance) == near(32.8)  # as printed
    # B4b: the first posterior variance is 0, so the decoder's is borrowed from the second.
    assert LINEAR.posterior_variance[0] == 0
    assert loss_weights(LINEAR, "elbo", "sample")[0].item() == pytest.approx(0.5 / LINEAR.posterior_variance[1].item())


def test_b5_the_mean_from_the_noise() -> None:
    x_t = process.q_sample(LINEAR, number(0.8), K, number(-0.3))
    assert process.to_posterior_mean(LINEAR, number(-0.3), x_t, K, "epsilon").item() == near(0.271795)
    # as printed, per step and cumulative: the second is x0
    for alpha, value in ((ALPHA, 0.292902), (BAR, 0.8)):
        printed = x_t.item() / alpha**0.5 + 0.3 * (1 - alpha) / (alpha * (1 - alpha)) ** 0.5
        assert printed == near(value)
    # B5b: the weight on the eps error
    assert loss_weights(LINEAR, "elbo", "epsilon")[300].item() == near(0.0050640)
    assert BETA**2 / (ALPHA * BETA) / (2 * LINEAR.posterior_variance[300].item()) == near(0.50506)  # as printed


def test_b6_ddim_keeps_the_marginals_at_every_eta() -> None:
    schedule, zero = LINEAR.respaced(50), torch.zeros(50, 1, dtype=torch.float64)
    t, one = torch.arange(50), torch.ones(50, 1, dtype=torch.float64)
    sigma = solvers.ddim_sigma(schedule, 1.0)
    a, s = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    a_prev, s_prev = schedule.alpha_bar_prev.sqrt(), (1 - schedule.alpha_bar_prev).sqrt()
    # Data of variance 1, whose best prediction of x0 is a x_t: how one step carries x_t on, and the whole chain.
    prediction = process.predict(schedule, a.view(-1, 1), one, t, "sample")
    ours = solvers.ddim_step(schedule, prediction, one, t, eta=1.0, noise=zero).flatten()
    printed = a_prev * a + s_prev * s
    ours_variance = printed_variance = 1.0
    for index in reversed(range(50)):
        ours_variance = ours[index].item() ** 2 * ours_variance + sigma[index].item() ** 2
        printed_variance = printed[index].item() ** 2 * printed_variance + sigma[index].item() ** 2
    assert ours_variance == near(0.855) and printed_variance == near(8.97)
    # One step at index 300 from known x0 = 0: what it keeps of eps = 1, and what it adds.
    x_t = process.q_sample(LINEAR, number(0), K, number(1))
    prediction = process.predict(LINEAR, number(0), x_t, K, "sample")
    kept = solvers.ddim_step(LINEAR, prediction, x_t, K, eta=1.0, noise=number(0)).item()
    added = solvers.ddim_step(LINEAR, prediction, x_t, K, eta=1.0, noise=number(1)).item() - kept
    assert kept**2 + added**2 == near(0.60358) and near(0.60358) == 1 - BAR_PREV
    assert 1 - BAR_PREV + added**2 == near(0.60963)  # as printed


@pytest.mark.parametrize(("num_steps", "ratio"), [(100, 0.25), (1000, 0.455), (10_000, 0.495)])
def test_b8_beta_tilde_does_not_tend_to_beta(num_steps: int, ratio: float) -> None:
    schedule = NoiseSchedule.linear(num_steps)
    assert (schedule.posterior_variance[1] / schedule.betas[1]).item() == pytest.approx(ratio, abs=1e-3)


def test_b8b_the_best_variance_leaves_the_range_for_wide_data() -> None:
    """Where between beta tilde (0) and beta (1) the variance of p(x_{t-1} | x_t) lies for data of this deviation."""
    for std, low, high in ((0.5, 0.25, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0, 4.0)):
        spread = std**2 * (1 - LINEAR.alpha_bar) / (LINEAR.alpha_bar * std**2 + 1 - LINEAR.alpha_bar)  # Var[x0 | x_t]
        best = LINEAR.posterior_variance + LINEAR.posterior_x0_weight**2 * spread
        fraction = (best - LINEAR.posterior_variance) / (LINEAR.betas - LINEAR.posterior_variance)
        assert (fraction.min().item(), fraction.max().item()) == (near(low), near(high))


def test_b10_the_learned_range_maps_minus_1_to_1_and_is_finite_at_the_first_step() -> None:
    def variance(learned_range: float, t: int) -> float:
        return process.learned_log_variance(LINEAR, number(learned_range), torch.tensor([t])).exp().item()

    tilde = LINEAR.posterior_variance[300].item()
    assert variance(-1, 300) == pytest.approx(tilde) and variance(1, 300) == pytest.approx(BETA)
    assert variance(0, 300) == pytest.approx(math.sqrt(tilde * BETA))  # as printed, 0 would be beta tilde itself
    assert variance(-1, 0) == pytest.approx(LINEAR.posterior_variance[1].item())


def test_b11_the_bound_is_a_mean_over_dimensions_in_bits() -> None:
    """Right mean, variance beta: (r - 1 - log r) / 2 nats in each dimension, however many there are."""
    ratio = LINEAR.posterior_variance[1].item() / LINEAR.betas[1].item()
    nats = 0.5 * (ratio - 1 - math.log(ratio))
    for size in (1, 4):
        x0 = number(0.8).expand(1, 1, size, size)
        noised = process.Noised.of(LINEAR, x0, torch.tensor([1]), -0.3 * torch.ones_like(x0))
        bits = vlb_term(LINEAR, x0, noised, "sample", variance="beta").item()
        assert bits / nats == near(1.4427)


def test_b12_the_cosine_schedule() -> None:
    t = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008 * math.pi) / 1.008 * math.pi / 2) ** 2  # as printed
    printed = 1 - f[1:] / f[:-1]
    assert t[f.argmin()].item() == near(0.983) and (f[-1] / f[0]).item() == pytest.approx(7.1e-4, rel=1e-2)
    assert (printed < 0).sum() == 17 and printed.min().item() == near(-71.8)
    assert printed[0] > 2.5 * COSINE.betas[0] and (COSINE.betas > 0).all()
    # B12b: the first noise stays below a step of 8-bit data; the cap leaves a little signal at the end.
    assert COSINE.betas[0].sqrt().item() == near(6.43e-3) and 6.43e-3 < 1 / 127.5
    assert NoiseSchedule.cosine(4000).betas[0].sqrt().item() == near(3.14e-3)
    assert COSINE.alpha_bar[-1].item() == near(2.43e-9)
