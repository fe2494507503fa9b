"""The average of the weights. Oracle: its defining recursion, in float64."""

import pytest
import torch
from torch.nn import Parameter

from pixart_ft.errors import UserError
from pixart_ft.training.ema import Ema


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(3, 4, generator=draw).to(dtype)) for name in ("a", "b")}


def step(weights: dict[str, Parameter], number: int) -> None:
    draw = torch.Generator().manual_seed(100 + number)
    for parameter in weights.values():
        parameter.data += torch.randn(3, 4, generator=draw).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_its_recursion_in_float32_with_warm_up(dtype: torch.dtype) -> None:
    weights = parameters(dtype=dtype)
    ema = Ema(weights, 0.5)
    expected = {name: p.detach().double() for name, p in weights.items()}
    for n in range(20):
        step(weights, n)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))  # 0.1, 2/11, ... and 0.5 from n = 8
        expected = {k: decay * e + (1 - decay) * weights[k].detach().double() for k, e in expected.items()}
    for name, shadow in ema.shadows.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_applied_swaps_and_restores_bit_for_bit_even_after_an_error() -> None:
    weights = parameters(dtype=torch.bfloat16)
    ema = Ema(weights, 0.9)
    step(weights, 0)
    ema.update()
    own = {name: p.detach().clone() for name, p in weights.items()}
    shadows = {name: shadow.clone() for name, shadow in ema.shadows.items()}
    with pytest.raises(RuntimeError, match="in the middle"), ema.applied():
        for name, parameter in weights.items():
            assert torch.equal(parameter, shadows[name].to(torch.bfloat16))
            assert not torch.equal(parameter, own[name])
        raise RuntimeError("in the middle")
    assert all(torch.equal(parameter, own[name]) for name, parameter in weights.items())
    assert all(torch.equal(shadow, shadows[name]) for name, shadow in ema.shadows.items())


def test_continues_exactly_from_a_saved_state() -> None:
    weights = parameters()
    ema = Ema(weights, 0.999)
    for n in range(3):
        step(weights, n)
        ema.update()
    state = {
        "num_updates": ema.num_updates,
        "shadows": {k: v.clone() for k, v in ema.state_dict()["shadows"].items()},
    }
    resumed = Ema(weights, 0.999)
    resumed.load_state_dict(state)
    for n in range(3, 6):
        step(weights, n)
        ema.update()
        resumed.update()
    assert resumed.num_updates == 6
    assert all(torch.equal(resumed.shadows[name], shadow) for name, shadow in ema.shadows.items())


def test_a_state_of_other_weights_is_refused() -> None:
    weights = parameters()
    ema = Ema(weights, 0.9)
    for other in (
        Ema.off(),
        Ema({"a": weights["a"]}, 0.9),
        Ema({**weights, "b": Parameter(torch.zeros(3, 5))}, 0.9),
    ):
        with pytest.raises(UserError, match=r"average is of other weights \(1|2 differ, such as [ab]\).*ema_decay"):
            ema.load_state_dict(other.state_dict())


def test_off_does_nothing_and_says_so() -> None:
    ema = Ema.off()
    assert not ema.is_on and Ema(parameters(), 0.9).is_on
    ema.update()
    ema.load_state_dict(ema.state_dict())
    with ema.applied():
        pass
