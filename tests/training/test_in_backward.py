"""Steps inside the backward pass. Oracle: the same optimizer after it, to the bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart_ft.config.train import Optim, load_config
from pixart_ft.errors import UserError
from pixart_ft.training import start
from pixart_ft.training.in_backward import InBackward
from pixart_ft.training.nested import load_nested
from pixart_ft.training.optimizers import build_optimizer
from tests.helpers.toy_run import toy_trainer


def network() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        for number, parameter in enumerate(layers.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter) + 0.1 * number)
    return layers


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_it_steps_as_after_the_backward_pass_with_one_gradient_at_a_time(name: str) -> None:
    one, other = network(), network()
    x = torch.linspace(-1, 1, 18).view(3, 6)
    found = []
    for layers in (one, other):
        trained = dict(layers.named_parameters())
        choice = Optim.model_validate({"optimizer": name, "learning_rate": 0.1})
        optimizer = build_optimizer(choice, trained, 0)
        inside = InBackward(optimizer, list(trained.values())) if layers is other else None
        together: list[int] = []
        for parameter in trained.values():
            parameter.register_post_accumulate_grad_hook(
                lambda _, trained=trained, together=together: together.append(
                    sum(p.grad is not None for p in trained.values())
                )
            )
        for _ in range(3):
            layers(x).square().mean().backward()
            if inside is None:
                norms = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None])
                optimizer.step()
                optimizer.zero_grad()
            else:
                norms, whole = inside.norms()
                assert torch.equal(whole, norms.norm())
        found.append((dict(trained), optimizer.state_dict()["state"], norms))
        assert max(together) == (len(trained) if inside is None else 0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_each_step_is_shown_its_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of them a step of P weights would look at P * P. The groups are whole again after it."""
    trained = dict(network().named_parameters())
    choice = Optim.model_validate({"groups": ({"pattern": "*bias", "weight_decay": 0.0},)})
    optimizer = build_optimizer(choice, trained, 0)
    InBackward(optimizer, list(trained.values()))
    shown: list[list[Tensor]] = []
    step = optimizer.step

    def watched() -> None:
        shown.append([p for group in optimizer.param_groups for p in group["params"]])
        step()

    monkeypatch.setattr(optimizer, "step", watched)
    before = {name: p.detach().clone() for name, p in trained.items()}
    sum((p.sum() for p in trained.values()), torch.zeros(())).backward()
    assert sorted(len(one) for one in shown) == [1] * len(trained)
    assert {id(p) for one in shown for p in one} == {id(p) for p in trained.values()}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())


def test_a_weight_whose_gradient_is_not_finite_stays() -> None:
    layers = network()
    trained = dict(layers.named_parameters())
    inside = InBackward(build_optimizer(Optim(learning_rate=0.1), trained, 0), list(trained.values()))
    before = {name: p.detach().clone() for name, p in trained.items()}
    trained["0.weight"].register_hook(lambda gradient: gradient * math.nan)
    layers(torch.ones(2, 6)).square().mean().backward()
    norms, whole = inside.norms()
    assert norms.isfinite().tolist() == [False, True, True, True] and not whole.isfinite()
    assert torch.equal(trained["0.weight"], before["0.weight"])
    assert all(not torch.equal(p, before[name]) for name, p in trained.items() if name != "0.weight")


def test_a_run_is_the_same_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    choice = Optim(learning_rate=0.05)

    def run(name: str, **plan: Any) -> dict[str, Tensor]:
        trainer = toy_trainer(tmp_path / name, tmp_path / "data", choice=choice, **plan)
        if name == "cut" and (saved := tmp_path / "cut" / "checkpoints" / "step-000005").is_dir():
            trainer.load(saved)
        trainer.run()
        last = tmp_path / name / "checkpoints" / f"step-{trainer.step:06d}"
        state: dict[str, Tensor] = load_nested(last / "trained.safetensors")
        return state

    after = run("after")
    run("cut", in_backward=True, steps=5)
    for found in (run("inside", in_backward=True), run("cut", in_backward=True)):
        torch.testing.assert_close(found, after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("optim", "train", "problem"),
    [
        ({}, {}, "in_backward true with clip_norm 1.0: the norm is known only"),
        ({"clip_norm": 0}, {"accumulation": 2}, "in_backward true with train.accumulation 2"),
        ({"clip_norm": 0, "optimizer": "prodigy"}, {}, "in_backward is true, unused while optim.optimizer is .prodigy"),
        ({"clip_norm": 0, "optimizer": "schedule_free"}, {}, "in_backward is true, unused while"),
    ],
)
def test_what_it_cannot_be_with_is_refused(optim: dict[str, Any], train: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config({"data": {"folder": "demo"}, "optim": {"in_backward": True, **optim}, "train": train})


def test_several_processes_and_a_loss_scale_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config({"data": {"folder": "demo"}, "optim": {"in_backward": True, "clip_norm": 0}})

    class Several:
        num_processes = 2

    monkeypatch.setattr(start, "join", lambda *args, **how: Several())
    with pytest.raises(UserError, match="in_backward steps by a gradient before the 2 processes"):
        start.accelerator_for(config)
    scaled = config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "fp16"})})
    with pytest.raises(UserError, match=r"(?s)fp16 needs a CUDA GPU.*in_backward with train.mixed_precision fp16"):
        start.accelerator_for(scaled)
