"""Pixels to latents and back. Oracles: diffusers' own VAE calls with the shift and scale by hand; properties."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from torch import Tensor

from pixart_ft.data.cache import CachedPictures, TensorStore, cache_pictures
from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import Fit, fitted
from pixart_ft.errors import UserError
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_vae
from pixart_ft.model.vae import decode_to_pictures, decode_to_pixels, encode_moments, encode_pixels
from pixart_ft.randomness import normal
from pixart_ft.training.batches import TrainingSet, draw_batch
from tests.helpers.rounding import CALL, check_same_picture, gap
from tests.helpers.tiny import shifted_copy
from tests.helpers.toy_run import LAWS


@pytest.fixture
def vae(tiny: Path) -> AutoencoderKL:
    return load_vae(Base.read(tiny), dtype=torch.float32)


@pytest.fixture(scope="module")
def shifted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a shift of 0.5."""
    return shifted_copy(tiny, tmp_path_factory.mktemp("shifted") / "base")


def pixels(count: int = 1) -> Tensor:
    return 2 * torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1


def test_training_and_sampling_have_the_same_latents(shifted: Path, pictures: Path, tmp_path: Path) -> None:
    """A training sample, less what the posterior's noise adds to it, is what image to image starts from."""
    vae, store, seed = load_vae(Base.read(shifted), dtype=torch.float32), TensorStore(tmp_path), LAWS.seed
    row = read_folder(pictures)[0]
    keys = cache_pictures(store, [row], load_vae=lambda: vae, vae_id="vae", views=[[Fit((64, 64))]], progress=False)
    store.add({"text": torch.zeros(1, 3)})
    data = TrainingSet(CachedPictures(store, keys, ["text"]), Base.read(shifted).latent_scale, torch.zeros(1, 3))
    x0 = draw_batch(data, [0], replace(LAWS, timestep_law="uniform"), global_batch=1, num_steps=10).x0
    picture = fitted(row.opened().picture, 64)[None]
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
    noise = normal(seed, [0], "posterior", (4, 8, 8))
    sampled = encode_pixels(vae, picture)
    assert torch.equal(data.scale.scaled(data.pictures.latents([0])[0]), sampled)
    assert gap(x0 - 0.13025 * posterior.std * noise, sampled) < CALL
    assert gap(sampled, (posterior.mean - 0.5) * 0.13025) < CALL
    assert gap(sampled, posterior.mean * 0.13025) > 0.01  # the shift is seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_vaes_own_round_trip(shifted: Path, dtype: torch.dtype) -> None:
    """The shift and scale cancel; latents stay in float32, whatever the VAE computes in."""
    vae, picture = load_vae(Base.read(shifted), dtype=dtype), pixels(2)
    latents = encode_pixels(vae, picture)
    with torch.no_grad():
        there = vae.encode(picture.to(dtype)).latent_dist.mean
        back = [vae.decode((z / 0.13025 + 0.5).to(dtype)[None]).sample[0] for z in latents]
    assert latents.dtype == torch.float32 and gap(latents / 0.13025 + 0.5, there) < 4 * torch.finfo(torch.float32).eps
    assert torch.equal(decode_to_pixels(vae, latents), torch.stack(back).float())


def test_an_autocast_around_it_does_not_reach_the_vae(vae: AutoencoderKL) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = encode_moments(vae, pixels())
    assert torch.equal(inside, encode_moments(vae, pixels()))


def test_decoding_is_the_stock_pipelines(tiny: Path, vae: AutoencoderKL) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.13025, return_dict=False)[0]
    stock = pipeline.image_processor.postprocess(decoded, output_type="pil")
    ours = decode_to_pictures(vae, latents)
    assert [picture.size for picture in ours] == [(64, 64)] * 3
    for picture, other in zip(ours, stock, strict=True):  # ours are decoded one at a time
        check_same_picture(picture, other)
        assert numpy.asarray(picture).std() > 1  # not one flat colour


def test_decoding_adds_the_shift_and_refuses_what_is_not_finite(tiny: Path, vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = load_vae(Base.read(tiny), dtype=torch.float32)
    shifted.register_to_config(shift_factor=0.5)
    expected = decode_to_pictures(vae, latents + 0.5 * 0.13025)[0]
    check_same_picture(decode_to_pictures(shifted, latents)[0], expected)
    assert decode_to_pictures(shifted, latents)[0].tobytes() != decode_to_pictures(vae, latents)[0].tobytes()
    with pytest.raises(UserError, match="sampling gave NaN"):
        decode_to_pictures(vae, latents * float("inf"))
    shifted.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the VAE gave NaN"):
        decode_to_pictures(shifted, latents)
