"""DDIM and DDPM steps. Oracles: Gaussian data, whose denoiser, DDIM factor and final variances are known in
closed form; oracle noise; identities between the methods. See also test_golden.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process
from pixart_ft.diffusion.names import PredictionType, StepVariance
from pixart_ft.diffusion.process import Prediction, predict
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.solvers import ddim_encode_step, ddim_step, ddpm_step
from tests.helpers.networks import best_variance_half, left_variance, randn

LINEAR = NoiseSchedule.linear()
Step = Callable[[NoiseSchedule, Prediction, Tensor, Tensor, Tensor], Tensor]
STEPS: dict[str, Step] = {
    "ddim": lambda schedule, prediction, x, t, z: ddim_step(schedule, prediction, x, t),
    "ddim_half": lambda schedule, prediction, x, t, z: ddim_step(schedule, prediction, x, t, eta=0.5, noise=z),
    "ddim_full": lambda schedule, prediction, x, t, z: ddim_step(schedule, prediction, x, t, eta=1.0, noise=z),
    "beta_tilde": lambda schedule, prediction, x, t, z: ddpm_step(schedule, prediction, x, t, noise=z),
    "beta": lambda schedule, prediction, x, t, z: ddpm_step(schedule, prediction, x, t, variance="beta", noise=z),
    "learned": lambda schedule, prediction, x, t, z: ddpm_step(schedule, prediction, x, t, variance="learned", noise=z),
    "greedy": lambda schedule, prediction, x, t, z: ddpm_step(schedule, prediction, x, t, variance="none"),
}


def exact_prediction(schedule: NoiseSchedule, x: Tensor, t: Tensor, mean: float, std: float) -> Prediction:
    """For data N(mean, std^2): E[x0 | x_t] = mean + a std^2 (x_t - a mean) / (a^2 std^2 + s^2)."""
    alpha_bar = process.at(schedule.alpha_bar, t, x)
    a = alpha_bar.sqrt()
    x0 = mean + a * std**2 * (x - a * mean) / (alpha_bar * std**2 + 1 - alpha_bar)
    return predict(schedule, x0, x, t, "sample")


def final_moments(schedule: NoiseSchedule, step: Step, mean: float, std: float) -> tuple[float, float, float]:
    """Factor, mean and variance of x_0 for x_T ~ N(0, 1): exact, for each step is affine in x and noise."""
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    factor, centre, variance = 1.0, 0.0, 1.0
    for index in reversed(range(schedule.num_steps)):
        t = torch.full((3,), index)
        offset, at_one, with_noise = (
            step(schedule, exact_prediction(schedule, x, t, mean, std), x, t, z).flatten().tolist()
        )
        slope = at_one - offset
        factor, centre, variance = (
            slope * factor,
            slope * centre + offset,
            slope**2 * variance + (with_noise - offset) ** 2,
        )
    return factor, centre, variance


@pytest.mark.parametrize(
    ("mean", "std", "count", "factor", "x_0"),
    [
        (0.3, 0.5, 10, 0.3616117227, 0.6609225466),
        (0.3, 0.5, 50, 0.4719151076, 0.7710157104),
        (0.3, 0.5, 100, 0.4858475896, 0.7849216392),
        (-0.2, 1.0, 20, 0.9081977918, 0.7093517149),
        (0.5, 2.0, 100, 1.9697505008, 2.4634937675),
    ],
)
def test_ddim_on_gaussian_data_has_the_closed_form_factor(
    mean: float, std: float, count: int, factor: float, x_0: float
) -> None:
    """One step multiplies x - a mean by sqrt(v'/v) cos(phi - phi'), where phi = atan2(s, a std)."""
    schedule = LINEAR.respaced(count)
    ours, centre, _ = final_moments(schedule, STEPS["ddim"], mean, std)
    a, s = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    phi = torch.cat([torch.zeros(1, dtype=torch.float64), torch.atan2(s, a * std)])
    v_last = (schedule.alpha_bar * std**2 + 1 - schedule.alpha_bar)[-1]
    assert ours == pytest.approx((std / v_last.sqrt() * torch.cos(phi.diff()).prod()).item(), rel=1e-11)
    assert ours == pytest.approx(factor, rel=1e-9) and ours + centre == pytest.approx(x_0, rel=1e-9)


@pytest.mark.parametrize(
    ("std", "count", "beta_tilde", "beta", "ddim", "ddim_half", "greedy"),
    [
        (0.5, 10, 0.10422249, 0.35852122, 0.13076304, 0.12608080, 0.00000252),
        (0.5, 50, 0.19642024, 0.26788287, 0.22270387, 0.21721093, 0.00000252),
        (1.0, 20, 0.70057747, 0.99990000, 0.82482323, 0.79913555, 0.00004036),
        (2.0, 50, 3.54690079, 3.81454423, 3.76171261, 3.71342647, 0.00064558),
    ],
)
def test_final_variance_on_gaussian_data(
    std: float, count: int, beta_tilde: float, beta: float, ddim: float, ddim_half: float, greedy: float
) -> None:
    expected = {
        "beta_tilde": beta_tilde,
        "ddim_full": beta_tilde,
        "beta": beta,
        "ddim": ddim,
        "ddim_half": ddim_half,
        "greedy": greedy,
    }
    schedule = LINEAR.respaced(count)
    for name, variance in expected.items():
        assert final_moments(schedule, STEPS[name], 0.3, std)[2] == pytest.approx(variance, abs=6e-9), name


def test_learned_variance_at_the_optimum_reproduces_the_data() -> None:
    """The true variance of x_{t-1} given x_t is beta tilde + w^2 Var[x0 | x_t]; the last step adds none."""
    schedule, std = LINEAR.respaced(10), 0.5
    half = best_variance_half(LINEAR, torch.tensor(std, dtype=torch.float64))[schedule.timesteps]

    def last(variance: StepVariance) -> float:
        def step(schedule: NoiseSchedule, prediction: Prediction, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            learned = Prediction(prediction.x0, prediction.eps, process.at(half, t, x))
            return ddpm_step(schedule, learned, x, t, variance=variance, noise=z)

        return final_moments(schedule, step, 0.3, std)[2]

    left = left_variance(schedule, torch.tensor(std, dtype=torch.float64))[0].item()
    assert last("learned") + left == pytest.approx(0.25, abs=3e-8)
    assert last("learned_range") + left < 0.24  # the fraction of a thousand steps, read as that of ten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("method", STEPS)
def test_oracle_noise_leads_back_to_x0(
    method: str, name: str, prediction_type: PredictionType, dtype: torch.dtype
) -> None:
    """A network that always knows the noise of the current x reaches x0 from anywhere."""
    schedule = getattr(NoiseSchedule, name)().respaced(20)
    x0, x = randn(2, 4, 2, 2, dtype=dtype), randn(2, 4, 2, 2, seed=1, dtype=dtype)
    to = {"epsilon": process.to_eps, "v_prediction": process.to_v, "sample": process.to_x0}[prediction_type]
    for index in reversed(range(schedule.num_steps)):
        t = torch.full((2,), index)
        output = torch.cat([to(schedule, x0, x, t, "sample"), torch.zeros_like(x)], dim=1)
        noise = randn(2, 4, 2, 2, seed=2 + index, dtype=dtype)
        x = STEPS[method](schedule, predict(schedule, output, x, t, prediction_type), x, t, noise)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)
    assert x.dtype == dtype


@pytest.mark.parametrize("spec", ["1000", "30", "ddim25"])
def test_ddim_with_eta_one_is_ddpm_with_beta_tilde(spec: str) -> None:
    schedule = LINEAR.respaced(spec)
    t = torch.tensor([0, 1, schedule.num_steps // 2, schedule.num_steps - 1])
    x, output, noise = randn(4, 4, 2, 2), randn(4, 4, 2, 2, seed=1), randn(4, 4, 2, 2, seed=2)
    prediction = predict(schedule, output, x, t, "epsilon")
    ddim = ddim_step(schedule, prediction, x, t, eta=1.0, noise=noise)
    torch.testing.assert_close(ddim, ddpm_step(schedule, prediction, x, t, noise=noise), rtol=1e-10, atol=1e-10)


def test_learned_range_ends_are_the_fixed_variances() -> None:
    t, x, noise = torch.tensor([1, 999]), randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    for value, variance in ((-1.0, "beta_tilde"), (1.0, "beta")):
        output = torch.cat([x, torch.full_like(x, value)], dim=1)
        prediction = predict(LINEAR, output, x, t, "epsilon")
        learned = ddpm_step(LINEAR, prediction, x, t, variance="learned", noise=noise)
        torch.testing.assert_close(learned, STEPS[variance](LINEAR, prediction, x, t, noise), rtol=1e-12, atol=1e-12)


def test_no_noise_is_added_at_the_last_step_and_is_at_all_others() -> None:
    t, x = torch.tensor([0, 1, 999]), randn(3, 4, 2, 2)
    prediction = predict(LINEAR, randn(3, 8, 2, 2, seed=1), x, t, "epsilon")
    for name in ("ddim_half", "ddim_full", "beta_tilde", "beta", "learned"):
        quiet = STEPS[name](LINEAR, prediction, x, t, torch.zeros_like(x))
        moved = STEPS[name](LINEAR, prediction, x, t, torch.ones_like(x))
        assert torch.equal(quiet[0], moved[0]) and (moved[1:] > quiet[1:]).all(), name


def test_encoding_and_decoding_return_to_first_order_in_the_step() -> None:
    """The error of the round trip on Gaussian data halves when the step does."""
    errors = []
    for count in (50, 100, 200):
        schedule = LINEAR.respaced(count)
        x = start = torch.full((1, 1, 1, 1), 0.9, dtype=torch.float64)
        for index in range(count - 1):
            t = torch.tensor([index])
            x = ddim_encode_step(schedule, exact_prediction(schedule, x, t, 0.3, 0.5), x, t)
        for index in reversed(range(1, count)):
            t = torch.tensor([index])
            x = ddim_step(schedule, exact_prediction(schedule, x, t, 0.3, 0.5), x, t)
        errors.append((x - start).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.1)


def test_mistakes_are_named() -> None:
    t, x = torch.tensor([5]), randn(1, 4, 2, 2)
    prediction = predict(LINEAR, x, x, t, "epsilon")
    with pytest.raises(ValueError, match=r"eta must be 0 .* got 1\.5"):
        ddim_step(LINEAR, prediction, x, t, eta=1.5, noise=x)
    with pytest.raises(ValueError, match=r"eta must be 0 .* got -1"):
        ddim_step(LINEAR, prediction, x, t, eta=-1.0, noise=x)
    with pytest.raises(ValueError, match=r"eta 0\.5 adds noise"):
        ddim_step(LINEAR, prediction, x, t, eta=0.5)
    with pytest.raises(ValueError, match="variance 'beta' adds noise"):
        ddpm_step(LINEAR, prediction, x, t, variance="beta")
    with pytest.raises(ValueError, match="'learned' needs a network with variance channels"):
        ddpm_step(LINEAR, prediction, x, t, variance="learned", noise=x)
    with pytest.raises(ValueError, match="unknown variance 'small'; choose learned, learned_range, direct, beta_tilde"):
        ddpm_step(LINEAR, prediction, x, t, variance="small", noise=x)  # type: ignore[arg-type]
