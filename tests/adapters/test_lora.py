"""LoRA adapters. Oracles: W + scale alpha/rank B A by hand, plain peft, the stock pipeline after merging."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_ft.adapters.acting import load_adapter, merge
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.adapters.targets import check_rank
from pixart_ft.adapters.weights import fill_adapter, save_adapter
from pixart_ft.config.train import Weights
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import fingerprint, load_transformer
from pixart_ft.model.text import TEXT_PREPARATION
from pixart_ft.runs.metadata import AdapterMetadata, read_metadata
from pixart_ft.runs.results import final
from tests.helpers.tiny import build_tiny_pipeline

SETTINGS = LoraSettings(rank=4, alpha=12.0)  # alpha is not the rank, so a loader that assumes it is gives itself away
NULL = torch.linspace(-1, 1, 32).view(1, 32)


def lora(transformer: PixArtTransformer2DModel) -> dict[str, Tensor]:
    return {name: p for name, p in transformer.named_parameters() if ".lora_" in name}


def base(tiny: Path, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    return load_transformer(Base.read(tiny), dtype=dtype)


def trained(tiny: Path, settings: LoraSettings = SETTINGS) -> PixArtTransformer2DModel:
    """A base with an adapter that does something: B is no longer zero."""
    transformer = base(tiny)
    attach(transformer, settings, seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in lora(transformer).items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return transformer


def metadata(transformer: PixArtTransformer2DModel, settings: LoraSettings = SETTINGS) -> AdapterMetadata:
    return AdapterMetadata(
        base="demo",
        base_fingerprint=fingerprint(transformer),
        prediction_type="epsilon",
        schedule={"beta_schedule": "linear", "beta_start": 1e-4},
        variance="trained",
        rank=settings.rank,
        alpha=settings.alpha,
        max_tokens=300,
        text_preparation=TEXT_PREPARATION,
        weights="raw",
        samples_seen=64,
    )


def output(transformer: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return transformer(
            torch.randn(2, 4, 8, 8, generator=draw).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=draw).to(dtype),
            encoder_attention_mask=torch.ones(2, 5),
            timestep=torch.tensor([10, 700]),
        ).sample


@pytest.fixture
def saved(tiny: Path, tmp_path: Path) -> Path:
    transformer = trained(tiny)
    save_adapter(tmp_path / "adapter", transformer, metadata(transformer), NULL)
    return tmp_path / "adapter"


@pytest.fixture
def older(saved: Path) -> Path:
    """From before there were manifests: what is in its files counts as it stands."""
    (saved / "manifest.json").unlink()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_changes_no_output_and_trains_the_lora_alone_in_float32(tiny: Path, dtype: torch.dtype) -> None:
    transformer = base(tiny, dtype).requires_grad_(True)
    before = output(transformer, dtype)
    state = torch.get_rng_state()
    attach(transformer, replace(SETTINGS, dropout=0.5), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(transformer, dtype), before)
    trainable = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trainable == lora(transformer).keys()
    assert len(trainable) == 2 * 4 * 2 * 2  # A and B of four layers in two attentions of two blocks
    assert {p.dtype for p in lora(transformer).values()} == {torch.float32}


def test_initial_weights_are_a_function_of_seed_and_layer(tiny: Path) -> None:
    first, again, narrow, other = (base(tiny) for _ in range(4))
    attach(first, SETTINGS, seed=0)
    torch.rand(7)
    attach(again, SETTINGS, seed=0)
    attach(narrow, replace(SETTINGS, targets=("to_k",)), seed=0)
    attach(other, SETTINGS, seed=1)
    for name, parameter in lora(first).items():
        assert torch.equal(lora(again)[name], parameter)
        if ".lora_A." in name:
            assert not torch.equal(lora(other)[name], parameter)
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
    begun = [parameter for name, parameter in lora(first).items() if ".lora_A." in name]
    assert len({parameter[0, 0].item() for parameter in begun}) == len(begun)  # each layer begins with its own
    assert all(torch.equal(parameter, lora(first)[name]) for name, parameter in lora(narrow).items())


def test_dropout_sleeps_in_eval_mode_and_wakes_in_training(tiny: Path) -> None:
    transformer = trained(tiny, replace(SETTINGS, dropout=0.5))
    assert torch.equal(output(transformer), output(transformer))
    transformer.train()
    assert not torch.equal(output(transformer), output(transformer))


def test_output_is_w_plus_alpha_over_rank_b_a(tiny: Path) -> None:
    transformer, by_hand = trained(tiny), base(tiny)
    weights = lora(transformer)
    with torch.no_grad():
        for name in (key for key in weights if ".lora_A." in key):
            layer = by_hand.get_submodule(name.split(".lora_A.")[0])
            layer.weight += 12.0 / 4 * weights[name.replace("lora_A", "lora_B")] @ weights[name]
    torch.testing.assert_close(output(transformer), output(by_hand), rtol=1e-4, atol=1e-5)
    assert (output(transformer) - output(base(tiny))).abs().max() > 0.05


@pytest.mark.parametrize("target", ["pos_embed.proj", "ff.net.0.proj", "proj_out", "transformer_blocks.1.attn1.to_q"])
def test_other_layers_can_be_targets(tiny: Path, target: str) -> None:
    transformer = trained(tiny, replace(SETTINGS, targets=(target,)))
    assert all(f"{target}.lora_" in name for name in lora(transformer))
    before = output(transformer)
    merge(transformer)
    torch.testing.assert_close(output(transformer), before, rtol=1e-4, atol=1e-5)


def test_each_target_must_match_a_layer(tiny: Path) -> None:
    transformer = base(tiny)
    with pytest.raises(
        UserError, match=r"adapter\.targets: 'to_out' matches no layer; near: .*to_out\.0.*'to_kv' matches"
    ):
        attach(transformer, replace(SETTINGS, targets=("to_q", "to_out", "to_kv")), seed=0)
    assert not lora(transformer)


def test_a_rank_above_what_a_layer_can_use_is_refused_by_the_layer(tiny: Path) -> None:
    transformer = base(tiny)  # 64 wide; the last layer gives 2 x 2 x 8 values
    check_rank(transformer, 64, ("to_q", "net.0.proj"))
    check_rank(transformer, 32, ("to_q", "proj_out"))
    with pytest.raises(UserError, match=r"^adapter\.rank 65 is more than the 64 that .*to_q can use; lower it$"):
        check_rank(transformer, 65, ("to_q",))
    with pytest.raises(UserError, match=r"^adapter\.rank 33 is more than the 32 that proj_out can use; lower it$"):
        check_rank(transformer, 33, ("to_q", "proj_out"))
    patches = transformer.pos_embed.proj  # a convolution of 4 channels x 2 x 2
    assert patches.weight[0].numel() == 16
    check_rank(transformer, 16, ("pos_embed.proj",))
    with pytest.raises(UserError, match="17 is more than the 16"):
        check_rank(transformer, 17, ("pos_embed.proj",))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_saved_and_loaded_gives_the_same_output_times_scale(tiny: Path, saved: Path, scale: float) -> None:
    loaded = base(tiny)
    found, null = load_adapter(loaded, Adapter.read(saved), scale=scale)
    assert found.metadata == metadata(base(tiny)) and (found.path, found.scale) == (str(saved), scale)
    assert null is not None and torch.equal(null, NULL)
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = trained(tiny)
    for name, parameter in lora(expected).items():
        if ".lora_B." in name:
            parameter.data *= scale
    torch.testing.assert_close(output(loaded), output(expected), rtol=1e-5, atol=1e-6)
    if scale == 1:
        assert torch.equal(output(loaded), output(expected))


def test_plain_peft_reads_what_we_save(tiny: Path, saved: Path) -> None:
    expected = output(trained(tiny))
    peft_model = PeftModel.from_pretrained(base(tiny), str(saved))
    torch.testing.assert_close(output(peft_model), expected, rtol=1e-5, atol=1e-6)
    assert (expected - output(base(tiny))).abs().max() > 0.05


def test_saving_twice_writes_the_same_bytes_and_leaves_nothing_else(tiny: Path, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert sorted(before) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "null_caption.safetensors",
        "pixart_ft.json",
    ]
    transformer = trained(tiny)
    save_adapter(saved, transformer, metadata(transformer), NULL)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12.0, "demo")
    assert config["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


def test_other_values_such_as_an_average_can_be_saved(tiny: Path, tmp_path: Path) -> None:
    transformer = trained(tiny)
    halves = {name: parameter.detach() / 2 for name, parameter in lora(transformer).items()}
    save_adapter(tmp_path / "half", transformer, metadata(transformer), NULL, halves)
    loaded = base(tiny)
    load_adapter(loaded, Adapter.read(tmp_path / "half"))
    assert all(torch.equal(parameter, halves[name]) for name, parameter in lora(loaded).items())


def test_merged_transformer_saves_in_a_stock_pipeline_and_reloads(tiny: Path, saved: Path, tmp_path: Path) -> None:
    transformer = base(tiny)
    load_adapter(transformer, Adapter.read(saved), scale=0.7)
    expected = output(transformer)
    merge(transformer)
    assert not hasattr(transformer, "peft_config") and transformer.state_dict().keys() == base(tiny).state_dict().keys()
    torch.testing.assert_close(output(transformer), expected, rtol=1e-4, atol=1e-5)
    PixArtSigmaPipeline.from_pretrained(str(tiny), transformer=transformer).save_pretrained(str(tmp_path / "merged"))
    reloaded = PixArtSigmaPipeline.from_pretrained(str(tmp_path / "merged")).transformer
    assert torch.equal(output(reloaded), output(transformer))


def test_another_base_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    other = load_transformer(Base.read(build_tiny_pipeline(tmp_path / "other", seed=9)), dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"trained on the base demo \(\w{16}\), not on .*other \(\w{16}\); use --model demo"
    ):
        load_adapter(other, Adapter.read(saved))
    assert not lora(other)


def test_a_bfloat16_base_takes_the_adapter_too(tiny: Path, saved: Path) -> None:
    half = base(tiny, torch.bfloat16)
    load_adapter(half, Adapter.read(saved))
    assert (output(half, torch.bfloat16).float() - output(trained(tiny))).abs().max() < 0.1


def drop_key(weights: dict[str, Tensor]) -> str:
    del weights[next(key for key in weights if "blocks.1.attn2.to_v.lora_B" in key)]
    missing = r"1 in the model but not in the file: .*blocks\.1\.attn2\.to_v\.lora_B"
    return rf"do not fit \(31 of 31 do, 32 are needed\):\n  - {missing}"


def rename_key(weights: dict[str, Tensor]) -> str:
    key = next(iter(weights))
    weights["unet." + key] = weights.pop(key)
    near = re.escape(key.replace("unet.", ""))
    return (
        rf"31 of 32 do(.|\n)*1 in the file but not in the model: unet\.base_model(.|\n)*nearest to unet\.\S+ is {near}"
    )


def add_key(weights: dict[str, Tensor]) -> str:
    weights["base_model.model.proj_out.lora_A.weight"] = torch.ones(4, 64)
    return r"32 of 33 do, 32 are needed\):\n  - 1 in the file but not in the model: base_model\.model\.proj_out\.lora_A"


def reshape_key(weights: dict[str, Tensor]) -> str:
    key = next(key for key in weights if "lora_A" in key)
    weights[key] = weights[key][:2].clone()
    return r"1 weights in .* are of another rank than adapter_config\.json says: base_model.* is of rank 2, not 4"


@pytest.mark.parametrize("spoil", [drop_key, add_key, rename_key, reshape_key])
def test_every_key_must_land_and_every_place_be_filled(
    tiny: Path, older: Path, spoil: Callable[[dict[str, Tensor]], str]
) -> None:
    weights = load_file(older / "adapter_model.safetensors")
    message = spoil(weights)
    save_file(weights, older / "adapter_model.safetensors")
    transformer = base(tiny)
    with pytest.raises(UserError, match=message):
        load_adapter(transformer, Adapter.read(older))
    assert not lora(transformer) and torch.equal(output(transformer), output(base(tiny)))  # nothing is left of it


def test_fill_starts_a_new_adapter_from_old_weights(tiny: Path, saved: Path) -> None:
    transformer = base(tiny)
    attach(transformer, SETTINGS, seed=5)
    fill_adapter(transformer, Adapter.read(saved), fingerprint(base(tiny)))
    assert all(torch.equal(parameter, lora(trained(tiny))[name]) for name, parameter in lora(transformer).items())
    assert all(parameter.requires_grad for parameter in lora(transformer).values())
    wider = base(tiny)
    attach(wider, replace(SETTINGS, rank=8), seed=5)
    with pytest.raises(UserError, match=r"32 of another shape \(another adapter\.rank\?\)"):
        fill_adapter(wider, Adapter.read(saved), fingerprint(base(tiny)))


def test_adapters_are_found_by_folder_and_by_run(tiny: Path, older: Path, tmp_path: Path) -> None:
    def folder(path: Path | str, weights: Weights = "ema") -> Path:
        return Adapter.read(path, weights=weights).folder

    assert folder(older) == folder(str(older), "raw") == older
    run = tmp_path / "runs" / "style"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"the run .*style has no final adapter yet: finish it with --resume auto"):
        Adapter.read(run)
    with pytest.raises(UserError, match=r"there is no .*stile; did you mean .*style\?"):
        Adapter.read(run.with_name("stile"))
    with pytest.raises(UserError, match=r"there is no .*; give an adapter folder or a run folder"):
        Adapter.read(tmp_path / "no" / "where")
    with pytest.raises(UserError, match="neither an adapter folder nor a run folder"):
        Adapter.read(older / "adapter_model.safetensors")

    shutil.copytree(older, run / final("adapter")["ema"])
    assert folder(run) == folder(run, "raw") == run / "final" / "adapter"  # a run without average
    content = json.loads((older / "pixart_ft.json").read_text())
    (run / "final" / "adapter" / "pixart_ft.json").write_text(json.dumps(content | {"weights": "ema"}))
    with pytest.raises(UserError, match="kept only its averaged weights"):
        Adapter.read(run, weights="raw")
    shutil.copytree(older, run / final("adapter")["raw"])
    assert folder(run, "raw") == run / "final" / "adapter_raw"
    assert folder(run) == run / "final" / "adapter"

    (older / "pixart_ft.json").unlink()
    with pytest.raises(UserError, match=r"has no pixart_ft\.json, so it was not made here"):
        Adapter.read(older)


def test_damaged_adapters_name_the_file(tiny: Path, older: Path) -> None:
    (older / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"cannot read .*adapter_model\.safetensors"):
        load_adapter(base(tiny), Adapter.read(older))
    content = json.loads((older / "pixart_ft.json").read_text())
    (older / "pixart_ft.json").write_text(json.dumps(content | {"future": 1}))
    with pytest.raises(UserError, match=r"another version of pixart_ft \(fields future\)"):
        read_metadata(older)
    del content["time_conditioning"]  # as files had it before there was a choice
    (older / "pixart_ft.json").write_text(json.dumps(content))
    assert read_metadata(older).time_conditioning == "index"
    del content["schedule"]
    (older / "pixart_ft.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another version of pixart_ft \(fields schedule\)"):
        read_metadata(older)
    (older / "pixart_ft.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*pixart_ft\.json"):
        load_adapter(base(tiny), Adapter.read(older))


def test_captions_prepared_in_another_way_are_refused(tiny: Path, older: Path) -> None:
    content = json.loads((older / "pixart_ft.json").read_text())
    (older / "pixart_ft.json").write_text(json.dumps(content | {"text_preparation": "as it came"}))
    with pytest.raises(UserError, match="prepared by as it came"):
        load_adapter(load_transformer(Base.read(tiny), dtype=torch.float32), Adapter.read(older))
