"""The keys of training and generation, the rules between them, and the shipped configurations."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

import pixart_ft
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.reading import Config, default, expected, keys, load, shipped_configs, to_yaml
from pixart_ft.config.samplers import EVERY_SAMPLER, OPTIONS, SAMPLERS, Sampler, users_of
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.diffusion.names import Spacing
from pixart_ft.errors import UserError
from pixart_ft.sampling.settings import Settings
from tests.helpers.sampling_by_hand import OPTION_VALUES

ROOT = Path(__file__).parents[2]
BASE = {"data.folder": "pictures"}


@pytest.mark.parametrize("kind", [TrainConfig, GenerateConfig])
def test_every_key_is_described_in_one_line(kind: type[Any]) -> None:
    for key, field in keys(kind).items():
        assert field.description, key
        assert "\n" not in field.description, key


def test_no_key_is_required_by_itself() -> None:
    assert not any(field.is_required() for kind in (TrainConfig, GenerateConfig) for field in keys(kind).values())


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
    assert set(get_args(Sampler)) == set(EVERY_SAMPLER)


def test_the_run_folder_follows_the_name_unless_given() -> None:
    assert load_config({}, BASE | {"run.name": "cats"}).run.folder == Path("runs/cats")
    assert load_config({}, BASE | {"run.name": "cats", "run.folder": "elsewhere"}).run.folder == Path("elsewhere")
    assert default(keys(TrainConfig)["run.folder"]) == "runs/NAME"
    with pytest.raises(UserError, match=r"^configuration: run.name is empty; give text"):
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
        (
            {"data.resolution": "500"},
            r"data.resolution\[0\] is 500; expected \[integer >= 16, <= 8,192, a multiple of 16, ...\]",
        ),
        ({"optim.learning_rate": ".inf"}, "optim.learning_rate is Infinity; expected number >= 1e-10, <= 1"),
        ({"train.steps": "0"}, "train.steps is 0; expected integer >= 1"),
        ({"train.accumulation": "0"}, "train.accumulation is 0; expected integer >= 1"),
        ({"adapter.targets": "[]"}, r"adapter.targets is \[\]; expected \[text, ...\] \(not empty\)"),
        (
            {"model.gradient_checkpointing": "1"},
            "gradient_checkpointing is 1; expected true | false or integer >= 2, <=",
        ),
        ({"model.gradient_checkpointing": "on"}, r'is "on"; expected true \| false or integer >= 2, <= 1,000$'),
        ({"train.mixed_precision": "fp8"}, r'train.mixed_precision is "fp8"; expected auto \| no \| bf16 \| fp16'),
        (
            {"data.held_out": "a", "data.held_out_fraction": "0.1"},
            "held_out_fraction is 0.1, unused while data.held_out",
        ),
        (
            {"diffusion.objective": "simple", "diffusion.vlb_scale": "2"},
            "vlb_scale is 2, unused while .* is .simple",
        ),
        ({"diffusion.variance": "beta"}, "variance is .beta. with objective .hybrid., whose second term trains a"),
        (
            {"diffusion.variance": "direct", "diffusion.objective": "simple"},
            "variance is .direct., unused while diffusion.objective is .simple",
        ),
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
        ({"validation.report": "true"}, "report true .* there is nothing to measure on"),
        ({"validation.report": "true", "validation.pictures": "1"}, "pictures 1: it compares means over pictures"),
        ({"validation.report": "true", "validation.steps": "10,10,20"}, "steps .10,10,20.: it draws with a number"),
        ({"diffusion.num_steps": "250"}, "num_steps is 250, unused while diffusion.schedule is .base"),
        (
            {"diffusion.schedule": "linear", "diffusion.rescale": "false"},
            "rescale is false, unused while diffusion.num_steps is null",
        ),
        (
            {"diffusion.schedule": "cosine", "diffusion.num_steps": "9", "diffusion.rescale": "false"},
            "rescale is false, unused while diffusion.schedule is .cosine",
        ),
        (
            {"diffusion.schedule": "linear", "diffusion.cosine_offset": "0.1"},
            "cosine_offset is 0.1, unused while diffusion.schedule is .linear",
        ),
        ({"diffusion.time_conditioning": "rescaled"}, "time_conditioning is .rescaled. with schedule .base."),
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
        BASE | {"train.steps": "20", "train.mixed_precision": "no", "adapter.rank": "16"},
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
            "width is 100; expected integer >= 16, <= 8,192, a multiple of 16, or null",
        ),
        (
            {"prompts": ["a"], "sampler": "ddpm", "variance": "learned"},
            'sampler "ddpm" takes variance beta_tilde or beta, not "learned"; the sampler that .* learned one is iddpm',
        ),
        ({"prompts": ["a"], "sampler": "dpm"}, 'sampler is "dpm"; expected ' + r" \| ".join(SAMPLERS)),
        (
            {"prompts": ["a"], "schedule": "cosin"},
            r'schedule is "cosin"; expected base \| linear \| scaled_linear \| cosine \| su_linear',
        ),
        ({"prompts": ["a"], "steps": "0"}, "steps is 0; expected integer >= 1"),
        (
            {"prompts": ["a"], "guidance_interval": "[9]"},
            r"guidance_interval is \[9\]; expected two numbers LOW HIGH, or null",
        ),
        (
            {"prompts": ["a"], "guidance_interval": "[1, 9]", "guidance": "1"},
            r"guidance_interval is \[1, 9\], unused while guidance is 1",
        ),
        ({"prompts": ["a"], "strength": "0.5"}, "strength is 0.5, unused while image is null"),
        ({"prompts": ["a"], "inversion": "true"}, "inversion is true, unused while image is null"),
        ({"prompts": ["a"], "image": "a.png", "strength": "0"}, "strength is 0; expected number > 0"),
        ({"prompts": ["a"], "image": "a.png", "strength": "1.5"}, "strength is 1.5; expected number > 0, <= 1"),
        ({"prompts": ["a"], "time_conditioning": "index"}, 'time_conditioning is "index", unused while schedule is'),
        (
            {"prompts": ["a"], "sampler": "pf_ode", "tolerance": "0.1", "steps": "9"},
            "steps is 9, unused while tolerance is 0.1",
        ),
        ({"prompts": ["a"], "aspect_ratio": "3:2", "width": "64"}, 'width is 64, unused while aspect_ratio is "3:2"'),
        ({"prompts": ["a"], "aspect_ratio": "3:2", "height": "64"}, 'height is 64, unused while aspect_ratio is "3:2"'),
        ({"prompts": ["a"], "compare_steps": "[3]"}, r"compare_steps is \[3\], unused while compare is false"),
        ({"prompts": ["a"], "compare_samplers": "[ddim]"}, r'compare_samplers is \["ddim"\], unused while compare is'),
        ({"prompts": ["a"], "compare": "true", "compare_steps": "[]"}, r"compare_steps is \[\]; expected .*not empty"),
        ({"prompts": ["a"], "compare": "true", "compare_samplers": "[a]"}, r'compare_samplers\[0\] is "a"; expected'),
        ({"prompts": ["a"], "lora_scale": "0.5"}, r"lora_scale is \[0.5\], unused while lora is null"),
        ({"prompts": ["a"], "weights": "raw"}, 'weights is "raw", unused while lora is null and model is null'),
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


def given(sampler: str, option: str) -> dict[str, Any]:
    """The option away from its default, and what makes it matter."""
    spacing = {"spacing": {"spacing": SAMPLERS[sampler].spacings[-1]}}
    return {"prompts": ["a"], "sampler": sampler} | (OPTION_VALUES | spacing)[option]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_option_is_for_the_samplers_that_use_it(sampler: str) -> None:
    for option in OPTIONS:
        values = given(sampler, option)
        if option in SAMPLERS[sampler].options:
            options = Settings.of(load(GenerateConfig, values)).options
            assert options == {key: value for key, value in values.items() if key in OPTIONS}, option
        else:
            with pytest.raises(UserError, match=f'{option} is .*, unused while sampler is "{sampler}"; change one'):
                load(GenerateConfig, values)


def test_the_help_names_the_samplers_of_an_option() -> None:
    for option in OPTIONS:
        field = keys(GenerateConfig)[option]
        assert default(field) is None  # the scheduler's own
        if option != "spacing":  # every sampler's
            assert (field.description or "").startswith(f"of {', '.join(users_of(option))}: ")


def test_no_option_is_given_unless_asked_for() -> None:
    assert Settings.of(load(GenerateConfig, {"prompts": ["a"], "sampler": "edm"})).options == {}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_spacing_is_for_the_samplers_that_know_it(sampler: str) -> None:
    for spacing in get_args(Spacing):
        values = {"prompts": ["a"], "sampler": sampler, "spacing": spacing}
        if spacing in SAMPLERS[sampler].spacings:
            assert load(GenerateConfig, values).spacing == spacing
        else:
            message = f'spacing "{spacing}" is not for sampler "{sampler}": iddpm, trailing and'
            with pytest.raises(UserError, match=message):
                load(GenerateConfig, values)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rho", {"sampler": "euler", "spacing": "linspace", "rho": 3.0}),
        ("rho", {"sampler": "edm", "spacing": "exponential", "rho": 3.0}),
        ("s_noise", {"sampler": "euler", "s_noise": 1.1}),
        ("s_min", {"sampler": "edm", "s_min": 0.1}),
        ("s_max", {"sampler": "edm", "s_churn": 0.0, "s_max": 9.0}),
        ("corrector_snr", {"sampler": "score_sde", "corrector_steps": 0, "corrector_snr": 0.2}),
        ("corrector_first", {"sampler": "score_sde", "corrector_steps": 0, "corrector_first": True}),
        ("spacing", {"sampler": "pf_ode", "tolerance": 0.1, "spacing": "leading"}),
        ("spacing", {"sampler": "ddim", "steps": "10,20", "spacing": "leading"}),
    ],
    ids=str,
)
def test_an_option_that_another_one_makes_idle_is_refused(key: str, values: dict[str, Any]) -> None:
    """A setting is used or refused, never ignored."""
    with pytest.raises(UserError, match=f"^configuration: {key} "):
        load(GenerateConfig, values | {"prompts": ["a"]})


@pytest.mark.parametrize(
    ("given", "meant"), [("30", 30), ("10,10,20", "10,10,20"), ([10, 20], "10,20"), ("ddim25",) * 2]
)
def test_steps_are_a_number_or_a_respacing(given: object, meant: object) -> None:
    assert load(GenerateConfig, {"prompts": ["a"]}, {"steps": given}).steps == meant
    recorded = {"prompts": ["a"], "steps": meant, "spacing": "iddpm"}  # as the recipe of a picture has it
    assert load(GenerateConfig, recorded, yields=True).steps == meant


@pytest.mark.parametrize("given", ["10;20", "10,", "ddim", "ddim10,20", "twenty", [10, "b"], [], "1.5"])
def test_what_is_no_respacing_is_refused(given: object) -> None:
    with pytest.raises(UserError, match=r"steps is .*; expected integer >= 1, <= 1,000 or text"):
        load(GenerateConfig, {"prompts": ["a"], "steps": given})


def test_a_comparison_refuses_what_each_cell_decides_for_itself() -> None:
    choices = {"sampler": "edm", "steps": 9, "images_per_prompt": 2}
    for key, value in (*choices.items(), *((key, value) for o in OPTION_VALUES.values() for key, value in o.items())):
        with pytest.raises(UserError, match=f"{key} is .*, unused while compare is true; change one"):
            load(GenerateConfig, {"prompts": ["a"], "compare": True, key: value})
    shared = {"guidance": 2.0, "image": "a.png", "strength": 0.3, "schedule": "cosine", "aspect_ratio": "3:2"}
    config = load(GenerateConfig, {"prompts": ["a"], "compare": True, "compare_steps": [3], **shared})
    assert (config.compare_steps, config.image, config.strength) == ((3,), Path("a.png"), 0.3)
    assert set(config.compare_samplers) < set(SAMPLERS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("my dog on the moon", ("my dog on the moon",)),
        ("no: quotes, needed", ("no: quotes, needed",)),
        ('["a cat", "a, b"]', ("a cat", "a, b")),
        ("[doughnut]", ("doughnut",)),  # what a shell leaves of ["doughnut"]
        ("[]", ()),
    ],
)
def test_a_single_text_is_a_list_of_one(typed: str, meant: tuple[str, ...]) -> None:
    assert load_config({}, BASE | {"validation.prompts": typed}).validation.prompts == meant


def test_a_single_value_is_a_list_of_one_for_every_list() -> None:
    config = load_config({"adapter": {"targets": "to_q"}, "data": {"folder": "x"}}, {"validation.seeds": "3"})
    assert (config.adapter.targets, config.validation.seeds) == (("to_q",), (3,))
    sheet = load(GenerateConfig, {"prompts": "a", "compare": True}, {"compare_samplers": "edm", "compare_steps": "7"})
    assert (sheet.prompts, sheet.compare_samplers, sheet.compare_steps) == (("a",), ("edm",), (7,))


@pytest.mark.parametrize("typed", ["[my dog: on the moon]", "[", "[3]", "[a, [b]]"])
def test_a_list_that_the_shell_broke_says_how_to_quote_it(typed: str) -> None:
    with pytest.raises(UserError, match=r"validation.prompts is .*put the whole list in single ones, as '\[\"a cat"):
        load_config({}, BASE | {"validation.prompts": typed})


def test_a_recipe_for_training_is_none_for_drawing() -> None:
    with pytest.raises(UserError, match=r"no configuration file quickstart \(quickstart is a recipe for training\)"):
        load(GenerateConfig, "quickstart")


def test_every_shipped_configuration_is_valid_and_has_a_card() -> None:
    assert {"quickstart", "lora_512"} <= set(shipped_configs())
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


def numbers() -> list[tuple[type[Config], str]]:
    """Every key whose value is a number or numbers."""
    found: list[tuple[type[Config], str]] = []
    for kind in (TrainConfig, GenerateConfig):
        words = {key: expected(field) for key, field in keys(kind).items()}
        found += [(kind, key) for key, word in words.items() if "integer" in word or "number" in word]
    return found


@pytest.mark.parametrize(("kind", "key"), numbers(), ids=lambda part: getattr(part, "__name__", part))
def test_every_number_has_two_ends(kind: type[Config], key: str) -> None:
    """What is beyond them would never end, fit no machine or leave float32: refused before anything is made."""
    several = "[" in expected(keys(kind)[key])
    required = {"data": {"folder": "demo"}} if kind is TrainConfig else {"prompts": ["a"]}
    for text in ("1" + "0" * 20, "-1" + "0" * 20, "1e308", "-1e308", "1e400", ".inf", "-.inf", ".nan", "nan"):
        with pytest.raises(UserError, match=rf"{re.escape(key)}(\[0\])? is .*; expected "):
            load(kind, required, {key: f"[{text}, {text}]" if several else text})


def test_the_last_seed_is_the_last_that_torch_takes() -> None:
    last = 2**64 - 1
    torch.Generator("cpu").manual_seed(last)
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator("cpu").manual_seed(last + 1)
    assert load(GenerateConfig, {"prompts": ["a"], "seed": last}).seed == last
    assert load_config({}, BASE | {"validation.seeds": f"[0, {last}]", "run.seed": str(last)}).run.seed == last
    for seed, count in ((last, 2), (last - 1, 3)):
        with pytest.raises(UserError, match=rf"seed {seed} with images_per_prompt {count} passes the largest seed"):
            load(GenerateConfig, {"prompts": ["a"], "seed": seed, "images_per_prompt": count})


@pytest.mark.parametrize("optimizer_epsilon", [1e-20, 1])
def test_the_ends_of_the_optimizer_leave_numbers(optimizer_epsilon: float) -> None:
    """A gradient of zero, as A has at first, divided by an epsilon that float32 lacks would be 0 / 0."""
    fields = keys(TrainConfig)
    ends = {key: [bound for bound in fields[f"optim.{key}"].metadata] for key in ("beta1", "beta2", "learning_rate")}
    highest = {key: next(b.le for b in bounds if hasattr(b, "le")) for key, bounds in ends.items()}
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW(
        [weight],
        lr=highest["learning_rate"],
        betas=(highest["beta1"], highest["beta2"]),
        eps=optimizer_epsilon,
        weight_decay=1,
    )
    for gradient in (0.0, 1e-12, 1.0):
        weight.grad = torch.tensor([0.0, gradient])
        optimizer.step()
    assert weight.isfinite().all()


def test_overrides_are_values_or_their_text() -> None:
    texts = load_config("quickstart", {"train.steps": "60", "adapter.targets": "[to_q]", "run.folder": "x"})
    values = load_config("quickstart", {"train.steps": 60, "adapter.targets": ("to_q",), "run.folder": Path("x")})
    assert texts == values and values.train.steps == 60
    with pytest.raises(UserError, match=r"2 problems\n  - run\.name is 7; expected text.*\n  - train\.steps is 2\.5"):
        load_config("quickstart", {"train.steps": 2.5, "run.name": 7})


def test_the_package_offers_its_names_and_imports_them_late() -> None:
    code = (
        "import sys, pixart_ft; print(*dir(pixart_ft), 'torch' in sys.modules, len(pixart_ft.load_config.__doc__) > 9)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"TextToImage", "PixArtPipeline", "Settings", "load_config", "run_training"} <= set(printed)
    assert printed[-2:] == ["False", "True"]
    for name in pixart_ft.__all__:
        assert getattr(pixart_ft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pixart_ft.nothing


def test_a_start_that_is_taken_away_again_is_not_rounded() -> None:
    with pytest.raises(UserError, match=r"adapter\.init \"pissa\" with optim\.stochastic_rounding true"):
        load_config("quickstart", {"adapter.init": "pissa", "optim.stochastic_rounding": True})
