"""The keys of training and generation, the rules between them, and the shipped configurations."""

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pixart_ft.config import GenerateConfig, Sampler, TrainConfig, load_config
from pixart_ft.errors import UserError
from pixart_ft.samplers import SAMPLERS
from pixart_ft.settings import default, keys, load, shipped_configs, to_yaml

ROOT = Path(__file__).parents[1]
BASE = {"data.folder": "pictures"}


@pytest.mark.parametrize("kind", [TrainConfig, GenerateConfig])
def test_every_key_is_described_in_one_line(kind: type[Any]) -> None:
    for key, field in keys(kind).items():
        assert field.description, key
        assert "\n" not in field.description, key


def test_only_the_pictures_are_required() -> None:
    assert [key for key, field in keys(TrainConfig).items() if field.is_required()] == ["data.folder"]
    assert not any(field.is_required() for field in keys(GenerateConfig).values())


def test_defaults_are_valid_by_their_own_rules(tmp_path: Path) -> None:
    """Pydantic does not validate defaults; written out and read again they are."""
    config = load_config({}, BASE)
    assert config.diffusion.objective == "hybrid"  # the learned variance stays trained unless asked otherwise
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    drawing = load(GenerateConfig, {"prompts": ["a"]})
    file.write_text(to_yaml(drawing))
    assert load(GenerateConfig, file) == drawing


def test_a_configuration_is_frozen() -> None:
    config = load_config({}, BASE)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_samplers_are_those_of_the_table() -> None:
    assert set(get_args(Sampler)) == set(SAMPLERS)


def test_the_run_folder_follows_the_name_unless_given() -> None:
    assert load_config({}, BASE | {"run.name": "cats"}).run.folder == Path("runs/cats")
    assert load_config({}, BASE | {"run.name": "cats", "run.folder": "elsewhere"}).run.folder == Path("elsewhere")
    assert default(keys(TrainConfig)["run.folder"]) == "runs/NAME"
    with pytest.raises(UserError, match=r'^configuration: run.name is ""; expected text'):
        load_config({}, BASE | {"run.name": ""})


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config({}, {"data.folder": "~/pictures", "data.held_out": "demo", "run.folder": "~/run"})
    assert config.data.folder == "/home/someone/pictures"
    assert config.data.held_out == "demo"
    assert config.run.folder == Path("/home/someone/run")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"data.resolution": "500"}, "data.resolution is 500; expected integer >= 16, a multiple of 16"),
        ({"optim.learning_rate": ".inf"}, "optim.learning_rate is Infinity; expected number > 0"),
        ({"train.steps": "0"}, "train.steps is 0; expected integer >= 1"),
        ({"train.accumulation": "0"}, "train.accumulation is 0; expected integer >= 1"),
        ({"lora.targets": "[]"}, r"lora.targets is \[\]; expected \[text, ...\] \(not empty\)"),
        ({"train.mixed_precision": "fp8"}, r'train.mixed_precision is "fp8"; expected no \| bf16 \| fp16'),
        (
            {"data.held_out": "a", "data.held_out_fraction": "0.1"},
            "held_out_fraction is 0.1, unused while data.held_out",
        ),
        ({"optim.warmup_steps": "2000"}, r"optim.warmup_steps \(2000\) is more than train.steps \(1000\)"),
        (
            {"diffusion.objective": "simple", "diffusion.vlb_scale": "2"},
            "vlb_scale is 2, unused while .* is .simple",
        ),
        ({"diffusion.variance": "beta"}, "variance is .beta., unused while diffusion.objective is .hybrid"),
        (
            {"diffusion.objective": "vlb", "diffusion.weighting": "min_snr"},
            "diffusion.weighting is .min_snr., unused while diffusion.objective is .vlb",
        ),
        (
            {"diffusion.objective": "su_raw", "diffusion.loss_space": "sample"},
            "loss_space is .sample., unused while diffusion.objective is .su_raw",
        ),
        (
            {"diffusion.objective": "su_raw", "diffusion.error": "huber"},
            "error is .huber., unused while diffusion.objective is .su_raw",
        ),
        ({"diffusion.huber_delta": "2"}, "huber_delta is 2, unused while diffusion.error is .squared"),
        (
            {"diffusion.weighting": "p2", "diffusion.min_snr_gamma": "2"},
            "min_snr_gamma is 2, unused while diffusion.weighting is .p2",
        ),
        (
            {"diffusion.weighting": "min_snr", "diffusion.p2_gamma": "2"},
            "p2_gamma is 2, unused while diffusion.weighting is .min_snr",
        ),
        ({"diffusion.logit_mean": "1"}, "logit_mean is 1, unused while diffusion.timestep_law is .uniform"),
        (
            {"diffusion.timestep_law": "importance", "diffusion.logit_std": "2"},
            "logit_std is 2, unused while diffusion.timestep_law is .importance",
        ),
        (
            {"diffusion.time_conditioning": "snr_matched"},
            r"time_conditioning is .snr_matched. with schedule .base. \(zero_snr false\): the base's own .* no match",
        ),
        (
            {"diffusion.objective": "vlb", "diffusion.timestep_law": "logit_normal"},
            "objective .vlb. with timestep_law .logit_normal.: the bound is a sum over all t alike; use uniform",
        ),
        (
            {"model.base": "demo", "model.revision": "main"},
            'model.revision is "main", unused while model.base',
        ),
    ],
)
def test_training_refuses(overrides: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config({}, BASE | overrides)


def test_training_accepts_what_only_looks_odd() -> None:
    config = load_config(
        {"optim": {"warmup_steps": 20}},
        BASE | {"train.steps": "20", "train.mixed_precision": "no", "lora.rank": "16"},
    )
    assert config.train.mixed_precision == "no"
    assert load_config({}, BASE | {"validation.samples_every": "5"}).validation.prompts == ()
    matched = {"diffusion.time_conditioning": "snr_matched", "diffusion.zero_snr": "true"}
    assert load_config({}, BASE | matched).diffusion.schedule == "base"  # at zero SNR it is no longer the base's own
    soft = {"diffusion.weighting": "soft_min_snr", "diffusion.min_snr_gamma": "3"}
    assert load_config({}, BASE | soft).diffusion.min_snr_gamma == 3
    bound = {"diffusion.objective": "vlb", "diffusion.variance": "beta", "diffusion.timestep_law": "importance"}
    assert load_config({}, BASE | bound).diffusion.variance == "beta"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({}, "nothing to draw"),
        (
            {"prompts": ["a"], "width": "100"},
            "width is 100; expected integer >= 16, a multiple of 16, or null",
        ),
        ({"prompts": ["a"], "sampler": "ddpm", "eta": "0.5"}, 'eta is 0.5, unused while sampler is "ddpm"'),
        ({"prompts": ["a"], "variance": "beta"}, 'variance is "beta", unused while sampler is "ddim"'),
        ({"prompts": ["a"], "lora_scale": "0.5"}, "lora_scale is 0.5, unused while lora is null"),
        ({"prompts": ["a"], "weights": "raw"}, 'weights is "raw", unused while lora is null'),
        (
            {"prompts": ["a"], "negative_prompt": "b", "guidance": "1"},
            'negative_prompt is "b", unused while guidance',
        ),
        (
            {"prompts": ["a"], "model": "demo", "revision": "x"},
            'revision is "x", unused while model is "demo"',
        ),
    ],
)
def test_generation_refuses(overrides: dict[str, str | list[str]], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load(GenerateConfig, {}, overrides)


def test_every_shipped_configuration_is_valid_and_has_a_card() -> None:
    assert set(shipped_configs()) == {"quickstart", "lora_512"}
    for name, path in shipped_configs().items():
        text = path.read_text()
        card = text[: text.index("\n\n")]
        assert all(f"#   {word}" in card for word in ("for", "run", "memory", "limits")), name
        assert "predicted" in card or "measured" in card, name
        config = load_config(name, {} if "\n  folder:" in text else BASE)
        assert config.run.folder == Path("runs") / name
        assert config.diffusion.objective == "hybrid"


def test_the_package_list_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module.parent for module in (ROOT / "pixart_ft").rglob("*.py")}
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == there | {"pixart_ft.configs"}
