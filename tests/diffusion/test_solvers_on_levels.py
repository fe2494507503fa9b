"""Steps on noise levels and on the SDE, the noise passed in; DDIM and DDPM have their own in test_solvers.py.

Oracles: Gaussian data N(mean, std^2), whose flow, denoiser and score are known (the numbers in the tables are those of
an independent float64 implementation); the algebra that ties the six systems together; stationary laws. A step on
such data is affine, so means and variances follow exactly from a few probes: nothing here is a Monte Carlo estimate.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process, solvers
from pixart_ft.diffusion.flow import vp_signal
from pixart_ft.diffusion.names import PredictionType, Predictor
from pixart_ft.diffusion.process import predict
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.sigmas import karras_sigmas, x0_at_sigma
from tests.helpers.networks import randn

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
MEAN, STD = 0.3, 0.5


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def denoised(y: Tensor, sigma: float, mean: float = MEAN, std: float = STD) -> Tensor:
    """E[x0 | y] for y = x0 + sigma eps."""
    return mean + std**2 / (std**2 + sigma**2) * (y - mean)


def flow_errors(count: int) -> tuple[float, float]:
    """Largest error of Euler and of Heun in `count` steps from sigma 80 to 0.002 against the exact flow."""
    grid = karras_sigmas(count + 1, 0.002, 80.0).tolist()
    euler = heun = start = 80 * numbers(1, -0.7, 2.1)
    for sigma, after in pairwise(grid):
        euler = solvers.euler_step(euler, denoised(euler, sigma), sigma, after)
        first = solvers.slope(heun, denoised(heun, sigma), sigma)
        guess = solvers.euler_step(heun, denoised(heun, sigma), sigma, after)
        heun = solvers.heun_step(heun, first, solvers.slope(guess, denoised(guess, after), after), sigma, after)
    exact = MEAN + (start - MEAN) * math.sqrt((STD**2 + 0.002**2) / (STD**2 + 80.0**2))
    return (euler - exact).abs().max().item(), (heun - exact).abs().max().item()


FLOW_ERRORS = {
    8: (3.154767e-01, 2.915381e-01),
    16: (1.705274e-01, 6.592426e-02),
    32: (8.906116e-02, 1.541336e-02),
    64: (4.552085e-02, 3.725819e-03),
    128: (2.301330e-02, 9.159986e-04),
    256: (1.157055e-02, 2.271008e-04),
}


def test_euler_and_heun_err_as_the_closed_form_says_and_fall_at_their_orders() -> None:
    errors = {count: flow_errors(count) for count in FLOW_ERRORS}
    for count, expected in FLOW_ERRORS.items():
        assert errors[count] == pytest.approx(expected, rel=1e-6), count
    for coarse, fine in ((64, 128), (128, 256)):
        euler, heun = (math.log2(a / b) for a, b in zip(errors[coarse], errors[fine]))
        assert euler == pytest.approx(1, abs=0.1) and heun == pytest.approx(2, abs=0.1)


def test_a_step_to_no_noise_gives_the_guess_of_x0_itself() -> None:
    y, guess = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    assert torch.equal(solvers.euler_step(y, guess, 157.0, 0.0), guess)
    assert torch.equal(solvers.euler_ancestral_step(y, guess, 157.0, 0.0, eta=1.0), guess)


@pytest.mark.parametrize("schedule", [LINEAR.respaced(20), COSINE.respaced("ddim20")], ids=["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_ancestral_is_ddim_and_at_eta_one_ddpm_in_other_variables(schedule: NoiseSchedule, eta: float) -> None:
    """y = x_t / sqrt(alpha_bar), the same noise, a network that bends: equal at each of the 20 steps."""
    x = ddpm = randn(2, 4, 3, 3)
    levels = [0.0, *schedule.sigmas.tolist()]
    y = x * math.sqrt(1 + levels[-1] ** 2)
    for index in reversed(range(schedule.num_steps)):
        t, noise, sigma = torch.full((2,), index), randn(2, 4, 3, 3, seed=index + 1), levels[index + 1]

        def guess(x: Tensor, t: Tensor = t) -> process.Prediction:
            return predict(schedule, torch.tanh(x) + 0.001 * t[0], x, t, "epsilon")

        at_y = guess(y / math.sqrt(1 + sigma**2)).x0
        assert torch.allclose(at_y, x0_at_sigma(guess(y / math.sqrt(1 + sigma**2)).eps, y, sigma, "epsilon"))
        x = solvers.ddim_step(schedule, guess(x), x, t, eta=eta, noise=noise)
        ddpm = solvers.ddpm_step(schedule, guess(ddpm), ddpm, t, noise=noise)
        y = solvers.euler_ancestral_step(y, at_y, sigma, levels[index], eta=eta, noise=noise)
        torch.testing.assert_close(y / math.sqrt(1 + levels[index] ** 2), x, rtol=1e-9, atol=1e-9)
        if eta == 1:
            torch.testing.assert_close(ddpm, x, rtol=1e-9, atol=1e-9)


def test_ancestral_step_of_the_sde_is_ddpm_with_variance_beta() -> None:
    """(x + beta score) / sqrt(alpha) is the posterior's mean at the guess of x0 (Ho et al. 2020, eq. 11)."""
    schedule = LINEAR.respaced(20)
    x, output, noise = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), randn(3, 4, 2, 2, seed=2)
    for index in (1, 10, 19):
        t = torch.full((3,), index)
        score = process.to_score(schedule, output, x, t, "epsilon")
        ours = solvers.sde_step("ancestral", x, score, schedule.betas[index].item(), noise)
        prediction = predict(schedule, output, x, t, "epsilon")
        ddpm = solvers.ddpm_step(schedule, prediction, x, t, variance="beta", noise=noise)
        torch.testing.assert_close(ours, ddpm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
def test_one_step_of_the_sde_is_its_drift_and_diffusion_to_first_order(predictor: Predictor) -> None:
    """x + beta (x/2 + score) + sqrt(beta) noise, up to beta^2: the rest falls a hundredfold when beta does tenfold."""
    x, score, noise = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1), randn(1, 4, 2, 2, seed=2)
    rest = []
    for beta in (1e-2, 1e-3):
        step = solvers.sde_step(predictor, x, score, beta, noise) - math.sqrt(beta) * noise
        assert torch.allclose(step, solvers.sde_step(predictor, x, score, beta))  # the mean
        rest.append((step - (x + beta * (0.5 * x + score))).abs().max().item())
    assert (rest[0] < 1e-15) if predictor == "euler_maruyama" else (rest[0] / rest[1] == pytest.approx(100, rel=0.05))


def final_variance(step: Callable[[Tensor, int, Tensor], Tensor], count: int) -> float:
    """Variance after `count` affine steps (sample, number, noise) from N(0, 1)."""
    x, z, variance = numbers(0, 1, 0), numbers(0, 0, 1), 1.0
    for number in range(count):
        offset, at_one, with_noise = step(x, number, z).flatten().tolist()
        variance = (at_one - offset) ** 2 * variance + (with_noise - offset) ** 2
    return variance


# (steps, std): Euler-Maruyama, reverse diffusion, ancestral, probability flow by Euler
SDE_VARIANCES = {
    (50, 0.5): (0.258975, 0.263461, 0.250768, 0.250798),
    (50, 1.0): (1.028916, 1.061138, 1.000000, 1.000000),
    (50, 2.0): (4.007702, 4.281242, 4.119745, 3.833421),
    (100, 0.5): (0.254206, 0.257152, 0.250831, 0.250148),
    (100, 1.0): (1.014208, 1.029161, 1.000000, 1.000000),
    (100, 2.0): (4.005367, 4.123670, 4.049546, 3.918009),
    (500, 0.5): (0.250762, 0.252542, 0.251280, 0.249806),
    (500, 1.0): (1.002804, 1.005637, 1.000000, 1.000000),
    (500, 2.0): (4.003526, 4.013753, 3.999778, 3.987191),
}


@pytest.mark.parametrize(("count", "std"), SDE_VARIANCES)
def test_final_variances_of_the_continuous_process_in_its_authors_discretisation(count: int, std: float) -> None:
    """beta from 0.1 to 20, times linspace(1, 1e-3, N), steps of 1/N, with noise at the last (Song et al. 2021b)."""
    times = torch.linspace(1, 1e-3, count, dtype=torch.float64)
    continuous = ((0.1 + 19.9 * times) / count).tolist()
    table = torch.linspace(0.1 / count, 20 / count, count, dtype=torch.float64)
    discrete = table[(times * (count - 1)).long()].tolist()
    alpha_bar = (vp_signal(times) ** 2).tolist()

    def score(x: Tensor, number: int) -> Tensor:
        return -x / (alpha_bar[number] * std**2 + 1 - alpha_bar[number])

    def sde(predictor: Predictor, betas: list[float]) -> float:
        return final_variance(
            lambda x, number, z: solvers.sde_step(predictor, x, score(x, number), betas[number], z), count
        )

    found = (
        sde("euler_maruyama", continuous),
        sde("reverse_diffusion", discrete),
        sde("ancestral", discrete),
        final_variance(lambda x, number, z: solvers.pf_ode_step(x, score(x, number), continuous[number]), count),
    )
    assert found == pytest.approx(SDE_VARIANCES[count, std], abs=6e-7)


@pytest.mark.parametrize(("size", "expected"), [(0.01, 0.705036), (0.05, 0.725926), (0.1, 0.753846), (0.3, 0.890909)])
def test_langevin_has_its_stationary_law(size: float, expected: float) -> None:
    """On N(mean, v): contraction 1 - e/v, mean kept, variance v / (1 - e / (2 v)), which is more than v."""
    v = 0.7
    offset, at_one, with_noise = (
        solvers.langevin_step(numbers(0, 1, 0), -(numbers(0, 1, 0) - MEAN) / v, size, numbers(0, 0, 1))
        .flatten()
        .tolist()
    )
    contraction, noise = at_one - offset, with_noise - offset
    assert contraction == pytest.approx(1 - size / v, rel=1e-12)
    assert offset / (1 - contraction) == pytest.approx(MEAN, rel=1e-12)
    assert noise**2 / (1 - contraction**2) == pytest.approx(v / (1 - size / (2 * v)), rel=1e-12)
    assert noise**2 / (1 - contraction**2) == pytest.approx(expected, abs=6e-7)


def test_langevin_step_size_is_two_alpha_snr_squared_of_each_sample_or_of_the_means() -> None:
    score = torch.stack([torch.full((4, 1, 1), value) for value in (1.0, 3.0, 0.0)]).double()  # norms 2, 6, 0
    noise = torch.stack([torch.full((4, 1, 1), value) for value in (2.0, 3.0, 1.0)]).double()  # norms 4, 6, 2
    own = solvers.langevin_step_size(score, noise, 0.9, 0.16)
    assert own.shape == (3, 1, 1, 1)
    assert own.flatten().tolist() == pytest.approx([2 * 0.9 * (0.16 * 2) ** 2, 2 * 0.9 * 0.16**2, 0])
    means = solvers.langevin_step_size(score, noise, 0.9, 0.16, "batch_mean")
    assert means.flatten().tolist() == pytest.approx([2 * 0.9 * (0.16 * 12 / 8) ** 2] * 3)
    moved = solvers.langevin_step(numbers(1, 1, 1), numbers(2, 2, 2), own, numbers(1, 1, 1)).flatten()
    assert moved.tolist() == pytest.approx([1 + 2 * e + math.sqrt(2 * e) for e in own.flatten().tolist()])


def test_churn_raises_the_level_by_as_much_as_its_noise_does() -> None:
    assert solvers.churned_sigma(3.0, 40, 4.0, 0.05, 50.0) == pytest.approx(3 * 1.1)
    assert solvers.churned_sigma(3.0, 10, 40.0, 0.05, 50.0) == pytest.approx(3 * math.sqrt(2))  # the cap
    for edge in (0.05, 50.0):
        assert solvers.churned_sigma(edge, 40, 4.0, 0.05, 50.0) == pytest.approx(edge * 1.1)
    for outside in (0.0499, 50.01):
        assert solvers.churned_sigma(outside, 40, 4.0, 0.05, 50.0) == outside
    y, noise = numbers(1.0), numbers(2.0)
    assert solvers.churn(y, 3.0, 5.0, 1.0, noise).item() == pytest.approx(1 + 4 * 2)
    assert solvers.churn(y, 3.0, 5.0, 1.007, noise).item() == pytest.approx(1 + 4 * 1.007 * 2)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_split_keeps_the_level_and_adds_ddims_noise(eta: float) -> None:
    schedule = LINEAR.respaced(20)
    std = solvers.ddim_sigma(schedule, eta)
    for index in range(1, 20):
        sigma, after = schedule.sigmas[index].item(), schedule.sigmas[index - 1].item()
        down, up = solvers.ancestral_split(sigma, after, eta)
        assert math.hypot(down, up) == pytest.approx(after, rel=1e-12)
        assert up == pytest.approx((std[index] / schedule.alpha_bar[index - 1].sqrt()).item(), rel=1e-9, abs=1e-15)
    assert solvers.ancestral_split(2.0, 0.0, eta) == (0, 0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sigma", [0.01, 0.777, 157.0, 2e4])
def test_x0_is_read_from_every_kind_of_output_at_any_level(kind: PredictionType, sigma: float) -> None:
    x0, eps, half = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), randn(2, 4, 3, 3, seed=2)
    a = 1 / math.sqrt(1 + sigma**2)
    output = {"epsilon": eps, "v_prediction": a * eps - sigma * a * x0, "sample": x0}[kind]
    for given in (output, torch.cat([output, half], dim=1)):
        found = x0_at_sigma(given, x0 + sigma * eps, sigma, kind)
        torch.testing.assert_close(found, x0, rtol=1e-10, atol=1e-10)
    rounded = x0_at_sigma(output.bfloat16(), (x0 + sigma * eps).bfloat16(), sigma, kind)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda y: solvers.sde_step("heun", y, y, 0.1), "unknown predictor 'heun'; choose euler_maruyama"),  # type: ignore[arg-type]
        (lambda y: solvers.euler_ancestral_step(y, y, 2.0, 1.0, eta=0.5), r"eta 0\.5 adds noise .* pass noise"),
        (lambda y: solvers.langevin_step_size(y, y, 1.0, 0.1, "mean"), "unknown norms 'mean'; choose per_sample"),  # type: ignore[arg-type]
        (lambda y: x0_at_sigma(y, y, 1.0, "posterior_mean"), "posterior_mean has no meaning between two steps"),
        (lambda y: x0_at_sigma(y[:, :3], y, 1.0, "epsilon"), "must give 4 or 8, got 3"),
    ],
)
def test_mistakes_are_named(ask: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(randn(1, 4, 2, 2))
