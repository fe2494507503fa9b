"""Noise schedules. Oracles: closed-form scalars, diffusers (float32), identities. See also test_golden.py."""

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from pixart_ft.diffusion.process import network_timesteps
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned, interpolate, named_config, shown_config

# What PixArt-Sigma's own scheduler_config.json says about the process.
PIXART_SIGMA = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
}


def test_closed_form_scalars() -> None:
    linear, cosine, su = NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.su_linear()
    assert linear.alpha_bar[-1].item() == pytest.approx(4.03582976538e-05, rel=1e-11)
    assert linear.sigmas[-1].item() == pytest.approx(157.40728081, rel=1e-10)
    assert linear.sigmas[0].item() == pytest.approx(0.0100005000375, rel=1e-11)
    assert (linear.posterior_variance[1] / linear.betas[1]).item() == pytest.approx(0.454735765746, rel=1e-11)
    assert cosine.alpha_bar[-1].item() == pytest.approx(2.42876690703e-09, rel=1e-10)
    assert cosine.betas[0].item() == pytest.approx(4.1284224822e-05, rel=1e-10)
    assert (cosine.betas == 0.999).sum() == 1
    assert su.alpha_bar[-1].sqrt().item() == pytest.approx(0.00648203085214, rel=1e-11)


@pytest.mark.parametrize("name", ["linear", "su_linear"])
def test_rescale_keeps_the_noise_of_1000_steps(name: str) -> None:
    few = getattr(NoiseSchedule, name)(100, rescale=True)
    many = getattr(NoiseSchedule, name)(1000)
    assert few.betas[-1].item() == pytest.approx(0.2) and many.betas[-1].item() == pytest.approx(0.02)
    assert few.alpha_bar[-1].log().item() == pytest.approx(many.alpha_bar[-1].log().item(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "steps", "given", "expected"),
    [
        ("linear", 250, {}, NoiseSchedule.linear(250)),
        ("linear", 250, {"rescale": True}, NoiseSchedule.linear(250, rescale=True)),
        ("linear", 4000, {"rescale": True}, NoiseSchedule.linear(4000, rescale=True)),
        ("su_linear", 250, {"rescale": True}, NoiseSchedule.su_linear(250, rescale=True)),
        ("scaled_linear", 250, {"rescale": True}, NoiseSchedule.scaled_linear(250)),
        ("cosine", 4000, {}, NoiseSchedule.cosine(4000)),
        ("cosine", 250, {"offset": 0.05}, NoiseSchedule.cosine(250, offset=0.05)),
    ],
)
def test_words_of_a_schedule_are_its_tables(
    name: Any, steps: int, given: dict[str, Any], expected: NoiseSchedule
) -> None:
    found = NoiseSchedule.from_diffusers_config(json.loads(json.dumps(named_config(name, steps, **given))))
    torch.testing.assert_close(found.betas, expected.betas, rtol=1e-12, atol=0)
    assert found.num_steps == steps
    if "offset" in given:  # beta at t = 0 by Nichol & Dhariwal 2021, eq. 17
        f = [math.cos((t / 250 + 0.05) / 1.05 * math.pi / 2) ** 2 for t in (0, 1)]
        assert found.betas[0].item() == pytest.approx(1 - f[1] / f[0], rel=1e-12)
        assert "'trained_betas': '250 numbers'" in shown_config(named_config(name, steps, **given))


def test_another_count_of_steps_is_told_in_the_old_one() -> None:
    """guided-diffusion's rescale_timesteps: t 1000 / T, as its float32 has it."""
    for steps in (250, 300, 4000):
        schedule = NoiseSchedule.linear(steps, rescale=True)
        told = conditioned(schedule, NoiseSchedule.linear(), "rescaled")
        theirs = torch.arange(steps).float() * (1000.0 / steps)
        torch.testing.assert_close(network_timesteps(told, torch.arange(steps)), theirs, rtol=1e-6, atol=0)
        assert torch.equal(told.alpha_bar, schedule.alpha_bar) and 990 < told.timesteps[-1] < 1000
    assert NoiseSchedule.linear(250).counted_as(1000).last_timestep == 996
    assert [NoiseSchedule.linear(steps).last_timestep for steps in (250, 4000)] == [249, 3999]


def test_posterior_log_variance_borrows_its_first_entry() -> None:
    schedule = NoiseSchedule.linear()
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_variance[1].log()
    assert NoiseSchedule.from_betas([0.5]).posterior_log_variance.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_diffusers_config_is_diffusers_own_process(beta_schedule: str, rescale_betas_zero_snr: bool) -> None:
    config = {
        "num_train_timesteps": 400,
        "beta_start": 2e-4,
        "beta_end": 0.03,
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
    }
    theirs = DDPMScheduler(**config).alphas_cumprod.double()
    # diffusers works in float32: its cosine alpha_bar is off by 1e-5 of its value.
    torch.testing.assert_close(NoiseSchedule.from_diffusers_config(config).alpha_bar, theirs, rtol=3e-5, atol=1e-8)


def test_from_diffusers_config_of_pixart_sigma_and_of_listed_betas() -> None:
    assert torch.equal(NoiseSchedule.from_diffusers_config(PIXART_SIGMA).betas, NoiseSchedule.linear().betas)
    assert NoiseSchedule.from_diffusers_config({"trained_betas": [0.1, 0.2]}).betas.tolist() == [0.1, 0.2]


def test_zero_terminal_snr_zeroes_the_last_and_keeps_the_first() -> None:
    plain = NoiseSchedule.linear().respaced(50)
    zeroed = plain.zero_terminal_snr()
    assert zeroed.alpha_bar[-1] == 0 and zeroed.sigmas[-1] == torch.inf and zeroed.has_zero_snr
    assert zeroed.alpha_bar[0].item() == pytest.approx(plain.alpha_bar[0].item(), rel=1e-12)
    assert torch.equal(zeroed.timesteps, plain.timesteps)
    torch.testing.assert_close(zeroed.zero_terminal_snr().betas, zeroed.betas, rtol=1e-10, atol=0)


def test_respaced_with_all_steps_is_the_original() -> None:
    schedule = NoiseSchedule.linear()
    everything = schedule.respaced(1000)
    torch.testing.assert_close(everything.betas, schedule.betas, rtol=1e-10, atol=0)
    assert torch.equal(everything.timesteps, schedule.timesteps)


def test_respaced_keeps_alpha_bar_and_names_the_original_timesteps() -> None:
    schedule = NoiseSchedule.cosine()
    once = schedule.respaced("ddim100")
    twice = once.respaced([0, 7, 99])
    assert twice.timesteps.tolist() == [0, 70, 990] and twice.num_steps == 3
    torch.testing.assert_close(twice.alpha_bar, schedule.alpha_bar[[0, 70, 990]], rtol=1e-10, atol=0)
    assert NoiseSchedule.linear().zero_terminal_snr().respaced(20).alpha_bar[-1] == 0


COSINE_ON_LINEAR = "of 1000 noise levels, 5 lie above and 2 below .*sigma 0.01 to 157.4"


def test_matched_timesteps_are_where_the_reference_has_the_same_noise() -> None:
    linear, cosine = NoiseSchedule.linear(), NoiseSchedule.cosine()
    with pytest.warns(UserWarning, match=COSINE_ON_LINEAR):
        matched = cosine.matched_to(linear)
    inside = (cosine.sigmas >= linear.sigmas[0]) & (cosine.sigmas <= linear.sigmas[-1])
    assert inside.tolist() == [False] * 2 + [True] * 993 + [False] * 5
    # Read with numpy, on the scale of log SNR: the reference at that fractional timestep has this schedule's SNR.
    log_snr = np.interp(matched.timesteps.numpy(), np.arange(1000), linear.snr.log().numpy())
    torch.testing.assert_close(torch.from_numpy(log_snr)[inside], cosine.snr.log()[inside], rtol=0, atol=1e-9)
    assert matched.timesteps[:2].tolist() == [0, 0] and matched.timesteps[-5:].tolist() == [999] * 5
    assert bool((matched.timesteps[1:-4].diff() > 0).all())
    # Nothing but the network's own clock has changed.
    assert matched.timesteps.dtype == torch.float64 and torch.equal(matched.betas, cosine.betas)


def test_a_schedule_matched_to_itself_keeps_its_timesteps_and_says_nothing() -> None:
    linear = NoiseSchedule.linear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for schedule, expected in (
            (linear, linear.timesteps),
            (linear.zero_terminal_snr(), linear.timesteps),
            (NoiseSchedule.from_betas([0.5]), torch.tensor([0])),
        ):
            assert torch.equal(schedule.matched_to(schedule).timesteps, expected.double())
        respaced = linear.respaced(20)
        torch.testing.assert_close(
            respaced.matched_to(linear).timesteps, respaced.timesteps.double(), rtol=0, atol=1e-9
        )
        # A reference that is itself respaced passes on the timesteps of the process its network was trained on.
        assert torch.equal(respaced.matched_to(respaced).timesteps, respaced.timesteps.double())


def test_a_level_without_signal_is_matched_to_the_most_noise_that_the_network_knows() -> None:
    linear = NoiseSchedule.linear()
    with pytest.warns(UserWarning, match="1 lie above and 0 below"):
        assert linear.zero_terminal_snr().respaced([999]).matched_to(linear).timesteps.tolist() == [999]


def test_log_sigmas_are_half_the_negative_log_snr() -> None:
    for schedule in (NoiseSchedule.cosine(), NoiseSchedule.linear().zero_terminal_snr()):
        torch.testing.assert_close(schedule.log_sigmas, -0.5 * schedule.snr.log(), rtol=1e-12, atol=1e-12)


def test_interpolation_is_that_of_numpy_and_constant_beyond_the_ends() -> None:
    knots, values = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([10.0, 20.0, -10.0]).double()
    x = torch.linspace(-2, 6, 33, dtype=torch.float64)
    expected = torch.from_numpy(np.interp(x.numpy(), knots.numpy(), values.numpy()))
    torch.testing.assert_close(interpolate(x, knots, values), expected, rtol=1e-14, atol=1e-14)
    # An infinite last knot is met by infinity alone.
    knots[-1] = torch.inf
    x = torch.tensor([1.0, 1e9, torch.inf], dtype=torch.float64)
    assert interpolate(x, knots, values).tolist() == [20, 20, -10]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoiseSchedule.from_betas([]), "non-empty"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.2]), r"between 0 and 1 .* got 0.1 .. 1.2"),
        (lambda: NoiseSchedule.from_betas([0.0, 0.5]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas([1.0, 0.5]), "only the last may be 1"),
        (lambda: NoiseSchedule.from_betas([0.1, math.nan]), "between 0 and 1"),
        (lambda: NoiseSchedule.linear(20, rescale=True), "more than 20 steps"),
        (lambda: NoiseSchedule.cosine(0), "at least one step"),
        (lambda: NoiseSchedule.from_betas([0.5]).zero_terminal_snr(), "use more steps"),
        (
            lambda: NoiseSchedule.from_diffusers_config({"beta_schedule": "sigmoid"}),
            "'sigmoid'; choose linear",
        ),
        (lambda: NoiseSchedule.from_diffusers_config({"beta_end": "0.02"}), "beta_end must be a number"),
        (lambda: NoiseSchedule.from_diffusers_config({"trained_betas": 3}), "trained_betas must be a list"),
        (lambda: NoiseSchedule.linear().respaced([0, 1000]), r"within 0\.\.999"),
    ],
)
def test_mistakes_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
