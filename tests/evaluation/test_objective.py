"""The loss of one network call. Oracles: the functions of `diffusion` on the output of diffusers' own call of the
tiny transformer, compared bit for bit, and closed forms for the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.diffusion.names import LossSpace, ObjectiveKind, PredictionType, SuForm, Weighting
from pixart_ft.diffusion.objectives import simple_term, su_term, variance_alone, vlb_term
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.text import pad_text
from tests.helpers.networks import randn

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
T = torch.tensor([0, 100, 700, 999])


@pytest.fixture(scope="module")
def transformer(tiny: Path) -> PixArtTransformer2DModel:
    return loading.load_transformer(Base.read(tiny), dtype=torch.float32)


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    """Arguments of `Objective.terms`: pictures, both noises, t and captions of unequal length."""
    g = torch.Generator().manual_seed(0)
    x0, eps, rest = (torch.randn(4, 4, 8, 8, generator=g) for _ in range(3))
    embeds, mask = pad_text([torch.randn(length, 32, generator=g) for length in (3, 1, 5, 2)])
    return {"x0": x0, "eps": eps, "rest": rest, "t": T, "embeds": embeds, "mask": mask}


@torch.no_grad()
def terms(objective: Objective, transformer: PixArtTransformer2DModel, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return objective.terms(transformer, **given)


@torch.no_grad()
def by_hand(
    schedule: NoiseSchedule, timesteps: Tensor, transformer: PixArtTransformer2DModel, given: dict[str, Tensor]
) -> Any:
    """The first arguments of every term: the network called as diffusers documents it, at `timesteps`."""
    noised = Noised.of(schedule, given["x0"], given["t"], given["eps"])
    dtype = next(transformer.parameters()).dtype
    output = transformer(
        noised.x_t.to(dtype),
        given["embeds"].to(dtype),
        timesteps,
        {"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=given["mask"],
    ).sample
    return schedule, output, noised


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.shape == (4,) and torch.equal(values, expected[name]), name


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "posterior_mean"])
def test_each_kind_is_its_function_of_the_networks_output(
    transformer: PixArtTransformer2DModel, given: dict[str, Tensor], prediction_type: Any
) -> None:
    schedule, output, noised = by_hand(COSINE, T, transformer, given)
    how: dict[str, Any] = {"space": "v_prediction", "norm": "huber", "huber_delta": 0.3}

    def found(kind: Any, **settings: Any) -> dict[str, Tensor]:
        return terms(Objective(COSINE, prediction_type, kind, **settings), transformer, given)

    simple, huber = (
        simple_term(schedule, output, noised, prediction_type),
        simple_term(schedule, output, noised, prediction_type, **how),
    )
    vlb = vlb_term(schedule, variance_alone(output), noised, prediction_type)
    assert_same(found("simple"), {"simple": simple, "loss": simple})
    assert_same(found("simple", **how), {"simple": huber, "loss": huber})
    assert_same(found("hybrid", vlb_scale=3.0), {"simple": simple, "vlb": vlb, "loss": simple + 3 * vlb})
    assert_same(found("hybrid", vlb_scale=3.0, **how), {"simple": huber, "vlb": vlb, "loss": huber + 3 * vlb})
    for variance in ("learned", "beta_tilde", "beta"):
        bound = vlb_term(schedule, output, noised, prediction_type, variance=variance)
        assert_same(found("vlb", variance=variance), {"simple": simple, "vlb": bound, "loss": bound})
    for form in ("su_raw", "su_noises", "su_reduced"):
        error = su_term(schedule, output, noised, given["rest"], prediction_type, form)
        assert_same(found(form), {"simple": error, "loss": error})


def test_only_the_forms_with_two_noises_see_the_second(
    transformer: PixArtTransformer2DModel, given: dict[str, Tensor]
) -> None:
    without = {name: x for name, x in given.items() if name != "rest"}
    for kind in ("hybrid", "simple", "vlb", "su_reduced"):
        objective = Objective(LINEAR, "epsilon", kind)
        assert not objective.draws_two_noises
        assert_same(terms(objective, transformer, without), terms(objective, transformer, given))
    for form in get_args(SuForm)[:2]:
        objective = Objective(LINEAR, "epsilon", form)
        assert objective.draws_two_noises
        other = terms(objective, transformer, given | {"rest": -given["rest"]})["loss"]
        assert (other != terms(objective, transformer, given)["loss"])[1:].all()  # at t = 0 there is no noise before
        with pytest.raises(AssertionError, match="two noises"):
            terms(objective, transformer, without)


def test_which_objectives_train_the_variance() -> None:
    trained = {kind: Objective(LINEAR, "epsilon", kind).trains_variance for kind in ("hybrid", "vlb", "simple")}
    assert trained == {"hybrid": True, "vlb": True, "simple": False}
    assert not Objective(LINEAR, "epsilon", "vlb", variance="beta").trains_variance
    assert not any(Objective(LINEAR, "epsilon", form).trains_variance for form in ("su_raw", "su_noises", "su_reduced"))


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"weighting": "min_snr", "min_snr_gamma": 2.0}, lambda snr: snr.clamp(max=2.0) / snr),
        ({"weighting": "soft_min_snr", "min_snr_gamma": 2.0}, lambda snr: 2.0 / (snr + 2.0)),
        ({"weighting": "p2", "p2_gamma": 0.5}, lambda snr: 1 / (1 + snr).sqrt()),
    ],
)
def test_weights_multiply_the_simple_term_alone(
    transformer: PixArtTransformer2DModel,
    given: dict[str, Tensor],
    settings: dict[str, Any],
    weight: Callable[[Tensor], Tensor],
) -> None:
    factor = weight(LINEAR.snr)[T].float()
    assert factor.max() > 10 * factor.min()
    kinds: list[tuple[ObjectiveKind, float]] = [("simple", 0.0), ("hybrid", 3.0)]
    for kind, vlb_scale in kinds:
        plain = terms(Objective(LINEAR, "epsilon", kind, 3.0), transformer, given)
        weighted = terms(Objective(LINEAR, "epsilon", kind, 3.0, **settings), transformer, given)
        assert plain.keys() == weighted.keys()
        assert all(torch.equal(plain[name], weighted[name]) for name in plain if name != "loss")
        expected = factor * plain["simple"] + vlb_scale * plain.get("vlb", torch.zeros(4))
        torch.testing.assert_close(weighted["loss"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", [name for name in get_args(Weighting) if name != "none"])
def test_a_weighted_prediction_has_one_loss_in_every_space(
    tiny: Path, given: dict[str, Tensor], weighting: Any
) -> None:
    transformer = loading.load_transformer(Base.read(tiny), dtype=torch.float32).double()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    found = {
        space: terms(Objective(LINEAR, "epsilon", "simple", space=space, weighting=weighting), transformer, exact)
        for space in get_args(LossSpace)
    }
    for space in found:
        torch.testing.assert_close(found[space]["loss"], found["epsilon"]["loss"], rtol=1e-9, atol=0)
    assert not torch.allclose(found["sample"]["simple"], found["epsilon"]["simple"], rtol=0.1)
    unset = terms(Objective(LINEAR, "epsilon", "simple", weighting=weighting), transformer, exact)
    assert torch.equal(unset["loss"], found["epsilon"]["loss"])  # by default it is the space of the prediction


def test_fractional_timesteps_reach_the_network_in_float32(
    transformer: PixArtTransformer2DModel, given: dict[str, Tensor]
) -> None:
    with pytest.warns(UserWarning, match="lie above"):
        matched = COSINE.matched_to(LINEAR)
    seen: list[Tensor] = []
    hook = transformer.register_forward_pre_hook(lambda _, a, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    found = terms(Objective(matched, "epsilon", "hybrid"), transformer, given)
    with torch.autocast("cpu", torch.bfloat16):
        terms(Objective(matched, "epsilon", "hybrid"), transformer, given)
        terms(Objective(COSINE, "epsilon", "hybrid"), transformer, given)
    hook.remove()
    # the base's timestep of the cosine schedule's noise, by bisection of the base's table
    log_snr, levels = (LINEAR.snr.log().neg(), COSINE.snr.log().neg()[T])
    right = torch.searchsorted(log_snr, levels).clamp(1, 999)
    share = (levels - log_snr[right - 1]) / (log_snr[right] - log_snr[right - 1])
    expected = (right - 1 + share).clamp(0, 999).float()
    assert expected[1] % 1 > 0.01 and expected[-1] == 999
    for timesteps in seen[:2]:
        assert timesteps.dtype == torch.float32
        torch.testing.assert_close(timesteps, expected, rtol=1e-6, atol=1e-6)
    assert seen[2].dtype == torch.int64 and torch.equal(seen[2], T)
    _, output, noised = by_hand(COSINE, expected, transformer, given)
    by_those = Objective(COSINE, "epsilon", "hybrid").terms_of(output, noised)
    torch.testing.assert_close(found["loss"], by_those["loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "vlb", "simple", "su_raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_network_alone_is_in_half_precision(
    tiny: Path, given: dict[str, Tensor], kind: Any, dtype: torch.dtype
) -> None:
    """On a float32 and on a bfloat16 base the terms are float32, those of the network's output made float32."""
    transformer = loading.load_transformer(Base.read(tiny), dtype=dtype)
    frequencies: list[Tensor] = []
    transformer.adaln_single.emb.time_proj.register_forward_hook(lambda _, a, out: frequencies.extend([*a, out]))
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(Objective(LINEAR, "epsilon", kind), transformer, given)
    assert [x.dtype for x in frequencies] == [torch.int64, torch.float32], "t and its sines are never in bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        _, output, noised = by_hand(LINEAR, T, transformer, given)
    assert output.dtype == torch.bfloat16
    expected = Objective(LINEAR, "epsilon", kind).terms_of(output.float(), noised, given["rest"])
    assert all(values.dtype == torch.float32 for values in found.values())
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("choice", "title"),
    [
        ({"prediction_type": "epsilon"}, "noise error"),
        ({"prediction_type": "v_prediction"}, "v error"),
        ({"prediction_type": "v_prediction", "space": "epsilon"}, "noise error"),
        ({"prediction_type": "epsilon", "space": "sample", "kind": "simple"}, "x0 error"),
        ({"prediction_type": "posterior_mean", "kind": "vlb"}, "posterior mean error"),
        ({"prediction_type": "epsilon", "norm": "huber"}, "noise error (Huber)"),
        ({"prediction_type": "epsilon", "kind": "su_raw"}, "error of the form su_raw"),
    ],
)
def test_an_error_is_called_by_what_it_is_of(choice: dict[str, Any], title: str) -> None:
    words = {"kind": "hybrid"} | choice
    assert Objective(schedule=NoiseSchedule.linear(10), **words).titles["simple"] == title


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "simple"},
        {"kind": "simple", "space": "v_prediction", "weighting": "min_snr"},
        {"kind": "simple", "space": "sample"},
        {"kind": "simple", "space": "score", "weighting": "debiased"},
        {"kind": "vlb", "variance": "beta_tilde"},
        *({"kind": form} for form in get_args(SuForm)),
    ],
    ids=str,
)
def test_the_weight_of_the_noises_error_is_that_of_a_small_one(how: dict[str, Any]) -> None:
    """The loss is a square of it and what an error of the other sign takes away again."""
    objective = Objective(LINEAR, "epsilon", **how)
    noised = Noised.of(LINEAR, randn(4, 4, 3, 3), T, randn(4, 4, 3, 3, seed=1))

    def loss(error: float) -> Tensor:
        output = torch.cat([noised.eps + error, torch.zeros_like(noised.eps)], dim=1)
        return objective.terms_of(output, noised, rest=randn(4, 4, 3, 3, seed=2))["loss"]

    square = (loss(0.5) + loss(-0.5)) / 2 - loss(0.0)
    torch.testing.assert_close(square, objective.noise_weights[T] * 0.25, rtol=1e-6, atol=1e-9)


def test_every_error_has_its_name() -> None:
    for space in get_args(LossSpace):
        assert Objective(LINEAR, "epsilon", "simple", space=space).titles["simple"]


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_in_the_hybrid_the_bound_moves_the_variance_alone(prediction_type: PredictionType) -> None:
    """In vlb it moves everything, and the simple term, which is only looked at, nothing."""
    noised = Noised.of(LINEAR, randn(4, 4, 3, 3), T, randn(4, 4, 3, 3, seed=1))
    output = randn(4, 8, 3, 3, seed=2).requires_grad_()
    hybrid, bound = (Objective(LINEAR, prediction_type, kind).terms_of(output, noised) for kind in ("hybrid", "vlb"))
    by_loss, by_simple, by_vlb = (
        torch.autograd.grad(term.sum(), output, retain_graph=True)[0]
        for term in (hybrid["loss"], hybrid["simple"], bound["loss"])
    )
    assert torch.equal(by_loss[:, :4], by_simple[:, :4]) and (by_simple[:, 4:] == 0).all()
    assert (by_loss[:, 4:] != 0).all() and (by_vlb != 0).all()
    assert torch.equal(bound["simple"], hybrid["simple"]) and not bound["simple"].requires_grad
