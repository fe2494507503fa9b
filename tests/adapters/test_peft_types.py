"""Adapters of every other type of peft. Oracles: the base that must stay as it is, and what was saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_ft.adapters.acting import load_adapter, merge, scale_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import DEFAULT_TARGETS, Adapter, LoraSettings, PeftSettings
from pixart_ft.adapters.weights import save_adapter
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from tests.helpers.adapters import metadata_of
from tests.helpers.networks import call

TYPES: dict[str, dict[str, Any]] = {
    "LOKR": {"r": 4, "alpha": 8},
    "LOHA": {"r": 4, "rank_dropout": 0.1},
    "OFT": {"r": 0, "oft_block_size": 8},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "FOURIERFT": {"n_frequency": 16},
    "RANDLORA": {"r": 4},  # its layers share a constant
    "SHIRA": {"r": 4},  # and this one's have constants of their own
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_beside_the_base_and_comes_back(tiny: Path, tmp_path: Path, kind: str) -> None:
    base = Base.read(tiny)
    transformer, untouched, loaded = (load_transformer(base, dtype=torch.float32) for _ in range(3))
    before, mark, state = call(untouched), fingerprint(untouched), torch.get_rng_state()
    attach(transformer, PeftSettings(kind, DEFAULT_TARGETS, TYPES[kind]), seed=0)
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(transformer) == mark
    draw = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    expected = call(transformer)
    assert (expected - before).abs().max() > 0.05
    about = replace(metadata_of(mark, LoraSettings(4, 8.0)), rank=None, alpha=None, kind="peft")
    save_adapter(tmp_path / "a", transformer, about, torch.zeros(1, 32))
    adapter = Adapter.read(tmp_path / "a")
    assert isinstance(adapter.settings, PeftSettings) and adapter.settings.peft_type == kind
    assert {**adapter.settings.options, **TYPES[kind]} == adapter.settings.options
    load_adapter(loaded, adapter)
    assert torch.equal(call(loaded), expected)
    scale_adapter(loaded, 0.0)
    assert torch.equal(call(loaded), before)
    scale_adapter(loaded, 0.5)
    assert (call(loaded) - before).abs().max() > 0.01 and (call(loaded) - expected).abs().max() > 0.01
    with pytest.raises(UserError, match="merged at another scale than 1"):
        merge(loaded)
    scale_adapter(loaded, 1.0)
    merge(loaded)
    torch.testing.assert_close(call(loaded), expected, rtol=1e-4, atol=1e-4)


def test_the_beginning_of_any_type_follows_from_the_seed(tiny: Path) -> None:
    base, outputs = Base.read(tiny), []
    for seed in (0, 0, 1):
        transformer = load_transformer(base, dtype=torch.float32)
        torch.rand(seed + 3)
        attach(transformer, PeftSettings("FOURIERFT", DEFAULT_TARGETS, {"n_frequency": 16}), seed=seed)
        outputs.append(call(transformer))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_what_changes_the_base_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixart_ft.adapters import attach as attaching

    monkeypatch.setattr(attaching, "_ELSEWHERE", {})
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match=r"peft_type LORA: with these options it changes the base itself \(transformer"):
        attach(transformer, PeftSettings("LORA", ("to_q",), {"r": 4, "init_lora_weights": "pissa"}), seed=0)


def test_what_peft_looks_for_in_vain_is_named(tiny: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match="peft_type IA3: peft cannot make it here: it looks for 'model_type', which is"):
        attach(transformer, PeftSettings("IA3", DEFAULT_TARGETS, {}), seed=0)
