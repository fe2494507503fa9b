"""Classifier-free guidance and the learned variance in the sampling loop, on the tiny pipeline.

Oracles: the closed form of guidance, a network whose variance half is known, and what each call is given.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.text import drop_captions, pad_text
from pixart_ft.sampling.loop import _guide
from tests.helpers.rounding import CALL, PICTURE, gap
from tests.helpers.sampling_by_hand import NULL, WithVariance, ready, sample, seen, text_value, texts


@pytest.fixture(scope="module")
def network(tiny: Path) -> nn.Module:
    network: nn.Module = load_transformer(Base.read(tiny), dtype=torch.float32)
    return network


def received(monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> list[Tensor]:
    """The network's outputs that reach `scheduler.step` from now on."""
    outputs: list[Tensor] = []
    step = scheduler.step

    def spy(output: Tensor, timestep: Tensor, x: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        outputs.append(output)
        return step(output, timestep, x, generator=generator, return_dict=return_dict)

    monkeypatch.setattr(scheduler, "step", spy)
    return outputs


@pytest.mark.parametrize("null_length", [1, 9])
def test_unconditional_input_is_that_of_dropped_captions(network: nn.Module, null_length: int) -> None:
    captions, null = texts([3, 5]), torch.randn(null_length, 32)
    calls, _ = seen(network, seeds=[0, 1], captions=captions, null=null, steps=1)
    length = max(5, null_length)
    for half, expected in enumerate((drop_captions(captions, [True, True], null), captions)):
        embeds, mask = pad_text(expected, length)
        rows = slice(2 * half, 2 * half + 2)
        assert calls[0]["encoder_hidden_states"][rows].numpy().tobytes() == embeds.numpy().tobytes()
        given = calls[0]["encoder_attention_mask"][rows]
        assert given.dtype == mask.dtype and given.numpy().tobytes() == mask.numpy().tobytes()


def test_guidance_moves_all_mean_channels_and_no_variance() -> None:
    without, given = torch.randn(2, 3, 8, 2, 2)
    guided = _guide(torch.cat([without, given]), 4, 4.5)
    assert torch.allclose(guided[:, :4], without[:, :4] + 4.5 * (given - without)[:, :4])
    assert torch.equal(guided[:, 4:], given[:, 4:])


def test_guidance_one_runs_the_conditional_branch_alone(network: nn.Module) -> None:
    calls, latents = seen(network, guidance=1.0)
    assert [len(call["x"]) for call in calls] == [1] * 5
    assert torch.equal(latents, sample(network, guidance=1.0, null=torch.full((7, 32), float("nan"))))
    caption = texts([3])
    own = sample(network, captions=caption, null=caption[0], guidance=4.5)  # u = c
    assert gap(own, sample(network, captions=caption, guidance=1.0)) < PICTURE
    assert (latents - sample(network, guidance=4.5)).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["iddpm", "edm", "score_sde"])
def test_step_receives_the_guided_mean_and_the_conditional_variance(
    network: nn.Module, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, scheduler = texts([2, 6]), ready(sampler)
    outputs, known = received(monkeypatch, scheduler), WithVariance(network, None).eval()
    calls, _ = seen(known, [0, 1], captions=captions, scheduler=scheduler)
    variance = torch.cat([text_value(caption[None]) for caption in captions])
    assert len(outputs) == len(scheduler.timesteps) == len(calls)
    assert (variance - text_value(NULL[None])).abs().min() > 0.1  # the branches are told apart
    embeds, mask = pad_text(captions)
    for call, output in zip(calls, outputs, strict=True):
        assert output.shape == (2, 8, 8, 8)
        assert (output[:, 4:] - variance).abs().max() < 1e-5
        x, t = call["x"][:2], call["timestep"][:2]
        with torch.no_grad():
            null = {"encoder_hidden_states": NULL.expand(2, 1, 32), "encoder_attention_mask": torch.ones(2, 1)}
            text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
            u, c = (network(x, timestep=t, **given, added_cond_kwargs={}).sample[:, :4] for given in (null, text))
        expected = u + 4.5 * (c - u)
        assert gap(output[:, :4], expected) < 8 * CALL  # u - 4.5 u + 4.5 c
        assert ((c - u).abs().amax(dim=(0, 2, 3)) > 1e-3).all()  # so that each latent channel was put to the test


@pytest.mark.parametrize(("value", "bound"), [(-1.0, "beta_tilde"), (1.0, "beta")])
def test_learned_variance_is_the_networks_own(network: nn.Module, value: float, bound: str) -> None:
    learned = sample(WithVariance(network, value).eval(), sampler="iddpm")
    fixed = sample(network, sampler="ddpm", variance=bound)
    other = sample(WithVariance(network, 0.0).eval(), sampler="iddpm")
    assert gap(learned, fixed) < PICTURE
    assert gap(learned, other) > 2 * PICTURE


@pytest.mark.parametrize(
    ("scheduler", "channels"),
    [(DDPMScheduler(variance_type="learned_range"), 8), (DDPMScheduler(), 4), (DDIMScheduler(), 4)],
    ids=["DDPM learned", "DDPM", "DDIM"],
)
def test_schedulers_of_diffusers_receive_what_they_understand(
    network: nn.Module, scheduler: Any, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.set_timesteps(3)
    outputs = received(monkeypatch, scheduler)
    sample(network, [0, 1], scheduler=scheduler)
    assert [output.shape for output in outputs] == [(2, channels, 8, 8)] * 3


@pytest.mark.parametrize(
    "settings", [{"sampler": "iddpm"}, {"sampler": "edm"}, {"sampler": "pf_ode", "tolerance": 0.1}], ids=str
)
def test_outside_its_interval_guidance_costs_and_does_nothing(network: nn.Module, settings: dict[str, Any]) -> None:
    """The unconditional branch is run, as more rows, at timesteps within the interval alone, ends included."""
    seeds = [0] if "tolerance" in settings else [0, 1]  # an adaptive solver takes one at a time
    whole, plain = seen(network, seeds, **settings)
    times = sorted(call["timestep"][0].item() for call in whole)
    low, high = times[len(times) // 3], times[2 * len(times) // 3]
    calls, some = seen(network, seeds, interval=(low, high), **settings)
    inside = [low <= call["timestep"][0].item() <= high for call in calls]
    assert [len(call["x"]) for call in calls] == [len(seeds) * (2 if guided else 1) for guided in inside]
    assert any(inside) and not all(inside)
    unguided = sample(network, seeds, guidance=1.0, **settings)
    assert torch.equal(sample(network, seeds, interval=(0, 999), **settings), plain)
    assert torch.equal(sample(network, seeds, interval=(-2, -1), **settings), unguided)
    assert (some - plain).abs().max() > 0.1 and (some - unguided).abs().max() > 0.1
