"""The held-out loss. Oracle: closed form for the estimates, identities for the measurement."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from pixart_ft.diffusion.likelihood import Bound, variational_bound
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.held_out import (
    HeldOutSet,
    evaluating,
    held_out_bound,
    held_out_loss,
    mean_over_pictures,
    paired_difference,
    timestep_grid,
)
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.model.attention import use_kernels
from pixart_ft.model.base import Base
from pixart_ft.randomness import normal

OBJECTIVE = Objective(NoiseSchedule.linear(), "epsilon", "hybrid", 2.0)


def test_grid_is_the_middles_of_equal_strata() -> None:
    assert timestep_grid(range(1000), 4).tolist() == [125, 375, 625, 875]
    assert timestep_grid(range(1000), 1000).tolist() == list(range(1000))


def test_estimates_are_those_of_the_textbook() -> None:
    before = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 9.0]])
    after = before - torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.3, 0.3]])
    estimate = mean_over_pictures(before)
    assert estimate.mean == pytest.approx((2 + 2 + 7) / 3)
    assert estimate.standard_error == pytest.approx((25 / 3) ** 0.5 / 3**0.5)  # variance of (2, 2, 7) is 25/3
    change = paired_difference(before, after)
    assert change.mean == pytest.approx(-0.3)
    assert change.standard_error == pytest.approx(0.04**0.5 / 3**0.5)


def test_same_network_same_numbers_whatever_the_batch(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet
) -> None:
    one = held_out_loss(transformer, OBJECTIVE, held_out, batch_size=12)
    again = held_out_loss(transformer, OBJECTIVE, held_out, batch_size=12)
    small = held_out_loss(transformer, OBJECTIVE, held_out, batch_size=5)
    assert one.keys() == {f"{name}{at}" for name in ("simple", "vlb", "loss") for at in ("", "_t0")}
    assert one["loss"].shape == one["loss_t0"].shape == (3,)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.allclose(one[name], small[name], rtol=1e-5, atol=1e-7)
    assert torch.allclose(one["loss"], one["simple"] + 2.0 * one["vlb"], rtol=1e-6)


def test_t_0_is_one_of_all_beside_the_strata(transformer: PixArtTransformer2DModel, held_out: HeldOutSet) -> None:
    """Oracle: a grid of every t of a short process, and what the network gives there."""
    short = replace(OBJECTIVE, schedule=NoiseSchedule.linear(8))
    every = held_out_loss(transformer, short, replace(held_out, timestep_count=8), batch_size=12)
    assert every.keys() == {"simple", "vlb", "loss"}  # t = 0 is in the grid
    seen: dict[int, float] = {}
    whole = Objective.terms

    def recorded(
        self: Objective, network: nn.Module, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, *a: Any
    ) -> Any:
        found = whole(self, network, x0, eps, t, *a)
        seen.update(zip(t.tolist(), found["vlb"].tolist(), strict=True))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "terms", recorded)
        one = replace(held_out, x0=held_out.x0[:1], texts=held_out.texts[:1], timestep_count=2)
        some = held_out_loss(transformer, short, one, batch_size=12)
    assert seen.keys() == {2, 6, 0} and some["vlb_t0"].item() == pytest.approx(seen[0])
    assert some["vlb"].item() == pytest.approx(7 / 8 * (seen[2] + seen[6]) / 2 + seen[0] / 8)


def test_pictures_and_timesteps_meet_noise_of_their_own(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet
) -> None:
    twice = HeldOutSet(held_out.x0[[0, 0]], [held_out.texts[0]] * 2, timestep_count=1, seed=0)
    losses = held_out_loss(transformer, OBJECTIVE, twice, batch_size=4)
    assert not torch.isclose(*losses["simple"]) and not torch.isclose(*losses["simple_t0"])


@torch.no_grad()
def test_bound_is_that_of_each_picture_by_itself_without_dropout(tiny: Path, held_out: HeldOutSet) -> None:
    """Every picture with its own noise and no text but its own, by diffusers' transformer called as it documents."""
    transformer, schedule = (
        loading.load_transformer(Base.read(tiny), dtype=torch.float32),
        NoiseSchedule.linear().respaced(5),
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    transformer.train()
    bound = held_out_bound(transformer, schedule, "epsilon", held_out, variance="learned", batch_size=2)
    assert transformer.training
    transformer.eval()
    for p, text in enumerate(held_out.texts):

        def network(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor = text) -> torch.Tensor:
            return transformer(x, text[None], t, {"resolution": None, "aspect_ratio": None}).sample

        def noise(index: int, p: int = p) -> torch.Tensor:
            return normal(held_out.seed, [5 * p + index], "held-out bound", (4, 8, 8))

        alone = variational_bound(schedule, network, held_out.x0[[p]], "epsilon", noise=noise, variance="learned")
        for field in fields(Bound):
            ours, expected = (getattr(found, field.name) for found in (bound, alone))
            torch.testing.assert_close(ours[[p]], expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_bound_of_several_noises_begins_with_that_of_one(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the mean and the standard error of a sample, of the bounds that one noise gives, kept by hand."""
    schedule, kept = NoiseSchedule.linear().respaced(3), list[Bound]()
    one = held_out_bound(transformer, schedule, "epsilon", held_out, variance="learned", batch_size=3)
    averaged = Bound.averaged

    def watched(bounds: list[Bound]) -> Bound:
        kept.extend(bounds)
        return averaged(bounds)

    monkeypatch.setattr(Bound, "averaged", watched)
    three = held_out_bound(transformer, schedule, "epsilon", held_out, variance="learned", batch_size=3, noises=3)
    totals = torch.stack([bound.total for bound in kept])
    assert torch.equal(totals[0], one.total) and one.noise_error.isnan().all()
    assert len(totals) == 3 and len(totals.flatten().unique()) == 9
    torch.testing.assert_close(three.total, totals.mean(dim=0))
    variance = (totals - totals.mean(dim=0)).square().sum(dim=0) / 2
    torch.testing.assert_close(three.noise_error, (variance / 3).sqrt())


def test_dropout_is_off_while_the_loss_is_measured(tiny: Path, held_out: HeldOutSet) -> None:
    transformer = loading.load_transformer(Base.read(tiny), dtype=torch.float32)
    expected = held_out_loss(transformer, OBJECTIVE, held_out, batch_size=12)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = held_out_loss(transformer.train(), OBJECTIVE, held_out, batch_size=12)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loss_of_two_noises_is_given_two(
    transformer: PixArtTransformer2DModel, held_out: HeldOutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Su's raw form needs a second one, independent of the first, or it measures something else."""
    given, terms = [], Objective.terms

    def recorded(
        self: Objective,
        network: nn.Module,
        x0: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        rest: torch.Tensor | None = None,
    ) -> Any:
        given.append((eps, rest))
        return terms(self, network, x0, eps, t, embeds, mask, rest)

    monkeypatch.setattr(Objective, "terms", recorded)
    su = Objective(NoiseSchedule.linear(), "epsilon", "su_raw")
    held_out_loss(transformer, su, held_out, batch_size=15)
    ((eps, rest),) = given
    assert rest is not None
    correlation = torch.corrcoef(torch.stack([eps.flatten(), rest.flatten()]))[0, 1]
    assert abs(correlation) < 4 / eps.numel() ** 0.5 and abs(rest.std() - 1) < 0.1


def test_modes_and_random_state_survive(transformer: PixArtTransformer2DModel, held_out: HeldOutSet) -> None:
    transformer.train()
    frozen = transformer.transformer_blocks[0].eval()
    state = torch.get_rng_state()
    held_out_loss(transformer, OBJECTIVE, held_out, batch_size=4)
    assert transformer.training and transformer.transformer_blocks[1].training and not frozen.training
    assert torch.equal(torch.get_rng_state(), state)
    transformer.eval()


def test_modes_come_back_after_an_error(transformer: PixArtTransformer2DModel) -> None:
    transformer.train()
    with pytest.raises(RuntimeError), evaluating(transformer):
        assert not transformer.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert transformer.training and torch.is_grad_enabled()
    transformer.eval()


def test_timesteps_reach_the_network_as_integers(transformer: PixArtTransformer2DModel, held_out: HeldOutSet) -> None:
    seen = []
    handle = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        held_out_loss(transformer, OBJECTIVE, held_out, batch_size=15)
    handle.remove()
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [125, 375, 625, 875] * 3 + [0] * 3


def test_plain_attention_changes_nothing_beyond_rounding(tiny: Path, held_out: HeldOutSet) -> None:
    other = loading.load_transformer(Base.read(tiny), dtype=torch.float32)
    expected = held_out_loss(other, OBJECTIVE, held_out, batch_size=12)["loss"]
    use_kernels(other)
    assert torch.allclose(held_out_loss(other, OBJECTIVE, held_out, batch_size=12)["loss"], expected, rtol=1e-5)


def test_pictures_of_each_size_keep_their_captions_and_have_noise_of_their_own() -> None:
    x0 = [torch.full((4, *size), float(number)) for number, size in enumerate([(8, 8), (8, 8), (4, 12), (12, 4)])]
    texts = [torch.full((1, 3), float(number)) for number in range(4)]
    sets = HeldOutSet.of_sizes(x0, texts, 5, seed=3)
    assert [len(one.x0) for one in sets] == [2, 1, 1] and sets[0].seed == 3
    assert len({one.seed % 2**64 for one in sets}) == 1 < len({one.seed for one in sets}) == 3
    for one in sets:
        assert [float(text[0, 0]) for text in one.texts] == one.x0[:, 0, 0, 0].tolist() and one.timestep_count == 5
