"""What the demo's extractor sees: its pictures spoiled more and more. Oracle: order, and the metrics' own errors."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))

from build_extractor import BLUR, KINDS, SPOILED, blurred, hue_turned, spoil
from extractor_table import SPOILED as DAMAGE
from extractor_table import distances, read

from pixart_ft.errors import UserError
from pixart_ft.evaluation.features import DEMO_EXTRACTOR, Extractor
from pixart_ft.evaluation.held_out import paired_difference
from pixart_ft.evaluation.metrics import frechet_distance, kid


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor.load("demo", "features")


@pytest.fixture(scope="module")
def real(extractor: Extractor) -> Tensor:
    return extractor.of_pictures(read("train")[:120])


@pytest.fixture(scope="module")
def clean(extractor: Extractor) -> Tensor:
    return extractor.of_pictures(read("held_out"))


VAE = "mottling: the VAE, noise in its latents"


@pytest.mark.parametrize(
    "damage", [pytest.param(damage, marks=pytest.mark.slow) if damage == VAE else damage for damage in DAMAGE]
)
def test_the_distances_grow_with_the_damage(extractor: Extractor, real: Tensor, clean: Tensor, damage: str) -> None:
    """From strength to strength, and at the end beyond doubt."""
    found = [values for _, *values in distances(extractor, damage, real)]
    for number, metric in enumerate((frechet_distance, kid)):
        means = [values[number].mean().item() for values in found]
        assert means == sorted(means) and len(set(means)) == len(means), (metric, means)
        change = paired_difference(metric(clean, real), found[-1][number])
        assert change.mean > 3 * change.standard_error, (metric, change)


def test_the_extractor_is_small_opens_everywhere_and_reads_nothing(extractor: Extractor) -> None:
    assert sum(file.stat().st_size for file in DEMO_EXTRACTOR.iterdir()) < 1.2e6
    assert "Pil" not in (DEMO_EXTRACTOR / "preprocessor_config.json").read_text()  # a name that transformers 5.0 lacks
    with pytest.raises(UserError, match="demo reads no captions"):
        extractor.of_captions(["a cat"])


def test_what_the_extractor_learns_to_tell_is_what_was_done() -> None:
    """Some pictures are spoiled, the rest are as they were; a blur keeps means, a turn of hues keeps greys."""
    clean = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = clean.clone()
    strength = spoil(pictures, torch.Generator().manual_seed(1))
    changed = (pictures != clean).flatten(1).any(1)
    assert (changed == (strength > 0).any(1)).all() and strength.max() <= 1
    shares = (strength > 0).double().mean(0)
    assert shares.shape == (len(KINDS),) and ((shares - SPOILED).abs() < 4 * math.sqrt(SPOILED / 200)).all()
    for sigma in BLUR:
        soft = blurred(clean, torch.full((200,), sigma))
        torch.testing.assert_close(soft.mean((2, 3)), clean.mean((2, 3)), atol=1e-5, rtol=0)
        assert (soft.std((2, 3)) < clean.std((2, 3))).all()
    third = torch.full((1,), 2 * torch.pi / 3)
    primaries = torch.tensor([[1.0, -1, -1], [0.2, 0.2, 0.2]]).T[None, :, :, None]
    turned = hue_turned(primaries, third)[0, :, :, 0].T  # red to green, grey to itself
    torch.testing.assert_close(turned, torch.tensor([[-1.0, 1, -1], [0.2, 0.2, 0.2]]), atol=1e-6, rtol=0)
