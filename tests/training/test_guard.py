"""A step by a gradient that is not finite. Oracles: a run that never took the step; torch's own clipping."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pixart_ft.training import guard
from pixart_ft.training.guard import clip_gradients, guarded_step
from tests.helpers.waits import no_waiting

OPTIMIZERS: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    # what these average or sum lies in their groups, on the host
    "prodigy": lambda p: importlib.import_module("prodigyopt").Prodigy(p, d0=0.1),
    "schedule_free": lambda p: _training(importlib.import_module("schedulefree").AdamWScheduleFree(p, lr=0.1)),
}
PACKAGES = {"prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def _training(optimizer: Any) -> torch.optim.Optimizer:
    optimizer.train()
    found: torch.optim.Optimizer = optimizer
    return found


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def trained(name: str, gradients: list[float]) -> tuple[list[Parameter], dict[str, Any]]:
    """Weights and state after steps by these gradients, the same number everywhere."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    given = parameters()
    optimizer = OPTIMIZERS[name](given)
    for gradient in gradients:
        for p in given:
            p.grad = torch.full_like(p, gradient)
        _, norm = clip_gradients(given, math.inf)
        guarded_step(optimizer, norm.isfinite())
    return given, optimizer.state_dict()["state"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])  # the last has a norm that float32 does not hold
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_changes_nothing_whoever_knows_of_it(
    name: str, known: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known on the host, as on a CPU, or on the device alone: weights and moments are those of a run without it."""
    monkeypatch.setattr(guard, "is_known", lambda flag: known)
    weights, state = trained(name, [1.0, bad, -2.0])
    expected, expected_state = trained(name, [1.0, -2.0])
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_first_step_leaves_the_weights_and_finite_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "is_known", lambda flag: False)
    weights, state = trained(name, [math.nan])
    torch.testing.assert_close(weights, parameters(), rtol=0, atol=0)
    assert all(x.isfinite().all() for kept in state.values() for x in kept.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("name", ["fused", "momentum"])  # the others ask a number that they keep on the host
def test_the_host_asks_the_device_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "is_known", lambda flag: False)
    with no_waiting():
        trained(name, [1.0, math.nan])
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="waits"), no_waiting():  # the trap works
        trained(name, [1.0])


@pytest.mark.parametrize("limit", [0.5, math.inf])
def test_clipping_is_torchs_to_the_bit(limit: float) -> None:
    ours, theirs = parameters(), parameters()
    for given in (ours, theirs):
        for number, p in enumerate(given):
            p.grad = p.detach() * (number + 1)
    ours.insert(1, Parameter(torch.ones(2)))  # without a gradient
    norms, norm = clip_gradients(ours, limit)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
    del ours[1]
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    torch.testing.assert_close(
        norms, torch.stack([q.norm() * n for q, n in ((theirs[0], 1), (ours[0] * 0, 1), (theirs[1], 2))])
    )


def test_norms_are_float32_whatever_the_gradients() -> None:
    weight = Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)
    norms, norm = clip_gradients([weight], 0.5)
    assert norms.dtype == norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(3), rel=1e-6)
    torch.testing.assert_close(weight.grad.float(), torch.full((3,), 0.5 / math.sqrt(3)), rtol=2**-8, atol=0)


def test_what_is_large_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits to know instead; what is stepped then is the same."""
    copied: list[Tensor] = []
    monkeypatch.setattr(guard, "is_known", lambda flag: False)
    monkeypatch.setattr(guard, "_MOST_COPIED", 4 * (12 + 5))  # the weights alone, before there is any state
    whole = Tensor.clone

    def clone(x: Tensor, **how: Any) -> Tensor:
        copied.append(x)
        return whole(x, **how)

    monkeypatch.setattr(Tensor, "clone", clone)
    found, _ = trained("adamw", [1.0, math.nan, -2.0])
    assert len(copied) == 2
    monkeypatch.undo()
    expected, _ = trained("adamw", [1.0, -2.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
