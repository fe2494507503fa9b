"""The average of the weights. Oracle: its defining recursion, in float64."""

from typing import get_args

import pytest
import torch
from torch.nn import Parameter

from pixart_ft.config.train import EmaProfile
from pixart_ft.errors import UserError
from pixart_ft.training.ema import Ema, OwnAverage


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


def test_constant_is_the_same_from_the_first_update() -> None:
    weights = parameters()
    ema = Ema(weights, 0.7, "constant")
    begin = weights["a"].detach().double()
    step(weights, 0)
    ema.update()
    torch.testing.assert_close(ema.shadows["a"].double(), 0.7 * begin + 0.3 * weights["a"].detach().double())


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72)])  # the paper's values
def test_power_weighs_every_step_by_its_number_to_the_gamma(width: float, gamma: float) -> None:
    """Whose spread is `width` of the steps, however many they are; the weights before the first step do not count."""
    weights = {"a": Parameter(torch.zeros(400))}
    ema = Ema(weights, 0.5, "power", width=width)
    for n in range(400):  # the n-th element marks the n-th step
        with torch.no_grad():
            weights["a"].zero_()[n] = 1.0
        ema.update()
    share, place = ema.shadows["a"].double(), torch.arange(1, 401, dtype=torch.float64) / 400
    assert share.sum().item() == pytest.approx(1, rel=1e-5)
    mean = (share * place).sum()
    assert ((share * (place - mean) ** 2).sum().sqrt()).item() == pytest.approx(width, rel=0.02)
    steps = torch.arange(1, 401, dtype=torch.float64)
    expected = (steps ** (gamma + 1) - (steps - 1) ** (gamma + 1)) / 400 ** (gamma + 1)  # the integral of t^gamma
    torch.testing.assert_close(share[200:], expected[200:], rtol=0.01, atol=0)  # gamma is known to 2 digits


def test_on_the_cpu_it_is_the_same() -> None:
    weights = parameters()
    here, there = Ema(weights, 0.9), Ema(weights, 0.9, on_cpu=True)
    for n in range(3):
        step(weights, n)
        here.update()
        there.update()
    assert here.num_updates == there.num_updates == 3
    assert all(torch.equal(there.shadows[name], shadow) for name, shadow in here.shadows.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_of_weights_on_a_gpu_it_may_stay_on_the_cpu() -> None:
    """The copy of one update is taken in by the next, or when the average is asked for."""
    weights = {name: Parameter(p.detach().cuda()) for name, p in parameters().items()}
    here, there = Ema(weights, 0.9), Ema(weights, 0.9, on_cpu=True)
    for n in range(3):
        for parameter in weights.values():
            parameter.data += n + 1
        here.update()
        there.update()
    assert there.num_updates == 3 and all(shadow.device.type == "cpu" for shadow in there.shadows.values())
    for name, shadow in here.shadows.items():
        torch.testing.assert_close(there.shadows[name], shadow.cpu(), rtol=1e-6, atol=1e-6)
    with there.applied():
        torch.testing.assert_close(weights["a"].detach().cpu(), there.shadows["a"], rtol=0, atol=0)


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


@pytest.mark.parametrize("profile", get_args(EmaProfile))
def test_continues_exactly_from_a_saved_state(profile: EmaProfile) -> None:
    weights = parameters()
    ema = Ema(weights, 0.999, profile)
    for n in range(3):
        step(weights, n)
        ema.update()
    state = {
        "num_updates": ema.num_updates,
        "shadows": {k: v.clone() for k, v in ema.state_dict()["shadows"].items()},
    }
    resumed = Ema(weights, 0.999, profile)
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


class InEvalMode:
    """An optimizer that averages by itself, as schedule-free's: `eval` puts that into the weights, `train` out."""

    def __init__(self, weights: dict[str, Parameter]) -> None:
        self.weights = weights

    @torch.no_grad()
    def eval(self) -> None:
        for parameter in self.weights.values():
            parameter.mul_(1 / 3)

    @torch.no_grad()
    def train(self) -> None:
        for parameter in self.weights.values():
            parameter.mul_(3)


def test_an_optimizer_s_own_average_is_used_and_leaves_no_trace() -> None:
    weights = parameters()
    average = OwnAverage(weights, InEvalMode(weights))
    own = {name: p.detach().clone() for name, p in weights.items()}
    used = average.weights
    with average.applied():
        for name, parameter in weights.items():
            assert torch.equal(parameter, used[name]) and torch.equal(parameter, own[name] * (1 / 3))
    assert all(torch.equal(parameter, own[name]) for name, parameter in weights.items())
    assert not average.is_on, "there is no second set of weights to keep"
    average.update()
    average.load_state_dict(average.state_dict())


def test_off_does_nothing_and_says_so() -> None:
    ema = Ema.off()
    assert not ema.is_on and Ema(parameters(), 0.9).is_on
    ema.update()
    ema.load_state_dict(ema.state_dict())
    with ema.applied():
        pass
