"""The schedulers as pipelines use them: made from configs, saved, started late, in the stock PixArtSigmaPipeline.

Oracles: the same run by hand; a network that knows x0; diffusers' own schedulers where they are right; where they are
not, the schedulers' docstrings say.
"""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
)
from torch import Tensor

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.diffusion.schedules import conditioned
from pixart_ft.schedulers import SCHEDULERS, PixArtScheduler, RespacedDDIMScheduler, build_scheduler
from tests.helpers.driven import EVERY, Case, made, name_of, run
from tests.helpers.networks import LINEAR, SCHEDULES, SHAPE, bent, gaussian, level, oracle, randn

MEANS = [name for name, facts in SAMPLERS.items() if not facts.needs_variance]  # the stock pipeline drops the variance
# Drawn in float32 for every type: in bfloat16, torch 2.6 draws other numbers from the same seed, 2.13 the same ones.
FIRST_NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOT_DEFAULT: dict[str, Any] = {
    "spacing": "trailing",
    "rho": 5.0,
    "sigma_min": 0.1,
    "sigma_max": 10.0,
    "s_churn": 3.0,
    "s_min": 0.1,
    "s_max": 9.0,
    "s_noise": 1.01,
    "eta": 0.5,
    "variance": "beta",
    "predictor": "ancestral",
    "corrector_steps": 2,
    "corrector_snr": 0.1,
    "corrector_first": True,
    "langevin_steps": 2,
    "langevin_step_size": 0.2,
    "tolerance": 1e-3,
    "clip_x0": 0.9,
}


@pytest.mark.parametrize("matched", [False, True], ids=["own", "matched"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_saved_scheduler_takes_the_same_steps(name: str, matched: bool, tmp_path: Path) -> None:
    options = {key: NOT_DEFAULT[key] for key in SAMPLERS[name].options}
    if "tolerance" in options:
        options.pop("clip_x0")
    options |= {"spacing": "exponential"} if "rho" in options else {}
    schedule = conditioned(SCHEDULES["scaled_linear"], LINEAR, "snr_matched" if matched else "index")
    scheduler = build_scheduler(name, schedule, "v_prediction", options)
    assert isinstance(scheduler, PixArtScheduler)
    scheduler.save_pretrained(tmp_path)
    loaded = SCHEDULERS[name].from_pretrained(tmp_path)
    again = SCHEDULERS[name].from_config(scheduler.config)
    paths = []
    for one in (scheduler, loaded, again):
        one.set_timesteps(5)
        start = randn(*SHAPE) * one.init_noise_sigma
        paths.append(torch.stack(run(one, bent, start, torch.Generator().manual_seed(3))))
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])
    plain = made((name, {}), 5, schedule, "v_prediction")
    other = run(plain, bent, randn(*SHAPE) * plain.init_noise_sigma, torch.Generator().manual_seed(3))
    assert len(other) != len(paths[0]) or not torch.equal(torch.stack(other), paths[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_constructor_begins_with_the_process_as_diffusers_own_do(name: str) -> None:
    """By place or by name, in a class that a user derives too; what it does not know is refused."""
    kind: Any = type("Derived", (SCHEDULERS[name],), {})
    process = [20, 0.01, 0.2, "scaled_linear", None, False, "v_prediction", list(range(0, 40, 2))]
    names = [*list(inspect.signature(DPMSolverMultistepScheduler).parameters)[:5], "rescale_betas_zero_snr"]
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[:8] == [*names, "prediction_type", "network_timesteps"]
    assert set(parameters) - {"lookup", "corrector_norms"} == {*list(parameters)[:8], *SAMPLERS[name].options}
    by_name = kind(**dict(zip(parameters, process, strict=False)))
    for one in (kind(*process), by_name, kind.from_config(by_name.config)):
        expected = torch.linspace(0.01**0.5, 0.2**0.5, 20, dtype=torch.float64) ** 2
        torch.testing.assert_close(one.schedule.betas, expected, rtol=1e-12, atol=0)
        assert one.schedule.timesteps.tolist() == process[-1] and one.prediction_type == "v_prediction"
        assert [one.config[key] for key in list(parameters)[:8]] == process
        assert one.config["_class_name"] == "Derived"
    with pytest.raises(TypeError, match="quack"):
        kind(quack=1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_scheduler_is_made_from_a_stock_config(name: str) -> None:
    stock = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler = SCHEDULERS[name].from_config(stock.config)
    torch.testing.assert_close(scheduler.schedule.betas, SCHEDULES["scaled_linear"].betas, rtol=1e-12, atol=0)
    assert scheduler.prediction_type == "epsilon" and len(scheduler) == 1000
    scheduler.set_timesteps(4)
    expected = made((name, {}), 4, SCHEDULES["scaled_linear"])
    torch.testing.assert_close(scheduler.timesteps, expected.timesteps)


@pytest.mark.parametrize("reloaded", [False, True], ids=["fresh", "reloaded"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_sampler_is_made_from_another_and_takes_the_process_alone(
    name: str, reloaded: bool, tmp_path: Path
) -> None:
    """What the first had at its defaults is no wish of the second's: spacing, variance and eta mean other things."""
    first = SCHEDULERS[name].from_schedule(SCHEDULES["scaled_linear"].respaced(50), "v_prediction")
    if reloaded:
        first.save_pretrained(tmp_path)
        first = SCHEDULERS[name].from_pretrained(tmp_path)
    for other, kind in SCHEDULERS.items():
        if other == name:
            continue
        second, expected = kind.from_config(first.config), made((other, {}), 4, first.schedule, "v_prediction")
        second.set_timesteps(4)
        paths = [
            torch.stack(run(one, bent, randn(*SHAPE) * one.init_noise_sigma, torch.Generator().manual_seed(3)))
            for one in (second, expected)
        ]
        assert torch.equal(*paths), other


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_a_late_start_goes_on_as_the_whole_run_does(case: Case) -> None:
    """Announced by set_begin_index, or found by the timestep of the first call."""
    scheduler, noise = made(case, 5), [randn(*SHAPE, seed=call) for call in range(20)]
    whole = run(scheduler, bent, randn(*SHAPE) * scheduler.init_noise_sigma, noise=noise.__getitem__)
    assert len(scheduler.step_starts) == 5 == scheduler.num_inference_steps and scheduler.step_starts[0] == 0
    for start in scheduler.step_starts[1:]:
        for announced in (True, False):
            scheduler.set_timesteps(5)
            assert scheduler.begin_index is None
            if announced:
                scheduler.set_begin_index(start)
                assert scheduler.begin_index == start
            rest = run(scheduler, bent, whole[start], noise=noise.__getitem__, first=start)
            assert torch.equal(torch.stack(rest), torch.stack(whole[start:]))


@pytest.mark.parametrize("matched", [False, True], ids=["own", "matched"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_added_at_a_timestep_is_what_the_network_expects_there(name: str, matched: bool) -> None:
    """Scaled as the network receives it, x_t of its own schedule at that timestep, whatever the samples look like."""
    schedule = conditioned(SCHEDULES["scaled_linear"], LINEAR, "snr_matched") if matched else LINEAR
    scheduler, x0, eps = made((name, {}), 7, schedule), randn(*SHAPE), randn(*SHAPE, seed=1)
    for start in scheduler.step_starts:
        scheduler.set_timesteps(7)
        timestep = scheduler.timesteps[start]
        noisy = scheduler.add_noise(x0, eps, timestep.expand(2))
        a, s = level(LINEAR, timestep)
        torch.testing.assert_close(scheduler.scale_model_input(noisy, timestep), a * x0 + s * eps, rtol=0, atol=1e-5)
        assert scheduler.levels(timestep[None]).item() == pytest.approx(s / a, rel=1e-4)
    both = scheduler.timesteps[[0, -1]]  # a level for each sample
    rows = [scheduler.add_noise(x0[i : i + 1], eps[i : i + 1], both[i : i + 1]) for i in range(2)]
    assert torch.equal(scheduler.add_noise(x0, eps, both), torch.cat(rows))
    assert scheduler.add_noise(x0.bfloat16(), eps, both).dtype == torch.bfloat16


def noised(scheduler: PixArtScheduler, x0: Tensor, eps: Tensor) -> Tensor:
    """x0 at the level that the sampling begins with."""
    return scheduler.add_noise(x0, eps, scheduler.timesteps[[scheduler.begin_index or 0]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_late_start_has_its_own_level_where_several_share_a_timestep(name: str) -> None:
    """Above the levels that the network knows, its last timestep stands for all: cosine on linear has five of them."""
    with pytest.warns(UserWarning, match="above"):
        scheduler = made((name, {}), 250, conditioned(SCHEDULES["cosine"], LINEAR, "snr_matched"))
    assert scheduler.timesteps[0] == scheduler.timesteps[scheduler.step_starts[1]] == 999
    x0, eps, in_y = randn(*SHAPE), randn(*SHAPE, seed=1), SAMPLERS[name].space == "sigma"
    levels = scheduler.sigmas[:-1] if in_y else scheduler.respaced.sigmas.flip(0)
    for step in (0, 1, 100, 249):
        scheduler.set_begin_index(scheduler.step_starts[step])
        sigma = levels[step].item()
        started = noised(scheduler, x0, eps) * (1 if in_y else math.hypot(1, sigma))
        torch.testing.assert_close(started, x0 + sigma * eps, rtol=1e-9, atol=1e-9)
    assert noised(scheduler, x0.half(), eps).dtype == torch.float16


def test_no_signal_is_left_where_the_schedule_leaves_none() -> None:
    scheduler, eps = made(("ddim", {}), 5, LINEAR.zero_terminal_snr(), "v_prediction"), randn(*SHAPE)
    assert torch.equal(scheduler.add_noise(randn(*SHAPE, seed=1), eps, torch.tensor([999, 999])), eps)
    assert torch.equal(noised(scheduler, randn(*SHAPE, seed=1), eps), eps)


def test_encoding_climbs_the_line_of_an_exact_network() -> None:
    """a x0 + s eps goes to the next kept step's a x0 + s eps, and from the last to eps itself."""
    scheduler, x0, eps = made(("ddim", {}), 10), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    assert isinstance(scheduler, RespacedDDIMScheduler)
    network, rising = oracle(LINEAR, "epsilon", x0), scheduler.timesteps.flip(0)
    line = [a * x0 + s * eps for a, s in (level(LINEAR, timestep) for timestep in rising)] + [eps]
    for index in range(10):
        up = scheduler.encode(network(line[index], rising[index]), index, line[index])
        torch.testing.assert_close(up, line[index + 1], rtol=0, atol=1e-9)
    assert scheduler.encode(line[0].half(), 0, line[0].half()).dtype == torch.float16


def test_explicit_steps_are_taken_as_given() -> None:
    ddim, euler = SCHEDULERS["ddim"](), SCHEDULERS["euler"]()
    ddim.set_timesteps(timesteps=[999, 500, 0])
    assert ddim.timesteps.tolist() == [999, 500, 0]
    for closing in ([], [0.0]):
        euler.set_timesteps(sigmas=[100.0, 10.0, 0.5, *closing])
        assert euler.sigmas.tolist() == [100, 10, 0.5, 0] and euler.init_noise_sigma == 100


@pytest.fixture(scope="module")
def pipelines(tiny: Path) -> dict[torch.dtype, PixArtSigmaPipeline]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = PixArtSigmaPipeline.from_pretrained(str(tiny)).to(dtype)
        found[dtype].set_progress_bar_config(disable=True)
    return found


def generate(pipeline: PixArtSigmaPipeline, *, steps: int = 4, guidance: float = 1.0) -> Tensor:
    """One picture's latents, its text and first noise made from seeds."""
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)).to(pipeline.transformer.dtype)
    mask = torch.ones(1, 5)
    with torch.no_grad():
        return pipeline(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=-text,
            negative_prompt_attention_mask=mask,
            negative_prompt=None,
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(2),
            latents=FIRST_NOISE.to(pipeline.transformer.dtype),
            use_resolution_binning=False,
            output_type="latent",
        ).images


def by_hand(pipeline: PixArtSigmaPipeline, scheduler: PixArtScheduler, steps: int = 4) -> Tensor:
    """What the unguided pipeline should do."""
    dtype, generator = pipeline.transformer.dtype, torch.Generator().manual_seed(2)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    scheduler.set_timesteps(steps)

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return pipeline.transformer(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=torch.ones(1, 5),
            timestep=timestep[None],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]

    start = FIRST_NOISE.to(dtype) * scheduler.init_noise_sigma
    with torch.no_grad():
        return run(scheduler, network, start, generator)[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEANS)
def test_every_scheduler_runs_in_the_stock_pipeline(
    pipelines: dict[torch.dtype, PixArtSigmaPipeline], name: str, dtype: torch.dtype
) -> None:
    pipeline = pipelines[dtype]
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config)
    seen: list[Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["timestep"]), with_kwargs=True
    )
    try:
        latents = generate(pipeline)
    finally:
        hook.remove()
    assert latents.dtype == dtype and latents.isfinite().all()
    assert torch.equal(torch.cat(seen), pipeline.scheduler.timesteps)
    assert {timestep.dtype for timestep in seen} <= {torch.int64, torch.float32}
    assert torch.equal(latents, by_hand(pipeline, made((name, {}), 4)))
    if dtype == torch.bfloat16:
        exact = by_hand(pipelines[torch.float32], made((name, {}), 4))
        assert 0 < (latents - exact).abs().max() < 0.3 * exact.abs().max()


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(MEANS)))
def test_a_scheduler_that_lacks_the_variance_half_names_our_pipeline(
    pipelines: dict[torch.dtype, PixArtSigmaPipeline], name: str
) -> None:
    for pipeline in pipelines.values():
        pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match=r"8 channels, got 4: .*use pixart_ft\.PixArtPipeline"):
            generate(pipeline)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pipeline_is_saved_with_its_scheduler(tiny: Path, name: str, tmp_path: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny), text_encoder=None, tokenizer=None)
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    module = SCHEDULERS[name].__module__
    assert PixArtSigmaPipeline.load_config(str(tmp_path))["scheduler"] == [module, SCHEDULERS[name].__name__]
    assert module.startswith("pixart_ft.schedulers")
    loaded = PixArtSigmaPipeline.from_pretrained(str(tmp_path), text_encoder=None, tokenizer=None)
    assert type(loaded.scheduler) is SCHEDULERS[name]
    loaded.set_progress_bar_config(disable=True)
    if not SAMPLERS[name].needs_variance:
        assert torch.equal(generate(loaded, steps=2), by_hand(pipeline, made((name, {}), 2), 2))


def test_guided_latents_come_out_of_the_stock_pipeline(pipelines: dict[torch.dtype, PixArtSigmaPipeline]) -> None:
    pipeline = pipelines[torch.float32]
    pipeline.scheduler = SCHEDULERS["edm"].from_config(pipeline.scheduler.config)
    assert generate(pipeline, guidance=4.5).isfinite().all()


LITERAL = {"variance": "learned_range"}
STOCK: dict[str, tuple[Any, Case, dict[str, Any], float]] = {
    # ours float64, theirs with float32 tables; the exact tables are put into the two that allow it
    "ddpm": (
        DDPMScheduler,
        ("iddpm", LITERAL),
        {"variance_type": "learned_range", "timestep_spacing": "linspace"},
        1e-9,
    ),
    "ddim": (DDIMScheduler, ("ddim", {"spacing": "leading"}), {"timestep_spacing": "leading"}, 1e-9),
    "noisy": (DDIMScheduler, ("ddim", {"spacing": "leading", "eta": 1.0}), {"timestep_spacing": "leading"}, 1e-9),
    "euler": (EulerDiscreteScheduler, ("euler", {"spacing": "trailing"}), {"timestep_spacing": "trailing"}, 2e-5),
    "heun": (HeunDiscreteScheduler, ("edm", {"spacing": "trailing"}), {"timestep_spacing": "trailing"}, 2e-5),
}


def beside_stock(stock_class: Any, case: Case, settings: dict[str, Any], steps: int = 20) -> tuple[float, Any]:
    """Largest difference of the two paths, relative to each sample's largest value, from one start and one seed."""
    clip = {"clip_sample": False} if stock_class in (DDPMScheduler, DDIMScheduler) else {}
    stock = stock_class(beta_start=1e-4, beta_end=0.02, **settings, **clip)
    stock.set_timesteps(steps)
    if clip:
        stock.alphas_cumprod, stock.final_alpha_cumprod = LINEAR.alpha_bar, torch.tensor(1.0, dtype=torch.float64)
    scheduler = made(case, steps)
    assert scheduler.timesteps.tolist() == [float(timestep) for timestep in stock.timesteps]
    start = randn(*SHAPE) * scheduler.init_noise_sigma
    network = gaussian(LINEAR, 0.3, 0.5)
    ours = run(scheduler, network, start, torch.Generator().manual_seed(3))
    theirs, worst, generator = start, 0.0, torch.Generator().manual_seed(3)
    extra = {"eta": case[1]["eta"]} if "eta" in case[1] else {}
    for timestep, expected in zip(stock.timesteps, ours[1:], strict=True):
        output = network(stock.scale_model_input(theirs, timestep), timestep)
        output = output if case[0] == "iddpm" else output[:, :4]
        given = {} if stock_class is HeunDiscreteScheduler else {"generator": generator}
        theirs = stock.step(output, timestep, theirs, **given, **extra).prev_sample
        worst = max(worst, ((theirs - expected).abs().max() / expected.abs().max()).item())
    return worst, stock


@pytest.mark.parametrize("name", STOCK)
def test_steps_are_those_of_diffusers_where_it_is_right(name: str) -> None:
    stock_class, case, settings, tolerance = STOCK[name]
    assert beside_stock(stock_class, case, settings)[0] < tolerance


def test_diffusers_ddim_does_not_follow_a_list_that_is_not_even() -> None:
    """Deviation 5: it steps to t - T // N, which with linspace spacing is not the next of the list."""
    assert beside_stock(DDIMScheduler, ("ddim", {}), {"timestep_spacing": "linspace"})[0] > 1e-3


def test_diffusers_ddpm_ends_with_noise_where_its_list_does_not_end_at_0() -> None:
    """Deviation 3: trailing spacing ends at 49, and noise of that step's variance stays in the picture."""
    settings = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    assert beside_stock(DDPMScheduler, ("ddpm", {"spacing": "trailing", "variance": "beta"}), settings)[0] > 0.1
