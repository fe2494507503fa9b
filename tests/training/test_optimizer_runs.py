"""Whole runs with another optimizer or precision than the default. Oracles: bit equality after a break, the files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.files import Adapter
from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.runs.metadata import read_metadata
from pixart_ft.training.nested import load_nested
from tests.helpers.runs import STATE_FILES, STEPS, Options, cut_off, short_run, train


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run of this test's own; the cache is shared by all tests."""
    shown = {"validation.prompts": [], "validation.every": 0}
    return short_run(tiny, pictures, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache") | shown


def last_state(run: Path) -> dict[str, Any]:
    return {name: (run / "checkpoints" / f"step-{STEPS:06d}" / name).read_bytes() for name in STATE_FILES}


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / name / "adapter_model.safetensors")


def test_bfloat16_weights_train_break_and_load(options: Options, tiny: Path, tmp_path: Path) -> None:
    """Rounded at random: the last weights are saved as they are, their average in float32."""
    options |= {"optim.stochastic_rounding": True, "train.mixed_precision": "bf16"}
    straight = train(options)
    cut_off(5, options, run__folder=tmp_path / "cut")
    assert last_state(train(options, run__folder=tmp_path / "cut", resume="auto")) == last_state(straight)
    averaged, raw = weights(straight, "adapter"), weights(straight, "adapter_raw")
    assert {w.dtype for w in averaged.values()} == {torch.float32} and {w.dtype for w in raw.values()} == {
        torch.bfloat16
    }
    assert all(w.any() for w in raw.values()), "every B has moved from zero"
    transformer = loading.load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(straight, weights="raw"))
    loaded = dict(transformer.named_parameters())
    for name, value in raw.items():
        own = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(loaded[own], value.float())


def test_what_is_measured_drawn_and_kept_is_schedule_free_s_average(options: Options, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    options |= {"optim.optimizer": "schedule_free", "optim.decay": "constant", "train.ema_decay": 0.0}
    straight = train(options)
    cut_off(5, options, run__folder=tmp_path / "cut")
    assert last_state(train(options, run__folder=tmp_path / "cut", resume="auto")) == last_state(straight)
    assert not (straight / "final" / "adapter_raw").exists()
    assert read_metadata(straight / "final" / "adapter").weights == "ema"  # an average, of which there is no other
    checkpoint = straight / "checkpoints" / f"step-{STEPS:06d}"
    trained = load_nested(checkpoint / "trained.safetensors")
    state = load_nested(checkpoint / "optimizer.safetensors")["state"]
    for number, (name, y) in enumerate(trained.items()):
        x = (y.double() - (1 - 0.9) * state[number]["z"].double()) / 0.9
        kept = weights(straight, "adapter")["base_model.model." + name.replace(".default.", ".")]
        torch.testing.assert_close(kept.double(), x, rtol=1e-5, atol=1e-6)
        assert not torch.equal(kept, y)


def test_what_rounding_cannot_be_with_is_told_before_anything_is_made(options: Options) -> None:
    options |= {"optim.stochastic_rounding": True, "train.mixed_precision": "fp16"}
    with pytest.raises(UserError, match=r"(?s)2 problems.*fp16 needs a CUDA GPU.*set train.mixed_precision bf16"):
        train(options)
    assert not Path(options["run.folder"]).exists()


def test_a_pattern_that_no_weight_has_is_told_before_anything_is_loaded(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: object, **how: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(loading, "_load", load)
    options["optim.groups"] = [{"pattern": "*lora_B*", "learning_rate": 0.1}, {"pattern": "*lora_C*"}]
    for init in ("default", "pissa"):
        with pytest.raises(UserError, match=r"optim.groups: no trained weight falls to .* '\*lora_C\*'; .*lora_A"):
            train(options, adapter__init=init, adapter__dropout=0.0)
    part: Options = {"adapter.kind": "full", "adapter.trainable": ["*.bias"], "optim.optimizer": "muon"}
    kept = {key: value for key, value in options.items() if not key.startswith("adapter.")}
    with pytest.raises(UserError, match=r"(?s)2 problems.*optim.groups: .*lora_B.*lora_C.*muon is for the matrices"):
        train(kept | part)
    assert not Path(options["run.folder"]).exists()


def test_full_fine_tuning_in_the_least_memory_breaks_and_goes_on(options: Options, tiny: Path, tmp_path: Path) -> None:
    """Weights in bfloat16, stepped in the backward pass by Adafactor, which keeps next to nothing."""
    kept = {key: value for key, value in options.items() if not key.startswith("adapter.")}
    least = {"optim.optimizer": "adafactor", "optim.stochastic_rounding": True, "optim.in_backward": True}
    options = kept | least | {"adapter.kind": "full", "optim.clip_norm": 0, "train.mixed_precision": "bf16"}
    options |= {"train.ema_decay": 0, "optim.learning_rate": 1e-3}
    straight = train(options)
    cut_off(5, options, run__folder=tmp_path / "cut")
    assert last_state(train(options, run__folder=tmp_path / "cut", resume="auto")) == last_state(straight)
    trained = load_nested(straight / "checkpoints" / f"step-{STEPS:06d}" / "trained.safetensors")
    base = loading.load_transformer(Base.read(tiny), dtype=torch.bfloat16).state_dict()
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}
    moved = {name for name, value in trained.items() if not torch.equal(value, base[name])}
    assert len(moved) == len(trained) > 20
