"""Drawing that starts from a picture, on the tiny pipeline.

Oracles: the forward process written out, with the noise of the picture's own seed and latents that the VAE gives
without the package; the picture itself, where hardly any noise is added.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.errors import UserError
from pixart_ft.sampling.settings import Settings, scheduler_for
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.schedulers import PixArtScheduler
from pixart_ft.schedulers.discrete import IndexScheduler
from pixart_ft.schedulers.sigma import SigmaScheduler
from tests.helpers.rounding import PICTURE, gap
from tests.helpers.tiny import shifted_copy

PROMPT, SEED = "a red circle on grey", 4


@pytest.fixture(scope="module")
def tiny(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a VAE that shifts its latents."""
    return shifted_copy(tiny, tmp_path_factory.mktemp("shifted") / "base")


@pytest.fixture(scope="module")
def model(tiny: Path) -> TextToImage:
    return TextToImage.load(tiny)


@pytest.fixture(scope="module")
def photo(pictures: Path) -> Path:
    return pictures / "003.png"


@torch.no_grad()
def encoded(tiny: Path, picture: Image.Image) -> Tensor:
    """The mean of the VAE's posterior, in the scale of sampling (C, H, W)."""
    vae = AutoencoderKL.from_pretrained(str(tiny), subfolder="vae")
    pixels = torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    latents: Tensor = vae.encode(pixels[None]).latent_dist.mode()[0].sub(0.5) * 0.13025
    return latents


@contextmanager
def calls(model: TextToImage) -> Iterator[list[tuple[Tensor, float]]]:
    """Input and timestep of every network call."""
    found: list[tuple[Tensor, float]] = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args[0], kwargs["timestep"][0].item())), with_kwargs=True
    )
    try:
        yield found
    finally:
        hook.remove()


def first_level(scheduler: PixArtScheduler) -> float:
    """The noise level at which the scheduler takes its first call to be."""
    assert scheduler.begin_index is not None
    if isinstance(scheduler, SigmaScheduler):
        return scheduler.calls[scheduler.begin_index]
    assert isinstance(scheduler, IndexScheduler)
    step = scheduler.step_starts.index(scheduler.begin_index)
    return scheduler.respaced.sigmas[-1 - step].item()


CHURNED = [(name, {"s_churn": 2.0}) for name, facts in SAMPLERS.items() if "s_churn" in facts.options]


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("schedule", ["base", "cosine"])
@pytest.mark.parametrize(("sampler", "options"), [*((name, {}) for name in SAMPLERS), *CHURNED], ids=str)
@pytest.mark.filterwarnings("ignore:of 1000 noise levels")
def test_sampling_begins_with_the_picture_at_the_level_of_its_first_step(
    tiny: Path, model: TextToImage, photo: Path, sampler: str, options: dict[str, Any], schedule: Any, strength: float
) -> None:
    """(x0 + sigma noise) / sqrt(1 + sigma^2) reaches the network, for the sigma that the sampler goes on from."""
    settings = model.settled(
        Settings(
            sampler=sampler, steps=4, guidance=1.0, options=options, schedule=schedule, image=photo, strength=strength
        )
    )
    with calls(model) as found:
        model.latents([("", 9), (PROMPT, SEED)], settings)
    scheduler = scheduler_for(settings, model.abilities)
    assert isinstance(scheduler, PixArtScheduler)
    sigma = first_level(scheduler)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    expected = (encoded(tiny, Image.open(photo)) + sigma * noise) / math.sqrt(1 + sigma**2)
    torch.testing.assert_close(found[0][0][1], expected, rtol=1e-4, atol=1e-4)
    assert len(found) == model.calls(settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_least_strength_leaves_the_picture_and_the_greatest_only_noise(
    tiny: Path, model: TextToImage, photo: Path, sampler: str
) -> None:
    x0 = encoded(tiny, Image.open(photo))
    settings = model.settled(Settings(sampler=sampler, steps=50, guidance=1.0, image=photo, strength=1e-3))
    (kept,) = model.latents([(PROMPT, SEED)], settings)
    assert 0 < (kept - x0).abs().max() < 0.15  # sigma is 0.01; of noise alone it would be above 2
    whole = replace(settings, steps=4, strength=1.0)
    assert scheduler_for(whole, model.abilities).begin_index == 0
    with calls(model) as begun:
        model.latents([(PROMPT, SEED)], whole)
    with calls(model) as plain:
        model.latents([(PROMPT, SEED)], replace(whole, image=None))
    assert len(begun) == len(plain)
    assert (begun[0][0] - plain[0][0]).abs().max() < 0.02  # sqrt(alpha_bar) is 0.006 at the last step


def test_the_picture_is_cropped_to_the_size_asked_for(tiny: Path, model: TextToImage, tmp_path: Path) -> None:
    middle = Image.effect_noise((96, 32), 80).convert("RGB")
    picture = Image.new("RGB", (96, 96), "red")
    picture.paste(middle, (0, 32))
    picture.save(tmp_path / "tall.png")
    settings = Settings(steps=50, guidance=1.0, image=tmp_path / "tall.png", strength=1e-3, width=96, height=32)
    (kept,) = model.latents([(PROMPT, SEED)], model.settled(settings))
    assert kept.shape == (4, 4, 12)
    assert (kept - encoded(tiny, middle)).abs().max() < 0.15
    assert model.generate(PROMPT, settings=settings)[0].size == (96, 32)


def test_what_is_drawn_is_decoded_with_the_shift(model: TextToImage, photo: Path) -> None:
    """As diffusers decodes: latents / scale + shift."""
    settings = model.settled(Settings(steps=50, guidance=1.0, image=photo, strength=1e-3))
    latents = model.latents([(PROMPT, SEED)], settings)
    (drawn,) = model.draw([(PROMPT, SEED)], settings)
    away = []
    for shift in (0.5, 0.0):
        with torch.no_grad():
            decoded = model.vae.decode(latents / 0.13025 + shift).sample[0].permute(1, 2, 0)
        away.append(((decoded.clamp(-1, 1) + 1) * 127.5 - torch.from_numpy(numpy.array(drawn))).abs().max())
    assert away[0] < 0.6 < 2 < away[1]  # rounded to one of 255 levels, and float32 of another order


def test_seeds_and_strength_tell_the_pictures_apart(model: TextToImage, photo: Path) -> None:
    drawn = [
        model.latents([(PROMPT, seed)], model.settled(Settings(steps=4, image=photo, strength=strength)))
        for seed, strength in ((1, 0.5), (1, 0.5), (2, 0.5), (1, 0.75))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert all((drawn[0] - other).abs().max() > 1e-3 for other in drawn[2:])


@pytest.mark.parametrize(("strength", "run"), [(1.0, 5), (0.6, 3)])
def test_inversion_climbs_unguided_to_where_sampling_begins(
    tiny: Path, model: TextToImage, photo: Path, strength: float, run: int
) -> None:
    """One call less than it then takes down, from the picture itself, and no seed matters."""
    settings = model.settled(Settings(steps=5, image=photo, strength=strength, inversion=True))
    with calls(model) as found:
        drawn = model.latents([(PROMPT, SEED)], settings)
    kept = [0, 250, 500, 749, 999][:run]
    assert [(len(x), t) for x, t in found] == [(1, t) for t in kept[:-1]] + [(2, t) for t in reversed(kept)]
    assert len(found) == model.calls(settings)
    torch.testing.assert_close(found[0][0][0], encoded(tiny, Image.open(photo)), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.latents([(PROMPT, SEED + 1)], settings), drawn)
    both = model.latents([(PROMPT, SEED), ("a black square", 0)], settings)
    assert gap(both[:1], drawn) < PICTURE
    random = model.latents([(PROMPT, SEED)], replace(settings, inversion=False))
    assert (random - drawn).abs().max() > 1e-3 * drawn.abs().max()


def test_the_recipe_holds_what_the_picture_was_made_of(model: TextToImage, photo: Path) -> None:
    settings = model.settled(Settings(sampler="euler", options={"s_churn": 1.0}, image=photo, strength=0.3))
    recipe = model.recipe(PROMPT, SEED, settings)
    assert recipe["image_sha256"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    assert (recipe["image"], recipe["strength"], recipe["inversion"]) == (str(photo), 0.3, False)
    assert recipe["options"] == dict(settings.options) and settings.options["s_churn"] == 1.0
    assert set(settings.options) == set(SAMPLERS["euler"].options)
    plain = model.recipe(PROMPT, SEED, model.settled(Settings()))
    assert plain["image"] is None and "image_sha256" not in plain
    assert plain["options"] == {"spacing": "iddpm", "clip_x0": None, "eta": 0.0}


def test_a_file_that_is_no_picture_is_named(model: TextToImage, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png"):
        model.generate(PROMPT, settings=Settings(steps=1, image=tmp_path / "text.png"))
