"""diffusers' schedulers by name. Oracles: the exact flow and law of Gaussian data, the stock pipeline with the same
scheduler made by hand, and numpy's interpolation of noise levels."""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from torch import Tensor

from pixart_ft.config.samplers import EVERY_SAMPLER, SAMPLERS, STOCK_SAMPLERS
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.sigmas import index_to_sigma
from pixart_ft.errors import UserError
from pixart_ft.sampling.settings import Abilities, Settings, scheduler_for, settled
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.schedulers import SCHEDULERS, build_scheduler
from pixart_ft.schedulers.stock import StockScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
ABLE = Abilities(NoiseSchedule.linear(), "epsilon", "trained", size=64, unit=16)
MEAN, STD = 0.3, 0.5
PROMPT = "a red circle on grey"
STOCHASTIC = [name for name, facts in STOCK_SAMPLERS.items() if facts.stochastic]
DETERMINISTIC = [name for name in STOCK_SAMPLERS if name not in STOCHASTIC]
GRIDS = [(name, spacing) for name, facts in STOCK_SAMPLERS.items() for spacing in facts.spacings]


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """The exact noise of data from N(MEAN, STD^2) on the linear schedule."""
    sigma = index_to_sigma(ABLE.schedule, timestep.double()[None]).item()
    y = x.double() * math.hypot(1, sigma)
    x0 = (y * STD**2 + MEAN * sigma**2) / (STD**2 + sigma**2)
    return ((y - x0) / sigma).to(x.dtype)


def walk(scheduler: Any, x: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
    """From x, at the scheduler's begin index, to the end."""
    more = {} if generator is None else {"generator": generator}
    for timestep in scheduler.timesteps[scheduler.begin_index or 0 :]:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, return_dict=False, **more)[0]
    return x


def made(name: str, steps: int, spacing: str | None = None) -> Any:
    scheduler = build_scheduler(name, ABLE.schedule, "epsilon", {} if spacing is None else {"spacing": spacing})
    scheduler.set_timesteps(steps)
    return scheduler


def flowed(x: Tensor, sigma: float) -> Tensor:
    """Where the exact flow takes x, of unit variance, from this level."""
    y = x.double() * math.hypot(1, sigma)
    return MEAN + (y - MEAN) * STD / math.hypot(STD, sigma)


def test_the_table() -> None:
    assert not set(STOCK_SAMPLERS) & set(SAMPLERS) and set(EVERY_SAMPLER) == set(STOCK_SAMPLERS) | set(SAMPLERS)
    for name, facts in STOCK_SAMPLERS.items():
        assert facts.name == name and hasattr(diffusers, facts.kind) and not facts.needs_variance
        scheduler = made(name, 7)
        assert len(scheduler.timesteps) == {1: 7, 2: 13}[facts.calls_per_step] + (name == "pndm")
        assert len(scheduler.step_starts) == 7 and scheduler.step_starts[0] == 0
        assert scheduler.timesteps[scheduler.step_starts].unique().numel() == 7
        assert settled(Settings(name), ABLE).options == {"spacing": "linspace"}


@pytest.mark.parametrize(("name", "spacing"), [(n, s) for n, s in GRIDS if n in DETERMINISTIC])
def test_many_steps_reach_the_end_of_the_flow_closer_than_ddim(name: str, spacing: str) -> None:
    start = torch.tensor([1.0, -0.7, 2.1]).view(3, 1, 1, 1)
    exact = flowed(start, ABLE.schedule.sigmas[-1].item())
    found, ddim = (
        walk(scheduler, start * scheduler.init_noise_sigma)
        for scheduler in (made(name, 100, spacing), made("ddim", 100))
    )
    error, of_ddim = ((x - exact).abs().max().item() for x in (found, ddim))
    assert error < 0.5 * of_ddim < 0.05


@pytest.mark.parametrize(("name", "spacing"), [(n, s) for n, s in GRIDS if n in STOCHASTIC])
def test_the_noisy_ones_draw_the_law_of_the_data(name: str, spacing: str) -> None:
    count = 8192
    x = torch.randn(1, 1, count, 1, generator=torch.Generator().manual_seed(0))
    scheduler = made(name, 60, spacing)
    found = walk(scheduler, x * scheduler.init_noise_sigma, [torch.Generator().manual_seed(1)])
    assert abs(found.mean().item() - MEAN) < 5 * STD / count**0.5 + 0.01
    assert found.std().item() == pytest.approx(STD, rel=0.1)


@pytest.mark.parametrize("name", [name for name, facts in STOCK_SAMPLERS.items() if facts.begins_late])
def test_a_late_start_is_noised_to_its_level_and_follows_the_flow(name: str) -> None:
    scheduler = made(name, 100)
    scheduler.set_begin_index(scheduler.step_starts[60])
    x0, noise = torch.tensor([0.4, -0.3, 1.0]).view(3, 1, 1, 1), torch.tensor([1.0, -0.7, 2.1]).view(3, 1, 1, 1)
    begin = scheduler.add_noise(x0, noise, scheduler.timesteps[[scheduler.begin_index]])
    timestep = scheduler.timesteps[scheduler.begin_index]
    sigma = index_to_sigma(ABLE.schedule, timestep.double()[None]).item()
    scaled = scheduler.scale_model_input(begin, timestep)
    torch.testing.assert_close(scaled, (x0 + sigma * noise) / math.hypot(1, sigma), rtol=1e-4, atol=1e-4)
    if not STOCK_SAMPLERS[name].stochastic:
        assert (walk(scheduler, begin) - flowed(scaled, sigma)).abs().max() < 0.01


@pytest.fixture(scope="module")
def model(tiny: Path) -> TextToImage:
    return TextToImage.load(tiny)


@pytest.mark.parametrize("name", STOCK_SAMPLERS)
def test_a_name_draws_what_the_stock_pipeline_draws(tiny: Path, model: TextToImage, name: str) -> None:
    """And eight pictures at once are eight, one by one."""
    facts = STOCK_SAMPLERS[name]
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
    pipeline.scheduler = getattr(diffusers, facts.kind)(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", **facts.arguments
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    generators = [torch.Generator("cpu").manual_seed(7)]
    wanted = pipeline(PROMPT, num_inference_steps=4, generator=generators, **arguments).images
    settings = model.settled(Settings(name, steps=4, options={"spacing": "trailing"}))
    jobs = [(PROMPT, seed) for seed in (5, 7, 9)]
    found = model.latents(jobs, settings)
    scale = wanted.abs().max()
    assert (found[1:2] - wanted).abs().max() / scale < 1e-4 and wanted.std() > 0.1
    assert (found[2:] - model.latents(jobs[2:], settings)).abs().max() / scale < 1e-4
    assert torch.equal(found, model.latents(jobs, settings))


@pytest.mark.parametrize("name", ["dpm++", "heun", "pndm"])
def test_another_schedule_is_told_to_the_network(name: str) -> None:
    """By index: its own. Matched: where the model's schedule has that noise level, or its nearest end."""
    linear, cosine = NoiseSchedule.linear(), NoiseSchedule.cosine()
    told = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="of .* noise levels")
        for how in ("index", "snr_matched"):
            settings = settled(Settings(name, steps=9, schedule="cosine", time_conditioning=how), ABLE)
            scheduler = scheduler_for(settings, ABLE)
            assert isinstance(scheduler, StockScheduler)
            torch.testing.assert_close(scheduler.inner.alphas_cumprod, cosine.alpha_bar.float(), rtol=1e-4, atol=1e-9)
            told[how] = scheduler.timesteps.double().numpy()
    levels = numpy.interp(told["index"], numpy.arange(1000), cosine.sigmas.log().numpy())
    wanted = numpy.interp(levels, linear.sigmas.log().numpy(), numpy.arange(1000))
    assert numpy.abs(told["snr_matched"] - wanted).max() < 0.2  # two interpolations, of log sigma and of what is told


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"sampler": "dpm++"}, replace(ABLE, prediction_type="score"), "diffusers', where no network predicts score"),
        ({"sampler": "unipc"}, replace(ABLE, schedule=ABLE.schedule.zero_terminal_snr()), "zero terminal SNR"),
        (
            {"sampler": "pndm", "options": {"spacing": "karras"}},
            ABLE,
            "choose linspace, trailing or leading",
        ),
        ({"sampler": "heun", "options": {"eta": 1.0}}, ABLE, "sampler heun does not use eta"),
        ({"sampler": "lms", "steps": 1001}, ABLE, "cannot take 1001 steps of a process of 1000"),
        ({"sampler": "lms", "image": Path("a.png")}, ABLE, "sampler lms steps by what it saw before"),
        ({"sampler": "pndm", "image": Path("a.png")}, ABLE, "sampler pndm steps by what it saw before"),
        ({"sampler": "dpm++", "image": Path("a.png"), "inversion": True}, ABLE, "inversion is DDIM backwards"),
        ({"sampler": "dpm"}, ABLE, "choose .*dpm\\+\\+, "),
    ],
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], model: Abilities, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(Settings(**settings), model)


def test_none_of_ours_is_replaced() -> None:
    for name in SCHEDULERS:
        assert not isinstance(made(name, 3), StockScheduler)


@pytest.mark.parametrize(
    ("name", "steps"), [*itertools.product(EVERY_SAMPLER, (1, 2, 3)), ("ddim", 1000), ("dpm++", 1000), ("unipc", 1000)]
)
def test_drawing_begins_at_noise_or_is_refused(name: str, steps: int) -> None:
    """Every sampler, spacing and length: finite from a start with noise in it, or refused with what helps."""
    for spacing in EVERY_SAMPLER[name].spacings:
        options = {"spacing": spacing} if "spacing" in EVERY_SAMPLER[name].options else {}
        try:
            scheduler = scheduler_for(Settings(name, steps=steps, options=options), ABLE)
        except ValueError as error:
            assert str(error).startswith(f"sampler {name} ") and str(error).endswith("or spacing trailing")
            assert spacing != "trailing"
            assert steps in (1, 2, 1000)
            continue
        assert scheduler.timesteps[0] >= 499
        if name in STOCK_SAMPLERS and steps <= 3:
            generator = [torch.Generator().manual_seed(0)]
            x = walk(scheduler, torch.full((1, 1), scheduler.init_noise_sigma), generator)
            assert x.isfinite().all()
