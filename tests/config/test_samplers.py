"""The table of sampler facts, each fact against what the schedulers do.

Oracles: the constructors' signatures; counts of network calls and of draws; Gaussian data, whose flow and variance are
known, for the orders and the laws; a network that knows x0, for the samplers that meet it in the limit only. On such
data every step is affine in the sample and in each draw, so a batch of probes gives variances exactly.
"""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.config.samplers import EVERY_SAMPLER, SAMPLERS, OwnSampler, Sampler, users_of
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.schedulers import SCHEDULERS, PixArtScheduler, build_scheduler
from tests.helpers.driven import made, run
from tests.helpers.networks import KINDS, LINEAR, SCHEDULES, SHAPE, Network, gaussian, oracle, randn

MEAN, STD = 0.3, 0.5
PROCESS = {  # what every scheduler is told of its process
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "network_timesteps"),
}
CLASS_ONLY = {"corrector_norms", "lookup"}  # for the golden values; no option of a user's


def test_every_row_has_its_scheduler() -> None:
    assert list(SAMPLERS) == [facts.name for facts in SAMPLERS.values()]
    assert set(SCHEDULERS) == set(SAMPLERS)
    for name, kind in SCHEDULERS.items():
        assert kind.sampler == name and kind().facts is SAMPLERS[name]


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, pixart_ft.config.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configurations_offer_exactly_the_samplers_there_are() -> None:
    assert get_args(Sampler) == tuple(EVERY_SAMPLER)
    assert get_args(OwnSampler) == tuple(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_are_the_constructors(name: str) -> None:
    parameters = inspect.signature(SCHEDULERS[name].__init__).parameters
    assert set(parameters) - {"self"} - PROCESS - CLASS_ONLY == set(SAMPLERS[name].options)
    assert set(parameters) >= PROCESS
    assert parameters["spacing"].default == SAMPLERS[name].spacings[0]
    for option in SAMPLERS[name].options:
        assert name in users_of(option)
    unused = set().union(*(facts.options for facts in SAMPLERS.values())) - set(SAMPLERS[name].options)
    for option in unused:
        assert name not in users_of(option)
        with pytest.raises(ValueError, match=f"sampler {name} does not use {option}"):
            build_scheduler(name, LINEAR, "epsilon", {option: 1})


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spacing_of_the_table_is_taken(name: str) -> None:
    for spacing in SAMPLERS[name].spacings:
        levels = made((name, {"spacing": spacing}), 10)
        sigmas = levels.levels(levels.timesteps[levels.step_starts])
        assert bool((sigmas.diff() < 0).all()), spacing


CALLS: dict[str, Callable[[int], int]] = {
    "edm": lambda steps: 2 * steps - 1,  # one at the last
    "score_sde": lambda steps: 2 * steps - 1,  # the first predicts alone
    "annealed_langevin": lambda steps: 3 * steps + 1,  # the last denoising
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_are_the_network_calls(name: str) -> None:
    facts = SAMPLERS[name]
    for steps in (1, 2, 7):
        scheduler = made((name, {}), steps)
        assert len(scheduler.timesteps) == CALLS.get(name, lambda steps: steps)(steps)
        assert facts.calls_per_step == scheduler.order and len(scheduler.step_starts) == steps
        gaps = torch.tensor([*scheduler.step_starts, len(scheduler.timesteps)]).diff()
        assert gaps.max() <= facts.calls_per_step + (name == "annealed_langevin")
        assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("first", [False, True])
def test_calls_of_correctors_and_of_langevin_steps(first: bool) -> None:
    for count in (0, 1, 3):
        options = {"corrector_steps": count, "corrector_first": first}
        scheduler = made(("score_sde", options), 5)
        assert len(scheduler.timesteps) == (5 if first else 4) * count + 5
        assert scheduler.order == count + 1
    for count in (1, 4):
        scheduler = made(("annealed_langevin", {"langevin_steps": count}), 5)
        assert len(scheduler.timesteps) == 5 * count + 1 and scheduler.order == count


@pytest.mark.parametrize("name", SAMPLERS)
def test_stochastic_is_what_draws(name: str) -> None:
    start, ends = randn(*SHAPE), []
    for seed in (0, 1):
        scheduler, generator = made((name, {}), 6), torch.Generator().manual_seed(seed)
        before = generator.get_state()
        network = gaussian(LINEAR, MEAN, STD)
        ends.append(run(scheduler, network, start * scheduler.init_noise_sigma, generator)[-1])
        assert torch.equal(before, generator.get_state()) != SAMPLERS[name].stochastic
    assert torch.equal(*ends) != SAMPLERS[name].stochastic


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_variance_half_counts_exactly_where_it_is_needed(name: str) -> None:
    ends = []
    for half in (-1.0, 1.0):

        def network(x: Tensor, timestep: Tensor, half: float = half) -> Tensor:
            output = gaussian(LINEAR, MEAN, STD)(x, timestep)
            output[:, 4:] = half
            return output

        scheduler = made((name, {}), 6)
        start = randn(*SHAPE) * scheduler.init_noise_sigma
        ends.append(run(scheduler, network, start, torch.Generator().manual_seed(0))[-1])
    assert torch.equal(*ends) != SAMPLERS[name].needs_variance
    fixed = [
        run(made(("ddpm", {"variance": variance}), 6), network, randn(*SHAPE), torch.Generator().manual_seed(0))[-1]
        for variance in ("beta_tilde", "beta")
    ]
    if SAMPLERS[name].needs_variance:  # -1 is beta tilde, 1 is beta
        torch.testing.assert_close(ends, fixed, rtol=1e-9, atol=1e-9)


def flow_error(name: str, steps: int) -> float:
    """Distance to the exact flow of Gaussian data, in y, where the last step begins: that one is the same for all."""
    scheduler, x = made((name, {}), steps), torch.tensor([1.0, -0.7, 2.1], dtype=torch.float64).view(3, 1, 1, 1)
    x = x.expand(3, 4, 1, 1) * scheduler.init_noise_sigma
    last = scheduler.step_starts[-1]
    y, found = (sample for sample in (x, run(scheduler, gaussian(LINEAR, MEAN, STD), x)[last]))
    sigma, after = scheduler.levels(scheduler.timesteps[[0, last]]).tolist()
    if scheduler.facts.space != "sigma":
        y, found = y * math.hypot(1, sigma), found * math.hypot(1, after)
    exact = MEAN + (y - MEAN) * math.sqrt((STD**2 + after**2) / (STD**2 + sigma**2))
    return (found - exact).abs().max().item()


@pytest.mark.parametrize("name", [name for name, facts in SAMPLERS.items() if facts.order is not None])
def test_error_on_gaussian_data_falls_at_the_tables_order(name: str) -> None:
    errors = [flow_error(name, steps) for steps in (64, 128, 256)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([SAMPLERS[name].order] * 2, abs=0.1)


def final_variance(scheduler: PixArtScheduler, network: Network, calls: int | None = None) -> float:
    """Variance of the last sample, or of that after so many calls, from a start of the scheduler's own variance.

    One probe for the offset, one for the start, one for the noise of each call.
    """
    total = len(scheduler.timesteps)
    x = torch.zeros(total + 2, 4, 1, 1, dtype=torch.float64)
    x[1] = scheduler.init_noise_sigma

    def noise(call: int) -> Tensor:
        z = torch.zeros_like(x)
        z[call + 2] = 1
        return z

    ends = run(scheduler, network, x, noise=noise)[total if calls is None else calls][:, 0, 0, 0]
    return ((ends[1:] - ends[0]) ** 2).sum().item()


# (steps, std): beta_tilde, beta, DDIM eta 0, DDIM eta 0.5, greedy
VARIANCES = {
    (10, 0.5): (0.10422249, 0.35852122, 0.13076304, 0.12608080, 0.00000252),
    (50, 0.5): (0.19642024, 0.26788287, 0.22270387, 0.21721093, 0.00000252),
    (10, 1.0): (0.52078514, 0.99990000, 0.66355065, 0.63682207, 0.00004036),
    (50, 1.0): (0.85505744, 0.99990000, 0.92810594, 0.91232792, 0.00004036),
    (20, 2.0): (2.99190076, 3.54341144, 3.41456366, 3.32428687, 0.00064558),
}


@pytest.mark.parametrize(("steps", "std"), VARIANCES)
def test_final_variances_on_gaussian_data_are_the_closed_forms(steps: int, std: float) -> None:
    network = gaussian(LINEAR, MEAN, std)
    kept = made(("ddim", {}), steps).levels(made(("ddim", {}), steps).timesteps)
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("ddpm", {}, 0),
        ("ddim", {"eta": 1.0}, 0),
        ("ddpm", {"variance": "beta"}, 1),
        ("score_sde", {"predictor": "ancestral", "corrector_steps": 0}, 1),
        ("ddim", {}, 2),
        ("ddim", {"eta": 0.5}, 3),
        ("ddpm_greedy", {}, 4),
    ]
    for name, options, column in cases:
        variance = final_variance(made((name, options), steps), network)
        assert variance == pytest.approx(VARIANCES[steps, std][column], abs=6e-9), (name, options)
    # The same levels in y: the start has sigma^2 where it had 1, which is alpha_bar_T less.
    for name, eta, column in (("euler", None, 2), ("euler_ancestral", 0.5, 3), ("euler_ancestral", 1.0, 0)):
        scheduler = SCHEDULERS[name](**({} if eta is None else {"eta": eta}))
        scheduler.set_timesteps(sigmas=kept.tolist())
        scheduler.init_noise_sigma = math.hypot(1, scheduler.init_noise_sigma)
        assert final_variance(scheduler, network) == pytest.approx(VARIANCES[steps, std][column], abs=6e-9), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("score_sde", {"predictor": "euler_maruyama", "corrector_steps": 0}),
        ("score_sde", {"predictor": "reverse_diffusion", "corrector_steps": 0}),
        ("score_sde", {"predictor": "ancestral", "corrector_steps": 0}),
        ("ddpm", {"variance": "beta"}),
    ],
)
def test_variance_of_a_stochastic_sampler_reaches_the_datas_at_first_order(name: str, options: dict[str, Any]) -> None:
    errors = [abs(final_variance(made((name, options), n), gaussian(LINEAR, MEAN, STD)) - STD**2) for n in (60, 120)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def test_variance_of_annealed_langevin_lags_behind_the_level_by_its_closed_form() -> None:
    """Where sigma << std, a unit of log sigma forgets k e sigma^2 / (h std^2) of what it came with, for steps of h in
    log sigma, k of size e at each: the variance lags by h std^2 (1 + e/2) / (k e), to first order in h = log(157 /
    0.01) / N. Once N times the lag is extrapolated from two N, 2 % are left.
    """
    count, size, lags = 2, 0.5, []
    for steps in (60, 120):
        options = {"spacing": "exponential", "langevin_steps": count, "langevin_step_size": size}
        scheduler = made(("annealed_langevin", options), steps)
        variance = final_variance(scheduler, gaussian(LINEAR, MEAN, STD), len(scheduler.timesteps) - 1)
        lags.append(steps * (variance - STD**2 - LINEAR.sigmas[0].item() ** 2))
    span = math.log(LINEAR.sigmas[-1].item() / LINEAR.sigmas[0].item())
    assert 2 * lags[1] - lags[0] == pytest.approx(span * STD**2 * (1 + size / 2) / (count * size), rel=0.02)


def oracle_error(name: str, schedule: NoiseSchedule, options: dict[str, Any]) -> float:
    """Root mean square distance from x0, with a step for each of the schedule's."""
    x0, scheduler = randn(2, 4, 16, 16, seed=1), made((name, options), schedule.num_steps, schedule)
    generator = torch.Generator().manual_seed(2)
    found = run(scheduler, oracle(schedule, "epsilon", x0), randn(2, 4, 16, 16), generator)[-1]
    return (found - x0).square().mean().sqrt().item()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("predictor", "rate"), [("euler_maruyama", 2.0), ("reverse_diffusion", 1.5)])
def test_reverse_sde_meets_an_exact_network_at_its_rate(predictor: str, rate: float, first: bool) -> None:
    """With beta = 3 / N at each of N steps. Before the last, x - x0 is sqrt(beta) z; the last mean leaves
    1 - sqrt(1 - beta) = beta/2 of that by reverse diffusion, beta^2/8 x0 by Euler-Maruyama; the ancestral one nothing.
    """
    options = {"predictor": predictor, "corrector_first": first}
    errors = [oracle_error("score_sde", NoiseSchedule.from_betas([3 / n] * n), options) for n in (60, 120)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(rate, abs=0.1)
    assert errors[1] < 0.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_sde_leaves_of_an_exact_network_what_its_last_mean_leaves(name: str, kind: Any) -> None:
    schedule, x0 = SCHEDULES[name], randn(*SHAPE, seed=1)
    beta = schedule.betas[0].item()
    integral = -math.log1p(-beta)
    left = {  # (of x, of x0) in the mean of the step to no noise, where the score is -(x - sqrt(1-beta) x0) / beta
        "euler_maruyama": (1 + integral / 2 - integral / beta, math.sqrt(1 - beta) * integral / beta),
        "reverse_diffusion": (1 - math.sqrt(1 - beta), math.sqrt(1 - beta)),
        "ancestral": (0.0, 1.0),
    }
    for predictor, (of_x, of_x0) in left.items():
        for first in (False, True):
            scheduler = made(("score_sde", {"predictor": predictor, "corrector_first": first}), 5, schedule, kind)
            path = run(scheduler, oracle(schedule, kind, x0), randn(*SHAPE), torch.Generator().manual_seed(2))
            torch.testing.assert_close(path[-1], of_x * path[-2] + of_x0 * x0, rtol=0, atol=1e-8)
            assert (path[-1] - x0).abs().max() < 3 * beta


def test_probability_flow_meets_an_exact_network_at_its_rate() -> None:
    """Near x0, a step of b from noise variance v leaves 1 - b / (2 v) of x - a x0. With v = k b that is a product
    which ends as sqrt(b / pi), for b = 3 / N; with v = b (k + 1) / 2, as sqrt(10) / N, for Su's b = 20 k / N^2.
    """
    flat = [oracle_error("pf_ode", NoiseSchedule.from_betas([3 / n] * n), {}) for n in (100, 200)]
    assert math.log2(flat[0] / flat[1]) == pytest.approx(0.5, abs=0.05)
    # The noise that the flow keeps is (x_T - sqrt(alpha_bar_T) x0) / sqrt(1 - alpha_bar_T), of RMS 1.05 here.
    assert flat[1] * math.sqrt(200) == pytest.approx(1.05 * math.sqrt(3 / math.pi), rel=0.05)
    su = [oracle_error("pf_ode", NoiseSchedule.su_linear(n, rescale=True), {}) for n in (100, 200)]
    assert math.log2(su[0] / su[1]) == pytest.approx(1, abs=0.05)
    assert su[1] * 200 == pytest.approx(math.sqrt(10), rel=0.05)


MISTAKES: list[tuple[str, dict[str, Any], Any, str]] = [
    *[(name, {}, 0, r"(cannot take 0|got 0)") for name in SAMPLERS],
    *[(name, {}, -3, r"(cannot take -3|got -3)") for name in SAMPLERS],
    *[(n, {}, 1001, "cannot take 1001 steps .* choose 1 to 1000") for n in SAMPLERS if SAMPLERS[n].space != "sigma"],
    ("euler", {"spacing": "trailing"}, 1001, "cannot take 1001 steps .* choose 1 to 1000"),
    *[
        (name, {"spacing": "even"}, 5, f"unknown spacing 'even'; choose .*{SAMPLERS[name].spacings[0]}")
        for name in SAMPLERS
    ],
    *[(name, {"sigma_max": 200.0}, 5, r"sigma_max 200 must lie .* 0\.01 to 157\.41") for name in users_of("sigma_max")],
    *[(name, {"sigma_min": 0.001}, 5, r"sigma_min 0\.001 .* 0\.01 to") for name in users_of("sigma_min")],
    *[(name, {"sigma_min": 9.0, "sigma_max": 3.0}, 5, "sigma_min 9 and sigma_max 3") for name in users_of("sigma_min")],
    *[(name, {"sigma_min": 0.0}, 5, r"sigma_min.* 0 ") for name in users_of("sigma_min")],
    *[(name, {"sigma_min": math.nan}, 5, "sigma_min nan") for name in users_of("sigma_min")],
    *[(name, {"spacing": "trailing", "sigma_max": 9.0}, 5, "for spacing karras") for name in users_of("sigma_max")],
    *[(name, {"rho": -1.0}, 5, "rho must be positive, got -1") for name in users_of("rho")],
    *[(name, {"s_churn": -1.0}, 5, "must not be negative, got -1") for name in users_of("s_churn")],
    *[(name, {"eta": 1.2}, 10, r"eta must be 0 .* to 1 .*got 1\.2") for name in users_of("eta")],
    *[(name, {"eta": -0.1}, 10, r"eta must be 0 .* to 1 .*got -0\.1") for name in users_of("eta")],
    ("ddpm", {"variance": "learned"}, 5, "beta_tilde or beta, got 'learned'; iDDPM"),
    (
        "iddpm",
        {"variance": "small"},
        5,
        "unknown variance 'small'; choose learned, learned_range, direct, beta_tilde or",
    ),
    ("score_sde", {"predictor": "heun"}, 5, "unknown predictor 'heun'; choose euler_maruyama"),
    ("score_sde", {"corrector_steps": -1}, 5, "must not be negative .* got -1"),
    ("score_sde", {"corrector_snr": 0.0}, 5, "corrector_snr positive, got 1 and 0"),
    ("annealed_langevin", {"langevin_steps": 0}, 5, "at least 1 .* got 0"),
    ("annealed_langevin", {"langevin_step_size": 2.0}, 5, "between 0 and 2, .* got 3 and 2"),
    ("pf_ode", {"tolerance": -1.0}, 5, "tolerance must be positive, got -1"),
    ("pf_ode", {"tolerance": 0.1, "clip_x0": 1.0}, 5, "clip_x0 would bend the flow"),
    *[(name, {"clip_x0": 0.0}, 5, "clip_x0 must be positive, got 0") for name in SAMPLERS],
]


@pytest.mark.parametrize(("name", "options", "steps", "message"), MISTAKES)
def test_mistakes_are_named(name: str, options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made((name, options), steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_mistakes_of_any_sampler_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'; choose epsilon, v_prediction"):
        build_scheduler(name, LINEAR, "eps")  # type: ignore[arg-type]
    if SAMPLERS[name].space == "sigma":
        with pytest.raises(ValueError, match=rf"sampler {name} steps between .* \(posterior_mean\) has no meaning"):
            build_scheduler(name, LINEAR, "posterior_mean")
    scheduler: Any = SCHEDULERS[name]()
    key, rising = ("sigmas", [1.0, 9.0]) if SAMPLERS[name].space == "sigma" else ("timesteps", [0, 500])
    for wrong in (rising, rising[:1] * 2, [1e6], []):
        with pytest.raises(ValueError, match="must fall"):
            scheduler.set_timesteps(**{key: wrong})
    for both in ({}, {"num_inference_steps": 5, key: rising[::-1]}):
        with pytest.raises(ValueError, match=f"give either num_inference_steps or {key}"):
            scheduler.set_timesteps(**both)
    with pytest.raises(ValueError, match="network_timesteps must give one for each of the 1000 steps, got 3"):
        SCHEDULERS[name](network_timesteps=[0, 1, 2])


def test_unknown_samplers_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown sampler 'dim'; choose ddpm, ddpm_greedy, .*pf_ode, .* or pndm"):
        build_scheduler("dim", LINEAR, "epsilon")
