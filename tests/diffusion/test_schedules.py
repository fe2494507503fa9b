"""Noise schedules. Oracles: closed-form scalars, diffusers (float32), identities. See also test_golden.py."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pixart_ft.diffusion.respacing import spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule

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


def test_trailing_indices_are_those_of_diffusers_ddim() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for count in range(1, 101):
        scheduler.set_timesteps(count)
        # For a few counts rounding makes diffusers end with a timestep of -1 too many.
        theirs = [timestep for timestep in scheduler.timesteps.flip(0).tolist() if timestep >= 0]
        assert spaced_indices(1000, count, "trailing") == theirs


def test_iddpm_and_leading_indices() -> None:
    assert spaced_indices(1000, 2, "iddpm") == [0, 999] and spaced_indices(1000, 1) == [999]
    assert spaced_indices(1000, 20, "leading") == list(range(0, 1000, 50))
    assert np.all(np.diff(spaced_indices(1000, 333)) > 0)


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
        (lambda: NoiseSchedule.linear().respaced(1001), "cannot keep 1001 of the 1000 steps"),
        (lambda: NoiseSchedule.linear().respaced("10,0"), "cannot keep 0 of the 500 steps of section 2"),
        (lambda: NoiseSchedule.linear().respaced("ten"), "by 'ten'.*write '20'"),
        (lambda: NoiseSchedule.linear().respaced("ddim600"), "no integer stride gives exactly 600"),
        (lambda: NoiseSchedule.linear().respaced([3, 2]), "must increase"),
        (lambda: NoiseSchedule.linear().respaced([0, 1000]), r"within 0\.\.999"),
        (lambda: spaced_indices(1000, 0), "choose 1 to 1000"),
        (lambda: spaced_indices(1000, 10, "linspace"), "choose iddpm, trailing or leading"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
