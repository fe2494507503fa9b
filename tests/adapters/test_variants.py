"""Kinds of LoRA. Oracles: the formulas by hand, plain peft on what was saved, the base that must stay as it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from torch import Tensor, nn

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.adapters.targets import named
from pixart_ft.adapters.weights import save_adapter
from pixart_ft.config.train import TARGETS, load_config
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from tests.helpers.adapters import metadata_of
from tests.helpers.networks import call

VARIANTS = {
    "rslora": LoraSettings(4, 12.0, rslora=True),
    "dora": LoraSettings(4, 12.0, dora=True),
    "pissa": LoraSettings(4, 12.0, init="pissa"),
    "pissa_rslora": LoraSettings(4, 12.0, rslora=True, init="pissa"),
    "olora": LoraSettings(4, 12.0, (*TARGETS["attention+mlp"], "pos_embed.proj"), init="olora"),
}


def network(tiny: Path, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    return load_transformer(Base.read(tiny), dtype=dtype)


def moved(transformer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Move what is trained, as training would, and give it by name."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
            yield name, parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_begins_as_the_base_and_comes_back_on_it(
    tiny: Path, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    """To rounding: what began as a part of the weights is added and taken away again."""
    settings, transformer, untouched = VARIANTS[variant], network(tiny, dtype), network(tiny, dtype)
    before, mark = call(untouched), fingerprint(untouched)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    attach(transformer, settings, seed=0)
    if settings.dora or settings.init != "default":  # rows divided and multiplied again; a part added and taken away
        torch.testing.assert_close(call(transformer), before, **close)
    else:
        assert torch.equal(call(transformer), before)
    trained = dict(moved(transformer))
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert (call(transformer) - before).abs().max() > 0.1
    for name, parameter in untouched.named_parameters():
        assert any(torch.equal(parameter, own) for own in _named(transformer, name)), f"{name} was changed"
    save_adapter(tmp_path / "a", transformer, metadata_of(mark, settings), torch.zeros(1, 32))
    adapter = Adapter.read(tmp_path / "a")
    twice = 2 if settings.init != "default" else 1
    assert isinstance(adapter.settings, LoraSettings)
    assert adapter.settings.rank == adapter.metadata.rank == 4 * twice
    loaded = network(tiny, dtype)
    load_adapter(loaded, adapter)
    torch.testing.assert_close(call(loaded), call(transformer), **close)
    theirs = PeftModel.from_pretrained(network(tiny, dtype), str(tmp_path / "a"))
    torch.testing.assert_close(call(theirs), call(transformer), **close)


def _named(transformer: nn.Module, name: str) -> list[Tensor]:
    return [p for n, p in transformer.named_parameters() if n.replace(".base_layer.", ".") == name]


def test_rslora_divides_by_the_root_of_the_rank_and_dora_trains_the_length_of_rows(tiny: Path) -> None:
    for variant in ("rslora", "dora"):
        transformer, by_hand = network(tiny), network(tiny)
        attach(transformer, VARIANTS[variant], seed=0)
        weights = dict(moved(transformer))
        for name in (key for key in weights if ".lora_A." in key):
            layer = by_hand.get_submodule(name.split(".lora_A.")[0])
            update = weights[name.replace("lora_A", "lora_B")] @ weights[name]
            with torch.no_grad():
                layer.weight += update * (12.0 / 4**0.5 if variant == "rslora" else 12.0 / 4)
                if variant == "dora":
                    length = weights[name.replace("lora_A", "lora_magnitude_vector")]
                    layer.weight *= (length / layer.weight.norm(dim=1))[:, None]
        torch.testing.assert_close(call(transformer), call(by_hand), rtol=1e-4, atol=1e-4)


def test_pissa_begins_with_the_best_approximation_of_its_rank(tiny: Path) -> None:
    """Eckart and Young: what is left of W has the singular values after the first four, and no others."""
    transformer = network(tiny)
    attach(transformer, VARIANTS["pissa"], seed=0)
    layer = transformer.transformer_blocks[0].attn1.to_q
    part = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    whole = layer.base_layer.weight
    values = torch.linalg.svdvals(whole)
    rest = torch.linalg.svdvals(whole - part)
    torch.testing.assert_close(rest[:-4], values[4:], rtol=1e-4, atol=1e-5 * values[0].item())
    assert rest[-4:].max() < 1e-5 * values[0]


def test_named_targets_leave_the_last_layer_to_an_objective_that_trains_the_variance(tiny: Path) -> None:
    transformer = network(tiny)
    linear = {name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    for last_layer in (True, False):
        targets = named(["all-linear"], last_layer=last_layer)
        meant = {name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)}
        assert meant == linear - (set() if last_layer else {"proj_out"})
    assert named(["attention", "to_k", "net.2"], last_layer=True) == ("to_q", "to_k", "to_v", "to_out.0", "net.2")
    assert named(["proj_out"], last_layer=False) == ("proj_out",)  # asked for by its own name


def test_the_former_section_is_refused_with_the_new_name_of_each_key() -> None:
    with pytest.raises(UserError) as refused:
        load_config({"lora": {"rank": 4, "alpha": 4.0, "targets": ["to_q"], "dropout": 0.1}, "data": {"folder": "x"}})
    for key in ("rank", "alpha", "targets", "dropout"):
        assert f"lora.{key}: unknown key; did you mean adapter.{key}?" in str(refused.value)
    with pytest.raises(UserError, match=r"adapter\.dora true with adapter\.init"):
        load_config({"adapter": {"dora": True, "init": "pissa"}, "data": {"folder": "x"}})
