"""Adapters in pipelines, several at once. Oracles: W + sum of scale alpha/rank B A by hand, and the base as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import pixart_ft
from pixart_ft.adapters.acting import limit_adapter, load_adapter, loaded, scale_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.pipelines import fuse, load_lora, set_adapters, set_scale, unload
from pixart_ft.adapters.weights import save_adapter
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from pixart_ft.sampling.pipeline import PixArtPipeline
from tests.helpers.adapters import make_adapter, metadata_of
from tests.helpers.networks import call
from tests.helpers.tiny import build_tiny_pipeline

RANK = 4  # of `make_adapter`


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, with weights and alphas of their own, which are only read."""
    place = tmp_path_factory.mktemp("several")
    return [make_adapter(tiny, place / "first"), make_adapter(tiny, place / "other", seed=1, alpha=2.0)]


def network(tiny: Path) -> PixArtTransformer2DModel:
    return load_transformer(Base.read(tiny), dtype=torch.float32)


def by_hand(tiny: Path, scales: dict[Path, float]) -> PixArtTransformer2DModel:
    """The base with s alpha / rank B A of each adapter added to its weights."""
    transformer = network(tiny)
    for folder, scale in scales.items():
        alpha, weights = Adapter.read(folder).metadata.alpha, load_file(folder / "adapter_model.safetensors")
        assert alpha is not None
        for key in (key for key in weights if ".lora_A." in key):
            layer = transformer.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A.")[0])
            update = weights[key.replace("lora_A", "lora_B")] @ weights[key]
            layer.weight.data += scale * alpha / RANK * update
    return transformer


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PixArtPipeline, PixArtSigmaPipeline])
def test_several_adapters_add_up_and_go_again(tiny: Path, adapters: list[Path], kind: Any) -> None:
    pipeline, (first, other) = kind.from_pretrained(str(tiny)), adapters
    transformer, before = pipeline.transformer, call(network(tiny))
    assert pixart_ft.load_lora(pipeline, first, 0.7) == "first"
    close(call(transformer), call(by_hand(tiny, {first: 0.7})))
    assert load_lora(pipeline, other, scale=-0.3, name="second") == "second"
    close(call(transformer), both := call(by_hand(tiny, {first: 0.7, other: -0.3})))
    assert (both - call(by_hand(tiny, {first: 0.7}))).abs().max() > 0.01
    assert fingerprint(transformer) == fingerprint(network(tiny))
    assert not any(parameter.requires_grad for parameter in transformer.parameters())

    set_scale(pipeline, 0.5, "first")
    close(call(transformer), call(by_hand(tiny, {first: 0.5, other: -0.3})))
    set_adapters(pipeline, ["second"], 2.0)
    close(call(transformer), call(by_hand(tiny, {other: 2.0})))
    set_adapters(pipeline, ["second", "first"], [0.1, 0.2])
    close(call(transformer), call(by_hand(tiny, {first: 0.2, other: 0.1})))
    set_scale(pipeline, 1.0)
    unload(pipeline, "first")
    close(call(transformer), call(by_hand(tiny, {other: 1.0})))
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert [load_lora(pipeline, place) for place in (other, first)] == ["other", "first"]
    close(call(transformer), call(by_hand(tiny, {first: 1.0, other: 2.0})))
    unload(pipeline)
    assert torch.equal(call(transformer), before) and not loaded(transformer)
    assert transformer.state_dict().keys() == network(tiny).state_dict().keys()
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    load_lora(pipeline, first)
    alone = network(tiny)
    load_adapter(alone, Adapter.read(first))
    assert torch.equal(call(transformer), call(alone))


def test_the_names_that_users_of_diffusers_type(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    pipeline, (first, other) = PixArtPipeline.from_pretrained(str(tiny)), adapters
    pipeline.load_lora_weights(first)
    pipeline.load_lora_weights(str(other), adapter_name="b")
    pipeline.set_adapters(["first", "b"], adapter_weights=[0.8, 0.4])
    pipeline.fuse_lora(lora_scale=0.5)
    wanted = call(by_hand(tiny, {first: 0.4, other: 0.2}))
    close(call(pipeline.transformer), wanted)
    pipeline.save_pretrained(tmp_path / "fused")
    stock = PixArtSigmaPipeline.from_pretrained(str(tmp_path / "fused"))
    assert torch.equal(call(stock.transformer), call(pipeline.transformer))
    fused = call(pipeline.transformer)
    again = PixArtPipeline.from_pretrained(str(tiny))
    again.load_lora_weights(first)
    again.unload_lora_weights()
    assert torch.equal(call(again.transformer), call(network(tiny))) and not torch.equal(fused, call(again.transformer))


def test_a_name_is_given_once_and_must_be_there(tiny: Path, adapters: list[Path]) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
    for act in (lambda: set_scale(pipeline, 0.5), lambda: unload(pipeline), lambda: fuse(pipeline)):
        with pytest.raises(UserError, match=r"this pipeline has none; load one with load_lora"):
            act()
    load_lora(pipeline, adapters[0])
    assert load_lora(pipeline, adapters[0]) == "first_2"
    with pytest.raises(UserError, match="there is one of the name 'first' already"):
        load_lora(pipeline, adapters[1], name="first")
    with pytest.raises(UserError, match=r"there is no 'style' in this pipeline; there are first, first_2"):
        set_scale(pipeline, 0.5, "style")
    with pytest.raises(UserError, match=r"3 weights for 2 names; give one for each, or one for all"):
        set_adapters(pipeline, ["first", "first_2"], [1, 2, 3])


def test_what_it_was_not_trained_with_is_refused_or_named(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = PixArtSigmaPipeline.from_pretrained(str(build_tiny_pipeline(tmp_path / "other", seed=9)))
    before = call(other.transformer)
    with pytest.raises(UserError, match=r"was trained on the base .*, not on "):
        load_lora(other, adapters[0])
    assert torch.equal(call(other.transformer), before)
    with pytest.warns(UserWarning, match=r"^let pass: adapter: .* was trained on the base .*, not on "):
        load_lora(other, adapters[0], strict=False)
    assert not torch.equal(call(other.transformer), before)

    changes: list[tuple[dict[str, object], str]] = [
        ({"prediction_type": "v_prediction"}, "it predicts epsilon, and the scheduler .* takes it for v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "it was trained on the schedule .* walks through another"),
    ]
    for change, message in changes:
        pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **change)
        with pytest.raises(UserError, match=message):
            load_lora(pipeline, adapters[0])
        with pytest.warns(UserWarning, match=f"let pass: adapter: {message}"):
            load_lora(pipeline, adapters[0], strict=False)


def test_each_acts_at_its_own_timesteps(tiny: Path, adapters: list[Path]) -> None:
    transformer, (first, other) = network(tiny), adapters
    load_adapter(transformer, Adapter.read(first, interval=(0, 500)))
    load_adapter(transformer, Adapter.read(other, interval=(400, 700)))
    at = [[100], [450], [600], [900]]
    acting: list[dict[Path, float]] = [{first: 1.0}, {first: 1.0, other: 1.0}, {other: 1.0}, {}]
    for (timestep,), scales in zip(at, acting, strict=True):
        close(called(transformer, timestep), called(by_hand(tiny, scales), timestep))
    limit_adapter(transformer, (0, 1000), "other")
    close(called(transformer, 900), called(by_hand(tiny, {other: 1.0}), 900))
    with pytest.raises(ValueError, match=r"inside and outside of \[0, 500\]"), torch.no_grad():
        called(transformer, 100, 900)


def called(transformer: PixArtTransformer2DModel, *timesteps: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: Tensor = transformer(
            torch.randn(len(timesteps), 4, 8, 8, generator=draw),
            encoder_hidden_states=torch.randn(len(timesteps), 3, 32, generator=draw),
            timestep=torch.tensor(timesteps),
        ).sample
    return found


def trained(tiny: Path, folder: Path, settings: LoraSettings | PeftSettings, seed: int) -> Path:
    transformer = network(tiny)
    mark = fingerprint(transformer)
    attach(transformer, settings, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    is_lora = isinstance(settings, LoraSettings)
    changes: dict[str, Any] = {} if is_lora else {"kind": "peft", "rank": None, "alpha": None}
    about = metadata_of(mark, settings if isinstance(settings, LoraSettings) else LoraSettings(4, 1.0))
    save_adapter(folder, transformer, replace(about, **changes), torch.zeros(1, 32))
    return folder


def test_a_dora_beside_a_lora_is_scaled_by_itself(tiny: Path, tmp_path: Path) -> None:
    """In the last layer, where what they add to the layer is what they add to the output."""
    kinds = [LoraSettings(4, 8.0, ("proj_out",), dora=True), LoraSettings(4, 8.0, ("proj_out",))]
    places = [trained(tiny, tmp_path / str(n), settings, n) for n, settings in enumerate(kinds)]
    bare, added = call(network(tiny)), []
    for place in places:
        alone = network(tiny)
        load_adapter(alone, Adapter.read(place))
        added.append(call(alone) - bare)
    transformer = network(tiny)
    for place in places:
        load_adapter(transformer, Adapter.read(place))
    close(call(transformer), bare + added[0] + added[1])
    scale_adapter(transformer, 0.25, "0")
    scale_adapter(transformer, -0.5, "1")
    close(call(transformer), bare + 0.25 * added[0] - 0.5 * added[1])
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny), transformer=transformer)
    set_scale(pipeline, 1.0)
    with pytest.raises(UserError, match="only plain LoRAs can be merged together"):
        fuse(pipeline)
    set_scale(pipeline, 0.25, "0")
    unload(pipeline, "0")
    close(call(transformer), bare + added[1])
    load_lora(pipeline, places[1], name="again")  # in the place of the DoRA, with nothing of it
    close(call(transformer), bare + 2 * added[1])


def test_what_is_no_lora_acts_alone(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    lokr = trained(tiny, tmp_path / "lokr", PeftSettings("LOKR", ("to_q",), {"r": 4}), 0)
    orders: list[tuple[Path, Path]] = [(lokr, adapters[0]), (adapters[0], lokr)]
    for one, two in orders:
        transformer = network(tiny)
        load_adapter(transformer, Adapter.read(one))
        alone = call(transformer)
        with pytest.raises(UserError, match=r"cannot act beside .*: only LoRAs add up"):
            load_adapter(transformer, Adapter.read(two))
        assert torch.equal(call(transformer), alone)


def test_only_a_pixart_takes_them() -> None:
    class Other:
        transformer: Callable[[], None] | None = None

    with pytest.raises(UserError, match="Other has no PixArt transformer"):
        load_lora(Other(), "x")
