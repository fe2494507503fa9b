"""Names of other programs. Oracles: their formulas by hand, on weights of their layout; plain peft's layers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.adapters.acting import merge
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.dialects import (
    Update,
    factors_to_kohya,
    from_peft,
    lora_settings,
    read,
    to_comfy,
    to_diffusers,
    to_kohya,
    to_peft,
)
from pixart_ft.adapters.files import LoraSettings, PeftSettings
from pixart_ft.adapters.weights import take
from pixart_ft.errors import UserError
from pixart_ft.model.original import to_diffusers as plain_names
from tests.helpers.foreign import comfy_merged, kohya_merged
from tests.helpers.original import original_weights
from tests.helpers.tiny import build_tiny_transformer

WEIGHTS, _ = plain_names(original_weights())
LAYERS = [name.removesuffix(".weight") for name, value in WEIGHTS.items() if name.endswith(".weight")]
Writer = Callable[[Mapping[str, Update]], dict[str, Tensor]]
WRITERS: dict[str, Writer] = {
    "peft": to_peft,
    "diffusers": lambda updates: to_diffusers(updates)[0],
    "comfy": to_comfy,
    "kohya": to_kohya,
}


def updates(*, layers: list[str] = LAYERS, dora: bool = False, even: bool = False) -> dict[str, Update]:
    """Random ones, of ranks and scales of their own unless `even`."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for number, name in enumerate(layers):
        weight = WEIGHTS[f"{name}.weight"]
        rank = 3 if even else 2 + number % 3
        a = torch.randn(rank, *weight.shape[1:], generator=draw)
        b = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
        scale = 0.5 if even else 0.25 * (1 + number % 2)
        length = 1 + torch.rand(len(weight), generator=draw) if dora else None
        found[name] = Update(a, b, scale, length)
    return found


def applied(adapter: Mapping[str, Update]) -> dict[str, Tensor]:
    """The network's weights with these updates, by the formula."""
    found = dict(WEIGHTS)
    for name, update in adapter.items():
        weight = found[f"{name}.weight"]
        whole = weight + update.scale * (update.b.flatten(1) @ update.a.flatten(1)).view_as(weight)
        if update.magnitude is not None:
            rows = [-1, *[1] * (whole.ndim - 1)]
            whole = whole * (update.magnitude / whole.flatten(1).norm(dim=1)).reshape(rows)
        found[f"{name}.weight"] = whole
    return found


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_other_programs_get_the_same_weights(dora: bool) -> None:
    own = updates(dora=dora, layers=[name for name in LAYERS if name != "pos_embed.proj"] if dora else LAYERS)
    expected = applied(own)
    close(plain_names(comfy_merged(original_weights(), to_comfy(own)))[0], expected)
    close(kohya_merged(WEIGHTS, to_kohya(own)), expected)


@pytest.mark.parametrize("dialect", WRITERS)
@pytest.mark.parametrize("kind", ["uneven", "even", "dora", "some"])
def test_what_is_written_is_read_again(dialect: str, kind: str) -> None:
    """Of fused layers too, to the bit: what was put together is taken apart."""
    own = updates(dora=kind == "dora", even=kind == "even")
    if kind == "some":
        own = {name: own[name] for name in LAYERS if name.endswith(("to_q", "to_v"))}
    settings = lora_settings(own)
    tensors, header = WRITERS[dialect](own), to_diffusers(own)[1] if dialect == "diffusers" else {}
    config = {"lora_alpha": settings.alpha, **settings.options} if dialect == "peft" else None
    found = read(tensors, header, config)
    assert found.dialect == dialect and not found.remarks
    assert isinstance(found.settings, LoraSettings)
    again = from_peft(found.weights, found.settings)
    assert again.keys() == own.keys()
    for name, update in own.items():
        assert again[name].rank == update.rank
        if dialect != "comfy" or kind == "even":  # comfy has one scale where three layers have theirs
            assert again[name].scale == pytest.approx(update.scale)
            assert torch.equal(again[name].a, update.a) and torch.equal(again[name].b, update.b)
    close(applied(again), applied(own))


def test_the_settings_are_those_of_peft(base_network: Callable[[], PixArtTransformer2DModel]) -> None:
    """Ranks and alphas of single layers too: peft's own layers give the same weights."""
    network = base_network()
    own = updates()
    settings = lora_settings(own)
    assert settings.options.keys() == {"rank_pattern", "alpha_pattern"} and settings.rank in (2, 3, 4)
    attach(network, settings, seed=0)
    take(network, to_peft(own), Path())
    merge(network)
    close(dict(network.state_dict()), applied(own))


@pytest.fixture
def base_network() -> Callable[[], PixArtTransformer2DModel]:
    def make() -> PixArtTransformer2DModel:
        network = build_tiny_transformer()
        network.load_state_dict(WEIGHTS)
        return network.requires_grad_(False).eval()

    return make


LAYER = "transformer_blocks.1.attn1.to_k"
PAIR = {"a": torch.ones(2, 64), "b": torch.ones(64, 2)}
NAMES = {
    "the authors' script": (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight", 8.0),
    "their older script": (
        f"unet.base_model.model.{LAYER}.lora_A.weight",
        f"unet.base_model.model.{LAYER}.lora_B.weight",
        8.0,
    ),
    "peft": (f"base_model.model.{LAYER}.lora_A.default.weight", f"base_model.model.{LAYER}.lora_B.default.weight", 8.0),
    "SimpleTuner": (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight", 2.0),
    "OneTrainer": (
        "lora_transformer_transformer_blocks_1_attn1_to_k.lora_down.weight",
        "lora_transformer_transformer_blocks_1_attn1_to_k.lora_up.weight",
        2.0,
    ),
    "OneTrainer's newer": (
        "transformer.blocks.1.attn.qkv.1.lora_down.weight",
        "transformer.blocks.1.attn.qkv.1.lora_up.weight",
        2.0,
    ),
    "older diffusers": (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight", 8.0),
    "LyCORIS": (
        "lycoris_transformer_blocks_1_attn1_to_k.lora_down.weight",
        "lycoris_transformer_blocks_1_attn1_to_k.lora_up.weight",
        2.0,
    ),
}


@pytest.mark.parametrize("program", NAMES)
def test_every_program_is_understood_and_a_missing_alpha_told(program: str) -> None:
    a, b, assumed = NAMES[program]
    found = read({a: PAIR["a"], b: PAIR["b"]})
    assert found.weights.keys() == {f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB"}
    assert isinstance(found.settings, LoraSettings)
    assert (found.settings.rank, found.settings.alpha, found.settings.targets) == (2, assumed, (LAYER,))
    (remark,) = found.remarks
    assert "assumed 8, as the script" in remark if assumed == 8 else "assumed its rank" in remark
    assert f"--lora-alpha {2 if assumed == 8 else 8}" in remark
    told = read({a: PAIR["a"], b: PAIR["b"]}, alpha=3.0)
    assert isinstance(told.settings, LoraSettings) and told.settings.alpha == 3.0 and not told.remarks


def test_the_alpha_of_a_file_is_used_wherever_it_stands() -> None:
    pair = {f"{LAYER}.lora_A.weight": PAIR["a"], f"{LAYER}.lora_B.weight": PAIR["b"]}
    diffusers = {f"transformer.{key}": value for key, value in pair.items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})}
    place = "lora_unet_blocks_1_attn_proj"
    kohya = {f"{place}.lora_down.weight": PAIR["a"], f"{place}.lora_up.weight": PAIR["b"]}
    for found, scale in (
        (read(diffusers, header), 6 / math.sqrt(2)),
        (read(diffusers, header, alpha=4.0), 6 / math.sqrt(2)),
        (read(pair, {}, {"lora_alpha": 5}), 2.5),
        (read(pair, {}, {"lora_alpha": 5, "alpha_pattern": {"attn1.to_k": 7}}), 3.5),
        (read(kohya, {"ss_network_alpha": "3.0"}), 1.5),
        (read(kohya | {f"{place}.alpha": torch.tensor(9.0)}, {"ss_network_alpha": "3"}), 4.5),
    ):
        assert isinstance(found.settings, LoraSettings) and not found.remarks and not found.needs_alpha
        assert found.settings.alpha / 2 == pytest.approx(scale) and not found.settings.rslora


def lokr(name: str, *, w1: bool, w2: bool, alpha: float | None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    values = {"lokr_w1": torch.randn(4, 4, generator=draw)}
    if not w1:
        values = {"lokr_w1_a": torch.randn(4, 1, generator=draw), "lokr_w1_b": torch.randn(1, 4, generator=draw)}
    if w2:
        values["lokr_w2"] = torch.randn(16, 16, generator=draw)
    else:
        values |= {"lokr_w2_a": torch.randn(16, 1, generator=draw), "lokr_w2_b": torch.randn(1, 16, generator=draw)}
    if alpha is not None:
        values["alpha"] = torch.tensor(alpha)
    return {f"{name}.{part}": value for part, value in values.items()}


@pytest.mark.parametrize(("w1", "w2", "scale"), [(True, False, 3.0), (False, False, 3.0), (True, True, 1.0)])
def test_a_lokr_of_lycoris_is_one_of_peft(
    base_network: Callable[[], PixArtTransformer2DModel], w1: bool, w2: bool, scale: float
) -> None:
    """W + alpha / rank * (w1 kron w2); LyCORIS counts no alpha where both are whole."""
    layers = [f"transformer_blocks.{block}.attn1.to_{part}" for block in (0, 1) for part in "qv"]
    tensors: dict[str, Tensor] = {}
    for name in layers:
        tensors |= lokr(f"lycoris_{name.replace('.', '_')}", w1=w1, w2=w2, alpha=3.0)
    values = lokr("x", w1=w1, w2=w2, alpha=None)
    one = values["x.lokr_w1"] if w1 else values["x.lokr_w1_a"] @ values["x.lokr_w1_b"]
    other = values["x.lokr_w2"] if w2 else values["x.lokr_w2_a"] @ values["x.lokr_w2_b"]
    expected = {f"{name}.weight": WEIGHTS[f"{name}.weight"] + scale * torch.kron(one, other) for name in layers}
    found = read(tensors)
    assert isinstance(found.settings, PeftSettings) and found.settings.peft_type == "LOKR"
    network = base_network()
    attach(network, found.settings, seed=0)
    take(network, found.weights, Path())
    merge(network)
    close(dict(network.state_dict()), expected)
    again = read(factors_to_kohya(found.weights, found.settings.options))
    assert again.settings == found.settings
    assert all(torch.equal(again.weights[key], value) for key, value in found.weights.items())


def test_a_loha_of_lycoris_is_one_of_peft_and_is_cut_where_the_authors_layer_is_three(
    base_network: Callable[[], PixArtTransformer2DModel],
) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = {"hada_w1_a": (192, 2), "hada_w1_b": (2, 64), "hada_w2_a": (192, 2), "hada_w2_b": (2, 64)}
    values = {part: torch.randn(shape, generator=draw) for part, shape in shapes.items()}
    tensors = {f"diffusion_model.blocks.0.attn.qkv.{part}": value for part, value in values.items()}
    found = read(tensors | {"diffusion_model.blocks.0.attn.qkv.alpha": torch.tensor(1.0)})
    change = 0.5 * (values["hada_w1_a"] @ values["hada_w1_b"]) * (values["hada_w2_a"] @ values["hada_w2_b"])
    expected = {
        name: WEIGHTS[name] + rows
        for part, rows in zip("qkv", change.chunk(3), strict=True)
        for name in [f"transformer_blocks.0.attn1.to_{part}.weight"]
    }
    network = base_network()
    attach(network, found.settings, seed=0)
    take(network, found.weights, Path())
    merge(network)
    close(dict(network.state_dict()), expected)


def pair(prefix: str = "transformer.") -> dict[str, Tensor]:
    return {f"{prefix}{LAYER}.lora_A.weight": PAIR["a"], f"{prefix}{LAYER}.lora_B.weight": PAIR["b"]}


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "mixed": (pair() | pair("unet."), {}, r"names are of 2 dialects \(2 diffusers, 2 script\)"),
    "unknown": (pair() | {"x": torch.ones(2)}, {}, r"1 of 3 weights have names that no known dialect gives.*: x"),
    "layer": (pair("transformer.down_blocks.0."), {}, r"2 of 2 weights have names that no known dialect"),
    "half": ({f"transformer.{LAYER}.lora_A.weight": PAIR["a"]}, {}, r"1 of 1 layers are no LoRA: .* has only a"),
    "shapes": (pair() | {f"transformer.{LAYER}.lora_B.weight": torch.ones(64, 3)}, {}, r"\(2, 64\) and \(64, 3\)"),
    "alpha": (pair() | {f"transformer.{LAYER}.alpha": torch.tensor(0.0)}, {}, r"has the alpha 0\.0"),
    "alphas": (pair() | {f"transformer.{LAYER}.alpha": torch.ones(2)}, {}, "has the alpha nan"),
    "negative": (pair(), {"alpha": -1.0}, r"has the alpha -1\.0"),
    "text": (pair() | {"lora_te_encoder.lora_down.weight": torch.ones(2)}, {}, "1 weights are for the text encoder"),
    "zero": (
        {
            "diffusion_model.blocks.0.attn.qkv.lora_down.weight": torch.ones(2, 64),
            "diffusion_model.blocks.0.attn.qkv.lora_up.weight": torch.zeros(192, 2),
        },
        {},
        "it changes nothing: every B in it is zero",
    ),
    "header": (pair(), {"header": {"lora_adapter_metadata": "{"}}, "the texts in the file's header are damaged"),
    "config": (pair(), {"config": {"lora_alpha": "8"}}, "says lora_alpha '8'; expected a number"),
    "empty": ({}, {}, "it holds no weights"),
    "lokr": ({f"transformer.{LAYER}.lokr_w1": torch.ones(4, 4)}, {}, "lacks factors, or has too many; it has lokr_w1"),
    "sizes": (
        {f"transformer.{LAYER}.lokr_w1": torch.ones(16, 4), f"transformer.{LAYER}.lokr_w2": torch.ones(4, 16)},
        {},
        "peft makes no LoKr with factors of these sizes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_adapter_is_refused_with_counts_and_names(name: str) -> None:
    tensors, told, message = BROKEN[name]
    with pytest.raises(UserError, match=message):
        read(tensors, **told)


def test_dora_of_a_part_of_a_joint_layer_has_no_place_in_comfy() -> None:
    own = updates(dora=True, layers=["transformer_blocks.0.attn1.to_q"])
    with pytest.raises(UserError, match=r"this DoRA is not of all of them.*choose kohya, diffusers, peft or merged"):
        to_comfy(own)
