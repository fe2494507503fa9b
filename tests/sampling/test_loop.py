"""The sampling loop, inversion and decoding on the tiny pipeline; every row of the samplers' table is sampled.

Oracles: networks that know the noise, a loop of five lines, the exact denoiser of normal data, the stock pipeline's
decoder.
"""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.text import pad_text
from pixart_ft.sampling.loop import invert_latents
from pixart_ft.schedulers import RespacedDDIMScheduler
from tests.helpers.rounding import PICTURE, PICTURE_FLOAT64, gap
from tests.helpers.sampling_by_hand import (
    OPTION_VALUES,
    SCHEDULE,
    SHAPE,
    NormalData,
    Oracle,
    generators,
    ready,
    sample,
    seen,
    texts,
)

USES = [(name, option) for name, facts in SAMPLERS.items() for option in facts.options]


@pytest.fixture(scope="module")
def network(tiny: Path) -> nn.Module:
    network: nn.Module = load_transformer(Base.read(tiny), dtype=torch.float32)
    return network


@pytest.fixture(scope="module")
def exact(tiny: Path) -> nn.Module:
    return load_transformer(Base.read(tiny), dtype=torch.float32).double()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ddim", "steps": 1},
        {"sampler": "ddim", "steps": 7, "spacing": "trailing"},
        {"sampler": "ddim", "steps": 20, "eta": 1.0},
        {"sampler": "ddpm", "steps": 20, "variance": "beta"},
        {"sampler": "iddpm", "steps": 13, "spacing": "trailing"},
        *({"sampler": name, "steps": 9} for name, facts in SAMPLERS.items() if facts.space != "sde"),
        {"sampler": "edm", "steps": 9, "s_churn": 3.0},
        {"sampler": "euler", "steps": 9, "s_churn": 3.0, "spacing": "trailing"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_exact_network_leads_to_its_picture(prediction_type: str, settings: dict[str, Any]) -> None:
    x0 = 3 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latents = sample(Oracle(x0, prediction_type).eval(), [0, 1], prediction_type=prediction_type, **settings)
    assert (latents - x0).abs().max() < 2e-4


@pytest.mark.parametrize("sampler", [name for name, facts in SAMPLERS.items() if facts.space == "sde"])
def test_an_sde_comes_the_closer_to_the_picture_the_more_steps_it_takes(sampler: str) -> None:
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    network = Oracle(x0, "epsilon").eval()
    errors = [
        (sample(network, [0, 1], sampler=sampler, steps=steps) - x0).square().mean().sqrt().item()
        for steps in (20, 60, 180)
    ]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1] < 0.1, errors


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "iddpm"}])
def test_a_posterior_mean_is_that_of_the_trained_step_however_few_are_taken(settings: dict[str, Any]) -> None:
    """The same way to the picture as by the noise; float32 keeps x0 to 1e-3 at the first step, which counts least."""
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(4))
    paths = [
        torch.stack([call["x"][0] for call in seen(Oracle(x0, kind).eval(), prediction_type=kind, **settings)[0]])
        for kind in ("epsilon", "posterior_mean")
    ]
    torch.testing.assert_close(*paths, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unguided_sampling_is_a_plain_loop_bit_for_bit(network: nn.Module, sampler: str) -> None:
    seeds, captions = [0, 1], texts([5, 3])
    embeds, mask = pad_text(captions)
    rng, scheduler = generators(seeds), ready(sampler)
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in rng]) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "timestep": t.expand(2)}
            nothing = {"resolution": None, "aspect_ratio": None}
            output = network(scheduler.scale_model_input(x, t), **given, added_cond_kwargs=nothing).sample
            x = scheduler.step(output, t, x, generator=rng)[0]
    assert torch.equal(sample(network, seeds, captions=captions, sampler=sampler, guidance=1.0), x)


@pytest.mark.parametrize("settings", [*({"sampler": name, "steps": 3} for name in SAMPLERS), {"eta": 1.0}], ids=str)
def test_batch_mates_do_not_change_a_picture(network: nn.Module, exact: nn.Module, settings: dict[str, Any]) -> None:
    """Eight at once are eight alone: in float64 to its own rounding, and so in the float32 of the commands."""
    seeds, captions = range(8), texts(range(1, 9))
    start = (
        torch.stack([torch.randn(SHAPE, generator=g) for g in generators(seeds)]) * ready(**settings).init_noise_sigma
    )
    together = sample(exact, seeds, captions=captions, loop={"start": start.double()}, **settings)
    assert together.dtype == torch.float64
    for row, seed in enumerate(seeds):
        part = slice(row, row + 1)
        alone = sample(exact, [seed], captions=captions[part], loop={"start": start[part].double()}, **settings)
        assert gap(together[part], alone) < PICTURE_FLOAT64
    rounded = sample(network, seeds, captions=captions, **settings)
    alone = sample(network, seeds[:1], captions=captions[:1], **settings)
    assert gap(rounded[:1], alone) < PICTURE


def test_an_adaptive_solver_takes_each_picture_by_itself(network: nn.Module) -> None:
    """Bit for bit where the texts have the batch's length, since not even the arithmetic of a batch is shared.

    The third text is padded: its network rounds otherwise, which may move every step; both runs keep the tolerance.
    """
    captions, nulls = texts([4, 4, 2]), texts([3, 3, 1])
    settings: dict[str, Any] = {"sampler": "pf_ode", "tolerance": 0.1}
    calls: list[int] = []
    loop = {"on_call": lambda call, x: calls.append(call)}
    together = sample(network, [5, 6, 7], captions=captions, null=nulls, loop=loop, **settings)
    counts = []
    for row in range(3):
        made, (alone,) = seen(
            network, [5 + row], captions=captions[row : row + 1], null=nulls[row : row + 1], **settings
        )
        counts.append(len(made))
        assert torch.equal(together[row], alone) if row < 2 else gap(together[row], alone) < settings["tolerance"]
    starts = [index for index, call in enumerate(calls) if call == 1]
    assert starts == [0, counts[0], counts[0] + counts[1]]  # and each is counted from one
    assert all(after == call + 1 or after == 1 for call, after in itertools.pairwise(calls))


def test_what_reaches_the_network(network: nn.Module) -> None:
    calls, latents = seen(network, seeds=[0, 1], steps=4, spacing="trailing")
    assert latents.dtype == torch.float32
    assert [call["timestep"].tolist() for call in calls] == [[t] * 4 for t in (999, 749, 499, 249)]
    for call in calls:
        assert call["timestep"].dtype == torch.int64
        assert call["x"].dtype == torch.float32
        assert torch.equal(call["x"][:2], call["x"][2:])
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(calls[0]["x"][1], first)
    calls, latents = seen(network, seeds=[0, 1], steps=4, sampler="edm")
    assert {call["timestep"].dtype for call in calls} == {torch.float32} and len(calls) == 7


@pytest.mark.parametrize(
    "settings",
    [{"sampler": name} for name in SAMPLERS]
    + [{"sampler": name, "s_churn": churn} for name in ("euler", "edm") for churn in (0.5, 50.0)]
    + [{"sampler": "euler", "sigma_max": 80.0}, {"sampler": "edm", "spacing": "trailing"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_first_noise_is_scaled_to_the_first_level(network: nn.Module, settings: dict[str, Any]) -> None:
    """The network always sees unit variance: on a level sigma of noise alone, sigma / sqrt(1 + sigma^2)."""
    scheduler = ready(**settings)
    calls, _ = seen(network, [3], scheduler=scheduler)
    noise, sigma = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), 0.0
    if SAMPLERS[settings["sampler"]].space == "sigma":
        sigma = settings.get("sigma_max", SCHEDULE.sigmas[-1].item())
        sigma *= 1 + min(settings.get("s_churn", 0.0) / 5, math.sqrt(2) - 1)  # churn raises the first level too
    assert scheduler.init_noise_sigma == pytest.approx(sigma or 1.0)
    scale = sigma / math.sqrt(1 + sigma**2) if sigma else 1.0
    torch.testing.assert_close(calls[0]["x"][0], noise * scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sampler", "option"), USES)
def test_every_option_of_every_sampler_moves_the_picture(network: nn.Module, sampler: str, option: str) -> None:
    spacings = {"spacing": {"spacing": SAMPLERS[sampler].spacings[-1]}}
    given = (OPTION_VALUES | spacings)[option]
    without: dict[str, Any] = {key: value for key, value in given.items() if key != option}
    moved = sample(network, sampler=sampler, guidance=1.0, **given)
    assert moved.isfinite().all()
    plain = sample(network, sampler=sampler, guidance=1.0, **without)
    assert (moved - plain).abs().max() > 1e-3 * plain.abs().max()


def test_ddim_at_eta_one_is_ddpm_with_the_same_noise(network: nn.Module) -> None:
    ddim, ddpm = sample(network, eta=1.0), sample(network, sampler="ddpm", variance="beta_tilde")
    assert gap(ddim, ddpm) < PICTURE
    assert (ddim - sample(network)).abs().max() > 1e-3 * ddpm.abs().max()


@pytest.mark.parametrize("sampler", ["ddpm", "iddpm", "score_sde", "annealed_langevin"])
def test_same_seed_same_bits_and_the_global_random_state_is_left_alone(network: nn.Module, sampler: str) -> None:
    before = torch.get_rng_state()
    first = sample(network, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(sample(network, sampler=sampler), first)
    torch.set_rng_state(before)


def test_autocast_runs_the_network_in_the_half_type_and_keeps_latents_float32(network: nn.Module) -> None:
    half = sample(network, loop={"autocast": torch.bfloat16})
    exact = sample(network)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_call_is_told_and_may_change_the_sample(network: nn.Module, sampler: str) -> None:
    scheduler, samples = ready(sampler, 3), []
    found = sample(network, scheduler=scheduler, loop={"on_call": lambda call, x: samples.append((call, x))})
    assert [call for call, _ in samples] == list(range(1, len(scheduler.timesteps) + 1))
    assert torch.equal(samples[-1][1], found)
    zero = torch.zeros(1, *SHAPE)
    last = len(scheduler.timesteps) - 1
    changed = {"on_call": lambda call, x: zero if call == last else None}
    calls, _ = seen(network, sampler=sampler, steps=3, loop=changed)
    assert calls[-1]["x"].abs().max() == 0 and calls[-2]["x"].abs().max() > 0


def test_refusals(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"unknown sampler 'dim'; choose {', '.join(SAMPLERS)}"):
        sample(network, sampler="dim")
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        sample(network, steps=1001)
    fused: Any = copy.deepcopy(network)
    fused.fuse_qkv_projections()  # new linear layers, which are in training mode and have none
    assert any(module.training for module in fused.modules()) and torch.equal(sample(fused), sample(network))
    embeds, mask = pad_text(texts([3]))
    inner = network.get_submodule("transformer_blocks.0")
    inner.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            sample(network)
        with pytest.raises(ValueError, match="training mode"):
            invert_latents(network, ready(), torch.zeros(1, *SHAPE), embeds, mask, calls=1)
    finally:
        inner.eval()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_ddim_inverts_ddim_draws_again_to_first_order(share: float) -> None:
    """All the way to noise or half of it: the round trip's error is halved when the steps are doubled."""
    data = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(6))
    x0, network = data[0] * 0.5 + data[1, :1], NormalData(data[1, :1].double(), 0.5).eval()
    embeds, mask = pad_text(texts([2, 3, 4]))
    errors = []
    for steps in (20, 40, 80, 160):
        scheduler = ready(steps=steps)
        assert isinstance(scheduler, RespacedDDIMScheduler)
        kept = round(steps * share)
        noised = invert_latents(network, scheduler, x0, embeds, mask, calls=kept - 1)
        scheduler.set_begin_index(scheduler.step_starts[steps - kept])
        again = sample(network, range(3), scheduler=scheduler, guidance=1.0, loop={"start": noised})
        errors.append((again - x0).square().mean().sqrt().item())
        assert noised.dtype == torch.float32 and (noised - x0).square().mean() > 0.1
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.15), errors
    assert errors[-1] < 0.02
    if share == 1.0:  # the noise of normal data is normal too
        assert noised.std().item() == pytest.approx(1.0, abs=0.1)
