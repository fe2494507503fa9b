"""What measures of held-out pictures are tried on: the tiny network, three pictures with texts of three lengths."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.model import loading
from pixart_ft.model.base import Base


@pytest.fixture(scope="module")
def transformer(tiny: Path) -> PixArtTransformer2DModel:
    return loading.load_transformer(Base.read(tiny), dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out() -> HeldOutSet:
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 32, generator=g) for length in (3, 1, 5)]
    return HeldOutSet(torch.randn(3, 4, 8, 8, generator=g), texts, timestep_count=4, seed=0)
