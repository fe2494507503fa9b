"""Held-out pictures through a network. Oracle: the tiny transformer called as diffusers documents."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_ft.diffusion.likelihood import ode_likelihood
from pixart_ft.diffusion.names import Variance
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.readings import Readings, Steps, strata
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.evaluation.measure import flow_likelihood, readings_at
from pixart_ft.randomness import normal, uniform

VARIANCES: tuple[Variance, ...] = ("learned", "beta")
LINEAR = NoiseSchedule.linear()


@pytest.mark.parametrize(
    "steps",
    [Steps.every(LINEAR.respaced(4), 3), Steps.drawn(LINEAR, strata(1000, 3), uniform(1, range(36), "t").view(3, -1))],
)
@torch.no_grad()
def test_every_picture_is_read_by_itself_at_its_own_steps_and_noise(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet, steps: Steps
) -> None:
    done: list[int] = []
    found = readings_at(
        transformer, steps, "epsilon", held_out, variances=VARIANCES, batch_size=5, progress=done.append
    )
    assert sum(done) == steps.t.numel() and list(found) == list(VARIANCES)
    for p, text in enumerate(held_out.texts):
        for g, t in enumerate(steps.t[p].tolist()):
            eps = normal(0, [p * steps.schedule.num_steps + t], "held-out bound", (4, 8, 8))
            noised = Noised.of(steps.schedule, held_out.x0[[p]], torch.tensor([t]), eps)
            told = {"resolution": None, "aspect_ratio": None}
            output = transformer(noised.x_t, text[None], steps.schedule.timesteps[[t]], told).sample
            for variance in VARIANCES:
                alone = Readings.of(steps.schedule, output, noised, "epsilon", variance)
                for name, value in vars(alone).items():
                    ours = getattr(found[variance], name)[p, g]
                    torch.testing.assert_close(ours, value[0].double(), rtol=1e-4, atol=1e-6)


def test_the_flow_is_followed_with_each_pictures_text(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet
) -> None:
    """One picture alone, since a solver takes the same steps for all."""
    alone = HeldOutSet(held_out.x0[:1], held_out.texts[:1], 4, 0)
    found = flow_likelihood(transformer, LINEAR, "epsilon", alone, tolerance=0.1)

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        told = {"resolution": None, "aspect_ratio": None}
        output: torch.Tensor = transformer(x, held_out.texts[0][None], timesteps, told).sample
        return output

    probe = normal(0, [0], "probability flow", (4, 8, 8)).sign()
    expected = ode_likelihood(LINEAR, network, held_out.x0[:1], "epsilon", probe=probe, rtol=0.1, atol=0.1)
    torch.testing.assert_close(found.bits_per_dim, expected.bits_per_dim, rtol=1e-4, atol=1e-6)
    assert found.calls == expected.calls
