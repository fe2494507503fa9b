"""The schedulers, driven call by call as a pipeline drives them.

Oracles: a network that knows x0 and answers exactly at the noise level of the timestep it is told, so that a scheduler
whose last step is noise-free must return x0; Karras et al.'s Algorithm 2 written out from the paper; the same run in
another type, another batch, another order of construction. Orders and variances: test_samplers.py.
"""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.diffusion.names import PredictionType, StepPrediction
from pixart_ft.diffusion.process import to_posterior_mean, to_step_noise
from pixart_ft.diffusion.schedules import conditioned
from pixart_ft.schedulers import SCHEDULERS, build_scheduler
from tests.helpers.driven import EVERY, Case, made, name_of, run
from tests.helpers.networks import KINDS, LINEAR, SCHEDULES, SHAPE, bent, gaussian, oracle, randn
from tests.helpers.rounding import gap

ON_INDICES: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "beta", "spacing": "trailing"}),
    ("ddpm_greedy", {}),
    ("ddim", {}),
    ("ddim", {"eta": 1.0, "spacing": "leading"}),
    ("iddpm", {}),
]
ON_LEVELS: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("euler", {"s_churn": 20.0, "s_min": 0.05, "s_max": 50.0, "spacing": "exponential"}),
    ("euler_ancestral", {"spacing": "trailing"}),
    ("edm", {}),
    ("edm", {"s_churn": 4.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}),
    ("edm", {"s_churn": 20.0, "s_noise": 1.003, "spacing": "linspace", "lookup": "nearest"}),
    ("annealed_langevin", {"langevin_steps": 1}),
    ("score_sde", {"predictor": "ancestral"}),  # its last mean is the posterior's
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", ON_INDICES + ON_LEVELS, ids=name_of)
def test_exact_network_leads_to_x0(case: Case, name: str, kind: PredictionType) -> None:
    x0 = 3 * randn(*SHAPE, seed=1)
    for steps in (2, 10, 50, *(["2,3,4", "ddim20"] if case in ON_INDICES else [])):
        scheduler = made(case, steps, SCHEDULES[name], kind)
        start = randn(*SHAPE) * scheduler.init_noise_sigma
        found = run(scheduler, oracle(SCHEDULES[name], kind, x0), start, torch.Generator().manual_seed(2))[-1]
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", ON_INDICES + ON_LEVELS, ids=name_of)
def test_a_clipped_guess_of_x0_is_where_the_way_ends(case: Case) -> None:
    """The last step returns the guess; with a limit that nothing meets, the way is that without."""
    x0, (name, options) = 3 * randn(*SHAPE, seed=1), case
    paths = []
    for limit in (None, 1.0, 1e6):
        scheduler = made((name, options | {"clip_x0": limit}), 10)
        start = randn(*SHAPE) * scheduler.init_noise_sigma
        paths.append(run(scheduler, oracle(LINEAR, "epsilon", x0), start, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(paths[1][-1], x0.clamp(-1, 1), rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.stack(paths[2]), torch.stack(paths[0]), rtol=1e-9, atol=1e-7)


def test_every_step_is_made_by_the_clipped_guess_and_the_noise_that_it_leaves() -> None:
    """By hand: x0 = 3 taken for 1, and the noise is what x_t then holds beside it."""
    x0, x, limit = torch.full(SHAPE, 3.0, dtype=torch.float64), randn(*SHAPE), {"clip_x0": 1.0}
    (a, s), (a2, s2) = ((ab.sqrt(), (1 - ab).sqrt()) for ab in LINEAR.alpha_bar[[999, 0]])
    noise = (x - a) / s
    beta = 1 - (a / a2) ** 2
    steps = {
        "ddim": a2 + s2 * noise,
        "ddpm_greedy": (a / a2 * s2**2 * x + a2 * beta) / s**2,
        "pf_ode": x - torch.log(a2 / a) * (noise / s - x),
        "score_sde": (2 - a / a2) * x - beta * noise / s,
    }
    for name, expected in steps.items():
        options = limit | ({"corrector_steps": 0} if name == "score_sde" else {})
        path = run(made((name, options), 2), oracle(LINEAR, "epsilon", x0), x, noise=lambda call: torch.zeros(SHAPE))
        torch.testing.assert_close(path[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("case", ON_INDICES, ids=name_of)
def test_exact_network_leads_to_x0_from_no_signal_at_all(case: Case, kind: PredictionType) -> None:
    x0, schedule = 3 * randn(*SHAPE, seed=1), LINEAR.zero_terminal_snr()
    for steps in (2, 10, 50):
        scheduler = made(case, steps, schedule, kind)
        found = run(scheduler, oracle(schedule, kind, x0), randn(*SHAPE), torch.Generator().manual_seed(2))[-1]
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name, facts in SAMPLERS.items() if facts.space == "index"])
def test_no_signal_wants_a_network_that_does_not_predict_noise(name: str) -> None:
    with pytest.raises(ValueError, match="wants a network with prediction_type v_prediction or sample, not epsilon"):
        build_scheduler(name, LINEAR.zero_terminal_snr(), "epsilon")


@pytest.mark.parametrize("name", [name for name, facts in SAMPLERS.items() if facts.space != "index"])
def test_no_signal_is_refused_where_it_would_be_divided_by(name: str) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"sampler {name} divides by the signal.*use ddim, ddpm or iddpm"):
            build_scheduler(name, LINEAR.zero_terminal_snr(), kind)
    with pytest.raises(ValueError, match=f"sampler {name} divides"):
        SCHEDULERS[name].from_config({"rescale_betas_zero_snr": True})


@pytest.mark.parametrize(
    "case", [("ddim", {}), ("euler", {}), ("edm", {"s_churn": 4.0, "s_max": 50.0}), ("score_sde", {})], ids=name_of
)
def test_the_score_leads_where_the_noise_does(case: Case) -> None:
    """To the rounding of the timestep in float32, which says which s the network divides by."""
    x0, paths = randn(*SHAPE, seed=1), []
    for kind in ("epsilon", "score"):
        scheduler = made(case, 10, kind=kind)
        start = randn(*SHAPE) * scheduler.init_noise_sigma
        paths.append(torch.stack(run(scheduler, oracle(LINEAR, kind, x0), start, torch.Generator().manual_seed(2))))
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, facts in SAMPLERS.items() if facts.space != "sigma"])
@pytest.mark.parametrize("kind", get_args(StepPrediction))
def test_what_is_said_of_a_step_is_of_the_trained_one_however_few_are_taken(name: str, kind: PredictionType) -> None:
    """The same way as by the noise, at ten steps of a thousand."""
    x0 = randn(*SHAPE, seed=1)
    said = {"posterior_mean": to_posterior_mean, "step_noise": to_step_noise}[kind]

    def of_a_step(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([said(LINEAR, x0, x, timestep.expand(len(x)), "sample"), torch.sin(x)], dim=1)

    paths = [
        torch.stack(run(made((name, {}), 10, kind=kind), network, randn(*SHAPE), torch.Generator().manual_seed(2)))
        for kind, network in (("epsilon", oracle(LINEAR, "epsilon", x0)), (kind, of_a_step))
    ]
    torch.testing.assert_close(paths[1], paths[0], rtol=0, atol=1e-8)


def karras_algorithm_2(
    t: list[float], latent: Tensor, noise: list[Tensor], churn: dict[str, float], *, heun: bool
) -> list[Tensor]:
    """Karras et al. 2022, Algorithm 2, line by line; D from `bent` as their VP preconditioning has it. Every x_hat."""

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        told = np.interp(math.log(sigma), LINEAR.log_sigmas.numpy(), np.arange(1000))
        return x - sigma * bent(x / math.sqrt(1 + sigma**2), torch.tensor(told, dtype=torch.float32))[:, :4]

    x, steps, seen = latent * t[0], len(t) - 1, []
    for i in range(steps):
        inside = churn["s_min"] <= t[i] <= churn["s_max"]
        gamma = min(churn["s_churn"] / steps, math.sqrt(2) - 1) if inside else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * churn["s_noise"] * noise[i]
        seen.append(x_hat)
        d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0 and heun:
            d_prime = (x - denoiser(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return [*seen, x]


@pytest.mark.parametrize("sampler", ["edm", "euler"])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 4.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.007},  # not at the first nor at the last
        {"s_churn": 2.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.003},  # everywhere
        {"s_churn": 40.0, "s_min": 0.0, "s_max": 20.0, "s_noise": 1.0},  # capped
        {"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0},
    ],
)
def test_churn_is_the_papers_algorithm_with_the_first_noise_in_the_start(sampler: str, churn: dict[str, float]) -> None:
    steps, ends = 8, (LINEAR.sigmas[-1].item(), LINEAR.sigmas[0].item())
    low, high = ends[1] ** (1 / 7), ends[0] ** (1 / 7)
    t = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    latent, noise = randn(*SHAPE), [randn(*SHAPE, seed=1 + i) for i in range(steps)]
    expected = karras_algorithm_2(t, latent, noise, churn, heun=sampler == "edm")
    settings = {**churn, "s_max": None if churn["s_max"] == math.inf else churn["s_max"]}
    scheduler = made((sampler, settings), steps)
    # The start is latent t_0 plus the first noise: of the standard deviation that a pipeline draws.
    first = t[0] * (1 + min(churn["s_churn"] / steps, math.sqrt(2) - 1) * (t[0] <= churn["s_max"]))
    assert scheduler.init_noise_sigma == pytest.approx(
        math.hypot(t[0], math.sqrt(first**2 - t[0] ** 2) * churn["s_noise"]), rel=1e-12
    )
    calls = scheduler.order
    path = run(scheduler, bent, expected[0], noise=lambda call: noise[min(call // calls + 1, steps - 1)])
    ours = [path[start] for start in scheduler.step_starts] + path[-1:]
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norms", ["per_sample", "batch_mean"])
@pytest.mark.parametrize("corrector_first", [False, True])
def test_predictor_and_corrector_are_song_et_als_algorithm_5(norms: str, corrector_first: bool) -> None:
    """Song et al. 2021b, Algs. 3 and 5, line by line, at five steps of a thousand with two corrections each."""
    options = {"corrector_steps": 2, "corrector_snr": 0.2, "corrector_first": corrector_first, "corrector_norms": norms}
    scheduler, kept = made(("score_sde", options), 5), [0, 250, 500, 749, 999]
    alpha_bar = LINEAR.alpha_bar[kept].tolist()
    noise = [randn(*SHAPE, seed=call) for call in range(len(scheduler.timesteps))]
    x, unused = randn(*SHAPE, seed=99), iter(noise)
    found = run(scheduler, bent, x, noise=lambda call: noise[call])[-1]
    for i in reversed(range(5)):

        def score(x: Tensor, i: int = i) -> Tensor:
            return -bent(x, torch.tensor(kept[i]))[:, :4] / math.sqrt(1 - alpha_bar[i])

        alpha = alpha_bar[i] / (alpha_bar[i - 1] if i else 1)
        for _ in range(2 if corrector_first or i < 4 else 0):
            z, g = next(unused), score(x)
            ratio = torch.stack([z.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1)])
            ratio = ratio if norms == "per_sample" else ratio.mean(dim=1, keepdim=True)
            step = (2 * alpha * (0.2 * ratio[0] / ratio[1]) ** 2).view(-1, 1, 1, 1)
            x = x + step * g + (2 * step).sqrt() * z
        x = (2 - math.sqrt(alpha)) * x + (1 - alpha) * score(x) + (math.sqrt(1 - alpha) * next(unused) if i else 0)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_probability_flow_is_eulers_method_in_the_integral_of_beta() -> None:
    """Song et al. 2021b, eq. 13 of the VP SDE, dx = -(x + score) dB / 2 with B = -log alpha_bar, at five steps."""
    scheduler, kept = made(("pf_ode", {}), 5), [0, 250, 500, 749, 999]
    alpha_bar, x = LINEAR.alpha_bar[kept].tolist(), randn(*SHAPE, seed=99)
    found = run(scheduler, bent, x)[-1]
    for i in reversed(range(5)):
        score = -bent(x, torch.tensor(kept[i]))[:, :4] / math.sqrt(1 - alpha_bar[i])
        x = x + math.log((alpha_bar[i - 1] if i else 1) / alpha_bar[i]) / 2 * (x + score)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ON_INDICES + ON_LEVELS, ids=name_of)
def test_a_network_runs_on_another_schedule_matched_in_snr_or_by_the_index(case: Case, kind: PredictionType) -> None:
    """Trained on linear, run on scaled_linear, whose levels lie within; its fractional timesteps are float32."""
    x0, other = randn(*SHAPE, seed=1), SCHEDULES["scaled_linear"]
    matched = made(case, 10, conditioned(other, LINEAR, "snr_matched"), kind)
    start = randn(*SHAPE) * matched.init_noise_sigma
    found = run(matched, oracle(LINEAR, kind, x0), start, torch.Generator().manual_seed(2))[-1]
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-7)
    by_index = made(case, 10, conditioned(other, LINEAR, "index"), kind)
    assert by_index.timesteps[0] > matched.timesteps[0] + 200
    torch.testing.assert_close(
        by_index.levels(by_index.timesteps), matched.levels(matched.timesteps), rtol=1e-5, atol=0
    )


def test_a_respaced_schedule_tells_the_network_its_old_timesteps() -> None:
    x0, schedule = randn(*SHAPE, seed=1), LINEAR.respaced(100)
    for case in (("ddim", {}), ("euler", {"spacing": "trailing"})):
        scheduler = made(case, 50, schedule)
        assert set(scheduler.timesteps.tolist()) <= set(schedule.timesteps.tolist())
        start = randn(*SHAPE) * scheduler.init_noise_sigma
        for timestep, sample in zip(scheduler.timesteps, path := run(scheduler, oracle(LINEAR, "epsilon", x0), start)):
            sigma = scheduler.levels(timestep[None]).item()
            assert sigma == pytest.approx(LINEAR.sigmas[int(timestep)].item(), rel=1e-9)
            assert sample.isfinite().all()
        assert (path[-1] - x0).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_a_half_sample_takes_the_float32_step_rounded_once(case: Case, dtype: torch.dtype) -> None:
    half, whole = made(case, 4), made(case, 4)
    x = (randn(*SHAPE) * half.init_noise_sigma).to(dtype)
    for call, timestep in enumerate(half.timesteps):
        given = half.scale_model_input(x, timestep)
        assert given.dtype == dtype and torch.equal(given, whole.scale_model_input(x.float(), timestep).to(dtype))
        output, noise = bent(given.float(), timestep).to(dtype), randn(*SHAPE, seed=call).float()
        ours = half.step(output, timestep, x, noise=noise, return_dict=False)
        exact = whole.step(output.float(), timestep, x.float(), noise=noise, return_dict=False)
        for one, other in zip(ours, exact, strict=True):
            assert one.dtype == dtype and other.dtype == torch.float32 and torch.equal(one, other.to(dtype))
        x = ours[0]


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_float64_stays_and_float32_follows_it(case: Case) -> None:
    """To 1e-4 of the largest value of each sample, for a network as smooth as that of Gaussian data."""
    start, paths = randn(*SHAPE), []
    for dtype in (torch.float64, torch.float32):
        scheduler = made(case, 20)
        paths.append(
            run(
                scheduler,
                gaussian(LINEAR, 0.3, 0.5),
                start.to(dtype) * scheduler.init_noise_sigma,
                noise=lambda call: randn(*SHAPE, seed=call),
            )
        )
    for exact, rounded in zip(*paths):
        assert exact.dtype == torch.float64 and rounded.dtype == torch.float32
        assert (exact - rounded).abs().max() < 1e-4 * exact.abs().max()


def test_heuns_slope_keeps_the_digits_of_float32() -> None:
    """It is the network's own noise; (y - x0) / sigma, at 0.01 after a step from 4, would err by 200 roundings of y."""
    eps, ends = randn(*SHAPE, seed=1), []
    for dtype in (torch.float64, torch.float32):
        scheduler, output = made(("edm", {}), 3), torch.cat([eps, eps], dim=1).to(dtype)
        start = randn(*SHAPE).to(dtype) * scheduler.init_noise_sigma
        ends.append(run(scheduler, lambda *_, output=output: output, start)[-1])
    assert gap(ends[1], ends[0]) < 32 * 2.0**-24


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_noise_is_drawn_where_it_is_added_and_nowhere_else(case: Case) -> None:
    """With one's own noise, or none wanted, no generator moves; the global one never does."""
    scheduler, generator = made(case, 4), torch.Generator().manual_seed(5)
    every = 2 if case[0] == "edm" else 1  # its first call of a step adds none
    count = (len(scheduler.timesteps) - 1) // every if scheduler.facts.stochastic or case[1] else 0
    before, start = torch.get_rng_state(), randn(*SHAPE) * scheduler.init_noise_sigma
    path = run(scheduler, bent, start, generator)
    other = torch.Generator().manual_seed(5)
    noise = [torch.randn(SHAPE, generator=other, dtype=torch.float64) for _ in range(count)] or [start]
    assert torch.equal(generator.get_state(), other.get_state())
    scheduler.set_timesteps(4)
    again = run(scheduler, bent, start, generator, noise=lambda call: noise[min(call // every, len(noise) - 1)])
    assert torch.equal(torch.stack(path), torch.stack(again))
    assert torch.equal(generator.get_state(), other.get_state()) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_a_batch_with_a_generator_each_is_as_many_runs_of_one(case: Case) -> None:
    starts, scheduler = randn(3, *SHAPE[1:]), made(case, 6)
    starts = starts * scheduler.init_noise_sigma
    together = run(scheduler, bent, starts, [torch.Generator().manual_seed(seed) for seed in range(3)])[-1]
    for seed in range(3):
        alone = run(made(case, 6), bent, starts[seed : seed + 1], [torch.Generator().manual_seed(seed)])[-1]
        torch.testing.assert_close(alone[0], together[seed], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_out_of_order_are_named(name: str) -> None:
    x, scheduler = randn(*SHAPE), SCHEDULERS[name]()
    output = torch.cat([x, x], dim=1)
    for early in (
        lambda: scheduler.step(output, 999, x),
        lambda: scheduler.set_begin_index(0),
        *([lambda: scheduler.scale_model_input(x, 999)] if SAMPLERS[name].space == "sigma" else []),
        *([lambda: scheduler.encode(output, 0, x)] if name == "ddim" else []),
    ):
        with pytest.raises(ValueError, match=f"sampler {name} has no steps yet: call set_timesteps first"):
            early()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"no step begins at timestep 998\.5; take them from scheduler\.timesteps"):
        scheduler.step(output, 998.5, x)
    with pytest.raises(ValueError, match=r"begins with a step, at a position in \[0, .*, not at 77"):
        scheduler.set_begin_index(77)
    inside = set(range(len(scheduler.timesteps))) - set(scheduler.step_starts)
    for position in inside:
        with pytest.raises(ValueError, match=f"not at {position}"):
            scheduler.set_begin_index(position)
    scheduler.step(output, scheduler.timesteps[0], x, noise=x)
    with pytest.raises(ValueError, match=r"call 1 is at timestep .*, not 998\.5: step takes them in order"):
        scheduler.step(output, 998.5, x, noise=x)
    for timestep in scheduler.timesteps[1:]:
        scheduler.step(output, timestep, x, noise=x)
    with pytest.raises(ValueError, match=f"all {len(scheduler.timesteps)} calls were made; call set_timesteps"):
        scheduler.step(output, scheduler.timesteps[-1], x)
    if SAMPLERS[name].space == "sigma":
        with pytest.raises(ValueError, match=f"sampler {name} scales by the noise level: pass the timestep"):
            scheduler.scale_model_input(x)
