"""Optimizers: each trains, is resumed to the bit, and is the library's own. Oracles: the libraries called directly,
schedule-free's defining mean, expectation for random rounding. What is not installed is skipped."""

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from pixart_ft.config.optimizers import OPTIMIZERS, OptimizerName, check_installed, takes
from pixart_ft.config.train import Optim, load_config
from pixart_ft.errors import UserError
from pixart_ft.model import weights
from pixart_ft.training import optimizers
from pixart_ft.training.ema import OwnAverage
from pixart_ft.training.nested import load_nested, save_nested, tensors_of
from pixart_ft.training.optimizers import Rounded, build_optimizer, load_optimizer, stochastically_rounded
from pixart_ft.training.places import check_training

RATES = {"prodigy": 1.0}  # 1e-2 for all others
CASES = [(name, False) for name in OPTIMIZERS] + [(n, True) for n in OPTIMIZERS if takes(n, "stochastic_rounding")]
STEPS, STEPS_OF = 24, {"prodigy": 70}  # it doubles its first step size of a millionth until it moves


def installed(name: str) -> bool:
    package = OPTIMIZERS[name].package
    return (
        hasattr(torch.optim, "Muon") if name == "muon" else package is None or bool(importlib.util.find_spec(package))
    )


def needed(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{OPTIMIZERS[name].package} is not installed")


class Block(nn.Module):
    """A matrix large enough for 8 bits of state, a bias, and a table that is none of Muon's matrices."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(64, 64)
        self.scale_shift_table = nn.Parameter(torch.randn(2, 64, generator=draw) * 0.1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(64, 64, generator=draw) / 8)
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * (1 + self.scale_shift_table[0])) + self.scale_shift_table[1]


class Case:
    """A network of one block that learns another one's function."""

    def __init__(self, choice: Optim) -> None:
        dtype = torch.bfloat16 if choice.stochastic_rounding else torch.float32
        self.network = nn.ModuleDict({"transformer_blocks": nn.ModuleList([Block()])}).to(dtype)
        self.trained = dict(self.network.named_parameters())
        self.optimizer = build_optimizer(choice, self.trained, seed=5)
        draw = torch.Generator().manual_seed(2)
        self.x, self.wanted = (torch.randn(32, 64, generator=draw) for _ in range(2))
        self.wanted = self.x @ torch.randn(64, 64, generator=draw) / 8

    def loss(self) -> Tensor:
        blocks: Any = self.network["transformer_blocks"]
        return (blocks[0](self.x.to(next(iter(self.trained.values())))).float() - self.wanted).square().mean()

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def chosen(name: str, rounding: bool = False, **more: Any) -> Optim:
    rate = {"learning_rate": RATES.get(name, 1e-2)}
    return Optim.model_validate({"optimizer": name, "stochastic_rounding": rounding, "groups": (), **rate, **more})


def assert_same(one: Any, other: Any) -> None:
    """Two trees of tensors and values are equal to the bit, types and all."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_the_table_has_every_name() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_each_learns_and_goes_on_from_a_file_as_if_uninterrupted(name: str, rounding: bool, tmp_path: Path) -> None:
    needed(name)
    straight, cut = (Case(chosen(name, rounding)) for _ in range(2))
    before = {key: value.detach().clone() for key, value in straight.trained.items()}
    steps = STEPS_OF.get(name, STEPS)
    losses = [straight.step() for _ in range(steps)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(value, before[key]) for key, value in straight.trained.items())
    assert all(moment.isfinite().all() for moment in tensors_of(straight.optimizer.state_dict()["state"]))

    for _ in range(steps // 2):
        cut.step()
    state = {"weights": dict(cut.trained), "optimizer": cut.optimizer.state_dict()}
    save_nested(tmp_path / "state.safetensors", state)
    resumed = Case(chosen(name, rounding))
    saved = load_nested(tmp_path / "state.safetensors")
    with torch.no_grad():
        for key, value in resumed.trained.items():
            value.copy_(saved["weights"][key])
    load_optimizer(resumed.optimizer, saved["optimizer"])
    assert_same(resumed.optimizer.state_dict(), cut.optimizer.state_dict())
    assert [resumed.step() for _ in range(steps // 2)] == losses[steps // 2 :]
    assert_same(dict(resumed.trained), dict(straight.trained))
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


def test_the_default_is_the_plain_adamw_of_torch_to_the_bit() -> None:
    choice = Optim(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.5)
    ours, plain = Case(choice), Case(choice)
    plain.optimizer = torch.optim.AdamW(plain.trained.values(), lr=1e-4, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    assert [ours.step() for _ in range(5)] == [plain.step() for _ in range(5)]
    assert_same(ours.optimizer.state_dict(), plain.optimizer.state_dict())


def test_a_library_s_optimizer_is_built_as_its_authors_say() -> None:
    adafactor = Case(chosen("adafactor")).optimizer.param_groups[0]
    assert not adafactor["relative_step"] and not adafactor["scale_parameter"] and adafactor["beta1"] is None
    needed("prodigy")
    prodigy = Case(Optim(optimizer="prodigy")).optimizer.param_groups[0]
    assert prodigy["lr"] == 1 and prodigy["safeguard_warmup"] and prodigy["use_bias_correction"]


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    needed("muon")
    case, plain = Case(chosen("muon", weight_decay=0.1)), Case(chosen("adamw", weight_decay=0.1))
    matrix = "transformer_blocks.0.layer.weight"
    alone: Any = torch.optim.Muon(
        [plain.trained[matrix]], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rest = torch.optim.AdamW([p for n, p in plain.trained.items() if n != matrix], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        case.step()
        plain.loss().backward()
        alone.step()
        rest.step()
        plain.optimizer.zero_grad()
    assert_same(dict(case.trained), dict(plain.trained))
    with pytest.raises(UserError, match="muon is for the matrices of hidden layers, and none is trained"):
        build_optimizer(chosen("muon"), {"proj_out.weight": nn.Parameter(torch.ones(2, 2))}, 0)


def test_after_a_break_the_settings_are_new_and_what_was_counted_is_old() -> None:
    for name in ("adamw", "prodigy", "schedule_free"):
        if not installed(name):
            continue
        old, new = Case(chosen(name)), Case(chosen(name, weight_decay=0.3, beta2=0.9))
        for _ in range(3):
            old.step()
        load_optimizer(new.optimizer, old.optimizer.state_dict())
        was, now = old.optimizer.param_groups[0], new.optimizer.param_groups[0]
        assert (now["weight_decay"], now["betas"]) == (0.3, (0.9, 0.9))
        counted = {key: value for key, value in was.items() if key in optimizers.COUNTED}
        assert {key: now[key] for key in counted} == counted and (name == "adamw" or counted["k"] == 3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_guide_says_how_much_each_keeps(name: str) -> None:
    """Bytes for each number of a matrix; a row and a column, scales and tables are less than a tenth of one."""
    guide = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\d, ]+) \| \w+", guide, flags=re.M)
    said = {
        n: int(size) for names, sizes in table for n, size in zip(names.split(", "), sizes.split(", "), strict=True)
    }
    assert said.keys() == {f"`{n}`" for n in OPTIMIZERS}
    needed(name)
    weight = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    optimizer = build_optimizer(chosen(name), {"transformer_blocks.0.weight": weight}, 0)
    weight.grad = weight.detach().clone()
    optimizer.step()
    kept = sum(x.numel() * x.element_size() for x in tensors_of(optimizer.state_dict()["state"]))
    assert kept / weight.numel() == pytest.approx(said[f"`{name}`"], abs=0.1)


# Groups


def test_groups_have_rates_and_decays_of_their_own_and_the_first_pattern_wins() -> None:
    groups = ({"pattern": "*.bias", "weight_decay": 0.0}, {"pattern": "*layer*", "learning_rate": 3e-3})
    case = Case(chosen("adamw", weight_decay=0.2, groups=groups))
    names = {parameter: name.rpartition(".")[2] for name, parameter in case.trained.items()}
    found = [
        ([names[p] for p in group["params"]], group["lr"], group["weight_decay"], group.get("initial_lr"))
        for group in case.optimizer.param_groups
    ]
    assert found == [
        (["scale_shift_table"], 1e-2, 0.2, None),
        (["bias"], 1e-2, 0.0, None),
        (["weight"], 3e-3, 0.2, 3e-3),
    ]


def test_a_pattern_that_finds_nothing_of_its_own_is_refused() -> None:
    groups = ({"pattern": "*layer*"}, {"pattern": "*attn7*"}, {"pattern": "*bias"})
    with pytest.raises(
        UserError, match=r"optim.groups: .* pattern '\*attn7\*', '\*bias'; .*transformer_blocks.0.layer.wei"
    ):
        Case(chosen("adamw", groups=groups))


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ("[{pattern: ''}]", r"optim.groups\[0\].pattern is ..; expected text"),
        ("[{pattern: a}, {learning_rate: 1e-3}]", r"optim.groups\[1\].pattern is required"),
        ("[{pattern: a, learning_rate: 7}]", r"optim.groups\[0\].learning_rate is 7; expected number >= 1e-10, <= 1"),
        (
            "[{pattern: a, rate: 7}]",
            r"optim.groups\[0\].rate: unknown key; optim.groups has pattern, learning_rate, weight_de",
        ),
        ("[3]", r"optim.groups\[0\] is 3; expected \[\{pattern, learning_rate, weight_decay\}, ...\]"),
    ],
)
def test_a_group_is_checked_key_by_key(groups: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config("quickstart", {"optim.groups": groups})


# What an optimizer has no use for


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"optimizer": "adafactor", "beta1": 0.5}, "beta1 is 0.5, unused while optim.optimizer is .adafactor"),
        ({"optimizer": "adafactor", "beta2": 0.5}, "beta2 is 0.5, unused"),
        ({"optimizer": "adafactor", "epsilon": 0.5}, "epsilon is 0.5, unused"),
        ({"optimizer": "schedule_free", "decay": "cosine"}, "decay is .cosine., unused while .* .schedule_free"),
        ({"optimizer": "schedule_free", "stochastic_rounding": True}, "stochastic_rounding is true, unused"),
        ({"optimizer": "schedule_free", "beta1": 0}, "beta1 0 with optimizer .schedule_free"),
        ({"optimizer": "prodigy", "stochastic_rounding": True}, "stochastic_rounding is true, unused"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "learning_rate 0.0001 with .*; leave it at 1"),
        (
            {"optimizer": "prodigy", "groups": [{"pattern": "a", "learning_rate": 1e-2}]},
            "one step size for all weights; leave learning_rate out",
        ),
    ],
)
def test_what_an_optimizer_has_no_use_for_is_refused(overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config({"data": {"folder": "demo"}, "optim": overrides})


@pytest.mark.parametrize("key", [{"ema_decay": 0.9}, {"ema_profile": "constant"}, {"ema_on_cpu": True}])
def test_an_average_beside_schedule_free_s_is_refused(key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"with optimizer .schedule_free., which averages by itself"):
        load_config({"data": {"folder": "demo"}, "optim": {"optimizer": "schedule_free"}, "train": key})
    load_config({"data": {"folder": "demo"}, "optim": {"optimizer": "schedule_free"}, "train": {"ema_decay": 0}})


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"ema_profile": "constant", "ema_decay": 0}, "ema_profile is .constant., unused while train.ema_decay is 0"),
        ({"ema_on_cpu": True, "ema_decay": 0}, "ema_on_cpu is true, unused while train.ema_decay is 0"),
        ({"ema_width": 0.2}, "ema_width is 0.2, unused while train.ema_profile is .warmup"),
        ({"ema_profile": "power", "ema_decay": 0.9}, "ema_decay is 0.9, unused while train.ema_profile is .power"),
    ],
)
def test_a_key_of_the_average_that_means_nothing_is_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config({"data": {"folder": "demo"}, "train": keys})


def test_prodigy_begins_at_one_and_says_so_when_written_out() -> None:
    config = load_config({"data": {"folder": "demo"}, "optim": {"optimizer": "prodigy"}})
    assert config.optim.learning_rate == 1 and load_config(config.model_dump(mode="json")) == config
    assert load_config({"data": {"folder": "demo"}}).optim.learning_rate == 1e-4


@pytest.mark.parametrize("found", [None, "2.8.1+cpu"])
def test_a_missing_or_old_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("pixart_ft.config.optimizers.version", version)
    have = "which is not installed" if found is None else r"and 2.8.1\+cpu is installed"
    with pytest.raises(UserError, match=rf'muon needs torch>=2.9, {have}: pip install "torch>=2.9", or use adamw'):
        check_installed("muon")
    check_installed("adamw")


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_missing_package_is_told_with_all_other_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pixart_ft.config.optimizers.version", absent)
    wrong = {"data": {"folder": str(tmp_path / "nowhere")}, "model": {"base": str(tmp_path / "neither")}}
    config = load_config({**wrong, "optim": {"optimizer": "prodigy"}})
    with pytest.raises(UserError, match=r"(?s)3 problems.*neither.*nowhere.*pip install .prodigyopt"):
        check_training(config)


# Schedule-free


def test_schedule_free_is_used_as_the_mean_of_where_its_steps_led() -> None:
    needed("schedule_free")
    case = Case(chosen("schedule_free", weight_decay=0.0))
    average = OwnAverage(case.trained, case.optimizer)
    reached: list[dict[str, Tensor]] = []
    for _ in range(6):
        case.step()
        reached.append({name: case.optimizer.state[p]["z"].double() for name, p in case.trained.items()})
    own = {name: p.detach().clone() for name, p in case.trained.items()}
    mean = {name: torch.stack([z[name] for z in reached]).mean(0) for name in own}
    with average.applied():
        used = {name: p.detach().clone() for name, p in case.trained.items()}
        assert case.optimizer.param_groups[0]["train_mode"] is False
    assert_same({name: p.detach() for name, p in case.trained.items()}, own)
    assert_same(average.weights, used)
    for name, values in used.items():
        torch.testing.assert_close(values.double(), mean[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(values, own[name])
    assert not average.is_on
    case.step()  # it is in the mode of training again


# Rounding at random


def test_a_step_below_half_the_last_place_survives_on_average() -> None:
    """AdamW with a constant gradient moves every weight by the learning rate: here a 32nd of the last place."""
    count, steps, rate = 2**14, 16, 2.0**-13  # the last place below 1 is 2^-8
    choice = Optim(learning_rate=rate, weight_decay=0.0, stochastic_rounding=True)
    weight = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    nearest = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    for parameter, optimizer in (
        (weight, build_optimizer(choice, {"weight": weight}, 0)),
        (nearest, torch.optim.AdamW([nearest], lr=rate, weight_decay=0.0)),
    ):
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(nearest, torch.ones_like(nearest))
    one_step = 2.0**-8 * math.sqrt((1 / 32) * (31 / 32))  # the standard deviation of one rounding
    error = weight.double().mean().item() - (1 - steps * rate)
    assert abs(error) < 5 * one_step * math.sqrt(steps / count)
    assert set(weight.double().unique().tolist()) <= {1 - k * 2.0**-8 for k in range(steps)}


def test_rounding_goes_to_a_neighbour_and_leaves_what_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=draw) * torch.logspace(-30, 30, 1000)
    rounded = stochastically_rounded(values, draw).float()
    down = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    up = ((values.view(torch.int32) | (2**16 - 1)) + 1).view(torch.float32)
    assert ((rounded == down) | (rounded == up)).all() and (rounded != down).any() and (rounded != up).any()
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf])
    assert torch.equal(stochastically_rounded(exact, draw).float(), exact)
    assert stochastically_rounded(torch.tensor([math.nan]), draw).isnan().all()


def test_the_random_bits_follow_from_seed_step_and_name() -> None:
    def after(seed: int, name: str, steps: int) -> list[Tensor]:
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = build_optimizer(Optim(learning_rate=1e-3, stochastic_rounding=True), {name: weight}, seed)
        found = []
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            before = weight.float()
            optimizer.step()
            found.append((before - weight.float()).detach())
        return found

    one = after(0, "a", 2)
    torch.manual_seed(9)
    assert_same(after(0, "a", 2), one)
    assert all(not torch.equal(other, one[0]) for other in (one[1], after(1, "a", 1)[0], after(0, "b", 1)[0]))


def test_a_large_network_is_stepped_part_by_part_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Case(chosen("adamw", True))
    losses = [whole.step() for _ in range(3)]
    monkeypatch.setattr(weights, "CHUNK", 100)  # the matrix alone, then the others
    parts = Case(chosen("adamw", True))
    assert [parts.step() for _ in range(3)] == losses
    assert isinstance(parts.optimizer, Rounded)
    assert_same(parts.optimizer.state_dict(), whole.optimizer.state_dict())
    moments: Mapping[Any, Any] = parts.optimizer.state
    assert all(x["exp_avg"].dtype == torch.float32 for x in moments.values())


def test_a_pattern_means_a_weight_by_its_plain_name_where_some_rows_of_it_are_trained() -> None:
    """Where the variance stands still, full fine-tuning has the last layer's rows of the mean as parameters."""
    layer = nn.Linear(2, 2)
    trained = {f"proj_out.parametrizations.{part}.original": p for part, p in layer.named_parameters()}
    groups = ({"pattern": "proj_out.weight", "learning_rate": 3e-3}, {"pattern": "*.bias", "weight_decay": 0.0})
    found = build_optimizer(chosen("adamw", weight_decay=0.2, groups=groups), trained, 0).param_groups
    assert [(group["lr"], group["weight_decay"], group["params"][0].ndim) for group in found] == [
        (3e-3, 0.2, 2),
        (1e-2, 0.0, 1),
    ]
