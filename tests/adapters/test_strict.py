"""What a saved adapter says of itself: whole, free of contradictions, and meant as peft means it.

Oracles: hashlib, and plain peft on the same folder.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.adapters.full import save_model
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from tests.helpers.adapters import make_adapter, metadata_of, save_peft, spoilt
from tests.helpers.networks import call

FILES = ("adapter_config.json", "adapter_model.safetensors", "null_caption.safetensors", "pixart_ft.json")


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is only read."""
    return make_adapter(tiny, tmp_path_factory.mktemp("strict") / "kept")


def test_the_manifest_has_the_size_and_digest_of_every_file(kept: Path) -> None:
    manifest = json.loads((kept / "manifest.json").read_text())
    assert tuple(manifest) == FILES
    for name, (size, digest) in manifest.items():
        content = (kept / name).read_bytes()
        assert size == len(content) and digest == hashlib.sha256(content).hexdigest()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_refused(kept: Path, name: str) -> None:
    path = kept / name
    whole = path.read_bytes()
    try:
        for place in {0, len(whole) - 1, *range(7, len(whole), max(1, len(whole) // 20))}:
            path.write_bytes(flipped(whole, place))
            with pytest.raises(UserError, match=r"^adapter: .*(copy the |train again)"):
                Adapter.read(kept)
    finally:
        path.write_bytes(whole)


def test_a_flipped_byte_of_the_manifest_is_refused_or_changes_nothing(kept: Path) -> None:
    path, known = kept / "manifest.json", Adapter.read(kept)
    whole = path.read_bytes()
    refused = 0
    try:
        for place in range(0, len(whole), 3):
            path.write_bytes(flipped(whole, place))
            with suppress(UserError):
                assert Adapter.read(kept) == known
                continue
            refused += 1
    finally:
        path.write_bytes(whole)
    assert refused > 0.25 * len(whole)  # the rest is white space


def test_a_lost_file_is_named_and_one_that_was_added_is_no_fault(kept: Path, tmp_path: Path) -> None:
    (kept / "README.md").write_text("a card")
    known = Adapter.read(kept)
    (kept / "README.md").unlink()
    assert Adapter.read(kept) == known
    (kept / "null_caption.safetensors").rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match=r"null_caption\.safetensors is missing; copy the folder again"):
            Adapter.read(kept)
    finally:
        (tmp_path / "away").rename(kept / "null_caption.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter_config.json", {"lora_alpha": 8.0}, r"contradict each other \(alpha 6\.0 and 8\.0\)"),
        ("adapter_config.json", {"r": 8}, r"contradict each other \(rank 4 and 8\)"),
        ("pixart_ft.json", {"rank": 2, "alpha": 1.0}, r"contradict each other \(rank 2 and 4, alpha 1\.0 and 6\.0\)"),
        ("pixart_ft.json", {"kind": "peft"}, r"contradict each other \(kind peft and lora\)"),
        ("adapter_config.json", {"r": 0}, r"r is 0 \(Input should be greater than or equal to 1\)"),
        ("adapter_config.json", {"r": -4}, "r is -4 "),
        ("adapter_config.json", {"r": "4"}, r'r is "4" \(Input should be a valid integer\)'),
        ("adapter_config.json", {"r": 10**9}, "r is 1000000000 "),
        ("adapter_config.json", {"lora_alpha": 0}, "lora_alpha is 0 "),
        ("adapter_config.json", {"lora_alpha": -8}, "lora_alpha is -8 "),
        ("adapter_config.json", {"rank_pattern": {"to_q": 0}}, r"rank_pattern\.to_q is 0 "),
        ("adapter_config.json", {"target_modules": []}, r"target_modules\S* is \[\]"),
        ("adapter_config.json", {"target_modules": "("}, "peft cannot make it here"),
        ("adapter_config.json", {"peft_type": 7}, "peft_type is 7"),
        ("adapter_config.json", {"peft_type": "LOKR", "r": 10**9}, "r is 1000000000 "),
        ("pixart_ft.json", {"max_tokens": "abc"}, 'max_tokens is "abc"'),
        ("pixart_ft.json", {"base_fingerprint": "none"}, 'base_fingerprint is "none"'),
        ("pixart_ft.json", {"schedule": {"beta_start": "x"}}, r'schedule\.beta_start is "x"'),
        ("pixart_ft.json", {"schedule": {"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}}, "schedule is "),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_told_by_name(
    tiny: Path, kept: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match=message):
        load_adapter(transformer, Adapter.read(spoilt(kept, tmp_path / "spoilt", file, change)))


@pytest.mark.parametrize(
    "field",
    [
        {"fan_in_fan_out": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["proj_out"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"a_switch_of_the_future": 3},
    ],
    ids=str,
)
def test_what_peft_would_draw_otherwise_for_is_refused_by_name(
    kept: Path, tmp_path: Path, field: dict[str, Any]
) -> None:
    (name,) = field
    with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is .*: peft draws otherwise for it"):
        Adapter.read(spoilt(kept, tmp_path / "spoilt", "adapter_config.json", field))
    off = dict.fromkeys(field) | {"init_lora_weights": "gaussian", "megatron_core": "megatron.core", "loftq_config": {}}
    found = Adapter.read(spoilt(kept, tmp_path / "idle", "adapter_config.json", off))
    assert found.settings == Adapter.read(kept).settings


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {r"attn1\.to_k": 3.0}},
        {"rank_pattern": {r"^transformer_blocks\.0\.attn2\.to_v": 7}, "use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
        {"layers_to_transform": 0, "layers_pattern": ["transformer_blocks"]},
        {"exclude_modules": ["attn2.to_q"]},
        {"target_modules": r".*\.attn1\.to_(q|v)"},
    ],
    ids=str,
)
def test_what_peft_draws_otherwise_for_is_drawn_so(tiny: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_k", "to_v"]} | fields
    base = load_transformer(Base.read(tiny), dtype=torch.float32)
    mark, before = fingerprint(base), call(base)
    try:
        theirs = get_peft_model(base, LoraConfig(**settings))
    except ValueError:
        assert version("peft") < "0.19" and "layers_pattern" in fields
        pytest.skip("this peft finds layers by their numbers only below another module")
    draw = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    save_peft(tmp_path / "theirs", theirs, mark, LoraSettings(4, 12.0))
    ours = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(ours, Adapter.read(tmp_path / "theirs"))
    torch.testing.assert_close(call(ours), call(theirs), rtol=1e-5, atol=1e-5)
    assert (call(ours) - before).abs().max() > 0.05


def test_ranks_are_those_of_the_weights_before_any_memory_is_taken(tiny: Path, kept: Path, tmp_path: Path) -> None:
    """Both files agree, and the weights say otherwise."""
    folder = spoilt(kept, tmp_path / "wide", "adapter_config.json", {"r": 4096})
    spoilt(folder, folder, "pixart_ft.json", {"rank": 4096})
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match=r"16 weights .* of another rank than .*: base_model\S+ is of rank 4, not 4096"):
        load_adapter(transformer, Adapter.read(folder))


@pytest.mark.parametrize("shape", [(1, 31), (2, 32), (0, 32)])
def test_a_null_caption_of_another_shape_is_refused(
    tiny: Path, kept: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    folder = spoilt(kept, tmp_path / "spoilt", "pixart_ft.json", {})
    save_file({"null_caption": torch.zeros(shape)}, folder / "null_caption.safetensors")
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match=r"null_caption of shape \(\d, \d+\), and this base takes \(1, 32\)"):
        load_adapter(transformer, Adapter.read(folder))


def test_weights_that_are_not_finite_are_refused(tiny: Path, kept: Path, tmp_path: Path) -> None:
    folder = spoilt(kept, tmp_path / "spoilt", "pixart_ft.json", {})
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    with pytest.raises(UserError, match="are not finite"):
        load_adapter(transformer, Adapter.read(folder))


def test_a_whole_model_is_checked_where_it_is_read(tiny: Path, tmp_path: Path) -> None:
    """Its words when it is read, its weights when they are loaded, and all their sizes before."""
    base, folder = Base.read(tiny), tmp_path / "model"
    transformer = load_transformer(base, dtype=torch.float32)
    about = replace(metadata_of(fingerprint(transformer), LoraSettings(4, 1.0)), kind="full", rank=None, alpha=None)
    save_model(folder, transformer, base, replace(about, base=str(tiny)), torch.zeros(1, 32), whole=False)
    assert torch.equal(call(load_transformer(Base.read(folder), dtype=torch.float32)), call(transformer))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(flipped(whole, len(whole) - 9))
    read = Base.read(folder)
    with pytest.raises(UserError, match=r"model\.base: the contents of .*model\.safetensors have changed; copy the fo"):
        load_transformer(read, dtype=torch.float32)
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"has {len(whole) - 1} bytes instead of {len(whole)}"):
        Base.read(folder)
    weights.write_bytes(whole)
    words = folder / "pixart_ft.json"
    words.write_text(words.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    with pytest.raises(UserError, match=r"the contents of .*pixart_ft\.json have changed"):
        Base.read(folder)
