"""The bounds of helpers/rounding.py: a call's errors grow no more than they say, a wrong result lies beyond them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.network import network_output
from pixart_ft.model.text import pad_text
from tests.helpers.rounding import CALL, GROWTH, gap
from tests.helpers.sampling_by_hand import SHAPE, ready, sample, texts

STOCK: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}
MOVED = 1e-4  # far above float32's own errors, far below what would bend the network


@pytest.fixture(scope="module")
def network(tiny: Path) -> nn.Module:
    network: nn.Module = load_transformer(Base.read(tiny), dtype=torch.float32)
    return network


@contextmanager
def moving(network: nn.Module) -> Iterator[None]:
    """Every output with errors of random sign, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)

    def moved(_: nn.Module, args: object, output: tuple[Tensor]) -> tuple[Tensor]:
        (value,) = output
        return (value + MOVED * value.abs().max() * torch.randn(value.shape, generator=generator),)

    hook = network.register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("case", [*((name, 3) for name in SAMPLERS), ("ddim", 25), *((name, 4) for name in STOCK)])
def test_no_sampler_makes_more_of_an_error_than_the_bound_allows(network: nn.Module, case: tuple[str, int]) -> None:
    name, steps = case

    def drawn() -> Tensor:
        if name in SAMPLERS:
            scheduler: Any = ready(name, steps)
        else:
            scheduler = getattr(diffusers, name)(beta_end=0.02, beta_schedule="linear", **STOCK[name])
            scheduler.set_timesteps(steps)
        return sample(network, range(4), scheduler=scheduler)

    exact = drawn()
    with moving(network):
        assert 0.1 < gap(drawn(), exact) / MOVED < GROWTH


def test_a_call_in_float32_is_within_half_its_bound(network: nn.Module, tiny: Path) -> None:
    exact = load_transformer(Base.read(tiny), dtype=torch.float32).double()
    x, times = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(8) * 142
    embeds, mask = pad_text(texts(range(1, 9)))
    with torch.no_grad():
        assert (
            gap(network_output(network, x, times, embeds, mask), network_output(exact, x, times, embeds, mask))
            < CALL / 2
        )
