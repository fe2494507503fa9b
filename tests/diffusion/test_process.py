"""The process and its conversions. Oracles: closed forms, round trips in float64. See also test_golden.py."""

import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process
from pixart_ft.diffusion.names import PredictionType, Quantity, Variance
from pixart_ft.diffusion.schedules import NoiseSchedule
from tests.helpers.networks import randn

CONVERSIONS: dict[Quantity, Callable[[NoiseSchedule, Tensor, Tensor, Tensor, Quantity], Tensor]] = {
    "epsilon": process.to_eps,
    "sample": process.to_x0,
    "v_prediction": process.to_v,
    "posterior_mean": process.to_posterior_mean,
    "score": process.to_score,
    "step_noise": process.to_step_noise,
}


SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "su_linear": NoiseSchedule.su_linear(),
    "respaced": NoiseSchedule.linear().respaced(20),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(CONVERSIONS, 2)))
def test_round_trip_over_every_ordered_pair(name: str, source: Quantity, target: Quantity) -> None:
    schedule = SCHEDULES[name]
    last = schedule.num_steps - 1
    t = torch.tensor([0, 1, last // 2, last - 1, last])
    x0, eps = randn(5, 4, 2, 2), randn(5, 4, 2, 2, seed=1)
    x_t = process.q_sample(schedule, x0, t, eps)
    value = CONVERSIONS[source](schedule, eps, x_t, t, "epsilon")
    there = CONVERSIONS[target](schedule, value, x_t, t, source)
    back = CONVERSIONS[source](schedule, there, x_t, t, target)
    # Values pass through divisions by as little as 5e-5 on the way: four of sixteen digits may go.
    torch.testing.assert_close(back, value, rtol=1e-10, atol=1e-10)
    direct = CONVERSIONS[target](schedule, x0, x_t, t, "sample")
    torch.testing.assert_close(there, direct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(["sample", "v_prediction", "posterior_mean"], CONVERSIONS))
)
def test_without_signal_whatever_determines_x0_determines_the_rest(source: Quantity, target: Quantity) -> None:
    schedule, t = NoiseSchedule.linear().zero_terminal_snr(), torch.tensor([500, 998, 999])
    x0, eps = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    x_t = process.q_sample(schedule, x0, t, eps)
    value = CONVERSIONS[source](schedule, x0, x_t, t, "sample")
    there = CONVERSIONS[target](schedule, value, x_t, t, source)
    torch.testing.assert_close(there, CONVERSIONS[target](schedule, x0, x_t, t, "sample"), rtol=1e-10, atol=1e-10)


def test_kinds_by_their_definitions() -> None:
    """Signal 0.64 and noise 0.36 at index 1, of which the step's own noise is 0.2: everything by hand."""
    schedule, t = NoiseSchedule.from_betas([0.2, 0.2]), torch.tensor([1])
    x0, eps = torch.full((1, 1), 2.0, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)
    x_t = process.q_sample(schedule, x0, t, eps)
    expected = {
        "epsilon": 0.5,
        "sample": 2.0,
        "v_prediction": 0.8 * 0.5 - 0.6 * 2.0,
        "posterior_mean": (0.8**0.5 * 0.2 * 2.0 + 0.8**0.5 * 0.2 * 1.9) / 0.36,
        "score": -0.5 / 0.6,
        "step_noise": (0.2 / 0.36) ** 0.5 * 0.5,
    }
    assert x_t.item() == pytest.approx(0.8 * 2.0 + 0.6 * 0.5, rel=1e-14)
    for kind, convert in CONVERSIONS.items():
        assert convert(schedule, x0, x_t, t, "sample").item() == pytest.approx(expected[kind], rel=1e-14)


def test_single_steps_add_up_to_the_jump() -> None:
    """Steps with noises e_1, e_2, ... give the jump's signal, and noise variances that add up to 1 - alpha_bar."""
    schedule = NoiseSchedule.linear(30, rescale=True)
    x = torch.zeros(31, 1, dtype=torch.float64)
    x[30] = 1.0  # row 30 carries the signal, row i the noise of step i alone
    for index in range(30):
        noise = torch.zeros(31, 1, dtype=torch.float64)
        noise[index] = 1.0
        x = process.q_step(schedule, x, torch.full((31,), index), noise)
        torch.testing.assert_close(x[30, 0] ** 2, schedule.alpha_bar[index], rtol=1e-12, atol=0)
        torch.testing.assert_close((x[:30] ** 2).sum(), 1 - schedule.alpha_bar[index], rtol=1e-12, atol=0)


def test_posterior_is_consistent_with_the_marginals() -> None:
    """Averaged over x_t, q(x_{t-1} | x_t, x0) is q(x_{t-1} | x0): in mean and in variance, at every t."""
    schedule = NoiseSchedule.linear(100, rescale=True)
    t, one = torch.arange(100), torch.ones(100, 1, dtype=torch.float64)
    posterior = process.q_posterior(schedule, one, schedule.alpha_bar.sqrt()[:, None] * one, t)
    slope = process.q_posterior(schedule, 0 * one, one, t).mean
    previous = schedule.alpha_bar_prev[:, None]
    torch.testing.assert_close(posterior.mean, previous.sqrt(), rtol=1e-12, atol=0)
    spread = posterior.variance + slope**2 * (1 - schedule.alpha_bar[:, None])
    torch.testing.assert_close(spread, 1 - previous, rtol=1e-10, atol=1e-15)


def test_posterior_of_two_given_steps() -> None:
    """Bayes' rule with the numbers worked out by hand: signal 0.9 before, step 0.8, so alpha_bar 0.72."""
    schedule = NoiseSchedule.from_betas([0.1, 0.2])
    x0, x_t = (
        torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64),
        torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64),
    )
    posterior = process.q_posterior(schedule, x0, x_t, torch.tensor([1]))
    precision = 1 / 0.1 + 0.8 / 0.2
    assert posterior.variance.item() == pytest.approx(1 / precision, rel=1e-12)
    assert posterior.mean.item() == pytest.approx((0.9**0.5 * 2 / 0.1 + 0.8**0.5 * 1 / 0.2) / precision, rel=1e-12)


def test_merged_noises_are_an_orthogonal_rotation_that_keeps_x_t() -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([0, 500, 999])
    before, step, x0 = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), randn(3, 4, 2, 2, seed=2)
    eps, w = process.merge_noises(schedule, before, step, t)
    torch.testing.assert_close(eps**2 + w**2, before**2 + step**2, rtol=1e-10, atol=1e-12)
    alpha, alpha_bar_prev, beta = (
        process.at(table, t, x0) for table in (schedule.alphas, schedule.alpha_bar_prev, schedule.betas)
    )
    two_steps = alpha.sqrt() * (alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev).sqrt() * before) + beta.sqrt() * step
    torch.testing.assert_close(process.q_sample(schedule, x0, t, eps), two_steps, rtol=1e-10, atol=1e-12)


def test_learned_range_ends_and_middle() -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([0, 1, 999])
    low = schedule.posterior_log_variance[t].view(3, 1, 1, 1)
    high = schedule.betas[t].log().view(3, 1, 1, 1)
    for value, expected in ((-1.0, low), (0.0, (low + high) / 2), (1.0, high), (3.0, 2 * high - low)):
        learned_range = torch.full((3, 1, 1, 1), value, dtype=torch.float64)
        ours = process.learned_range_log_variance(schedule, learned_range, t)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)


def test_learned_range_is_that_of_the_respaced_process() -> None:
    """Fewer steps are larger steps: their own beta and beta tilde, not those of the original at the same timestep."""
    respaced, t = NoiseSchedule.linear().respaced(20), torch.tensor([10, 10])
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    bar_prev, bar = respaced.alpha_bar[9:11].tolist()
    beta = 1 - bar / bar_prev
    expected = torch.tensor([[beta * (1 - bar_prev) / (1 - bar)], [beta]], dtype=torch.float64)
    ours = process.learned_range_log_variance(respaced, ends, t).exp()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_fixed_variances_are_finite_and_differ_by_the_posteriors_ratio() -> None:
    schedule = NoiseSchedule.linear()
    small = process.fixed_log_variance(schedule, "beta_tilde")
    large = process.fixed_log_variance(schedule, "beta")
    assert small[0] == large[0] == schedule.posterior_variance[1].log()
    torch.testing.assert_close(large[1:].exp(), schedule.betas[1:])
    ratio = (1 - schedule.alpha_bar_prev) / (1 - schedule.alpha_bar)
    torch.testing.assert_close((small - large)[1:].exp(), ratio[1:], rtol=1e-12, atol=0)
    assert process.fixed_log_variance(NoiseSchedule.from_betas([0.5]), "beta").exp().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="unknown fixed variance 'large'; choose beta_tilde or beta"):
        process.fixed_log_variance(schedule, "large")  # type: ignore[arg-type]


def test_the_network_receives_the_timesteps_of_its_own_process() -> None:
    linear, t = NoiseSchedule.linear(), torch.tensor([0, 10, 19])
    whole = process.network_timesteps(linear.respaced(20), t)
    assert whole.dtype == torch.int64 and whole.tolist() == [0, 526, 999]
    with pytest.warns(UserWarning):
        matched = NoiseSchedule.cosine(20).matched_to(linear)
    fractional = process.network_timesteps(matched, t)
    # Half precision could not tell neighbouring timesteps apart.
    assert fractional.dtype == torch.float32
    torch.testing.assert_close(fractional.double(), matched.timesteps[t], rtol=1e-7, atol=0)
    assert 0 < fractional[1] % 1 < 1


def test_predict_splits_the_output_and_knows_its_type() -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([3, 700])
    x0, eps, learned_range = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1), randn(2, 4, 2, 2, seed=2)
    x_t = process.q_sample(schedule, x0, t, eps)
    outputs: dict[PredictionType, Tensor] = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": process.velocity(schedule, x0, eps, t),
        "posterior_mean": process.q_posterior(schedule, x0, x_t, t).mean,
        "score": process.to_score(schedule, eps, x_t, t, "epsilon"),
        "step_noise": process.to_step_noise(schedule, eps, x_t, t, "epsilon"),
    }
    assert set(outputs) == set(get_args(PredictionType))
    for prediction_type, output in outputs.items():
        both = torch.cat([output, learned_range], dim=1)
        prediction = process.predict(schedule, both, x_t, t, prediction_type)
        torch.testing.assert_close(prediction.x0, x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.eps, eps, rtol=1e-10, atol=1e-10)
        assert prediction.variance_half is not None and torch.equal(prediction.variance_half, learned_range)
        assert process.predict(schedule, output, x_t, t, prediction_type).variance_half is None
    with pytest.raises(ValueError, match="must give 4 or 8, got 6"):
        process.predict(schedule, torch.zeros(2, 6, 2, 2), x_t, t, "epsilon")
    with pytest.raises(ValueError, match="unknown kind 'eps'; choose epsilon, "):
        process.predict(schedule, eps, x_t, t, "eps")  # type: ignore[arg-type]


def test_what_is_given_already_is_looked_up_in_no_table() -> None:
    value, beyond = randn(2, 4, 2, 2), torch.tensor([10**6, -(10**6)])  # where no table has an entry
    for kind in get_args(PredictionType)[:3]:
        assert CONVERSIONS[kind](SCHEDULES["linear"], value, value, beyond, kind) is value


def test_zero_snr_refuses_what_noise_cannot_tell() -> None:
    schedule, last = NoiseSchedule.linear().zero_terminal_snr(), torch.tensor([5, 999])
    x_t, output = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    for kind in ("epsilon", "score", "step_noise"):
        with pytest.raises(ValueError, match=f"{kind} cannot determine x0 at t = 999"):
            process.to_x0(schedule, output, x_t, last, kind)
        assert process.to_x0(schedule, output, x_t, last - 1, kind).isfinite().all()
    # With no signal left, v is -x0 and x_t is the noise.
    prediction = process.predict(schedule, output, x_t, last, "v_prediction")
    assert torch.equal(prediction.x0[1], -output[1]) and torch.equal(prediction.eps[1], x_t[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_promoted_and_float64_stays(dtype: torch.dtype) -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([0, 999])
    x, output = randn(2, 4, 2, 2, dtype=dtype), randn(2, 8, 2, 2, seed=1, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    prediction = process.predict(schedule, output, x, t, "epsilon")
    log_variances = [
        process.log_variance_of(spaced, prediction, x, t, variance)
        for spaced in (schedule, schedule.respaced(range(1000)))
        for variance in get_args(Variance)
    ]
    results = [prediction.x0, prediction.eps, *log_variances, process.q_sample(schedule, x, t, x)]
    assert {result.dtype for result in results} == {expected}
    in_float64 = process.predict(schedule, output.double(), x.double(), t, "epsilon")
    torch.testing.assert_close(prediction.x0.double(), in_float64.x0, rtol=1e-5, atol=1e-5)
