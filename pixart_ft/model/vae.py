"""Pixels to latents and back, through the VAE and through the one shift and scale that training and sampling share.

Pixels are in -1..1. Moments are the VAE's own: mean and standard deviation of its posterior. Latents are what the
transformer reads and writes. Shapes: N pictures, C latent channels, H W latent height and width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pixart_ft.errors import UserError


@dataclass(frozen=True)
class LatentScale:
    """The transformer's latents are x0 = (z - shift) * scale of the VAE's z; a standard deviation is scaled alone."""

    scale: float
    shift: float = 0.0

    @classmethod
    def of(cls, vae_config: Mapping[str, Any]) -> Self:
        """Of a VAE's configuration. Raises ValueError with its `latent_scale_faults`."""
        if faults := latent_scale_faults(vae_config):
            raise ValueError("; ".join(faults))
        return cls(float(vae_config["scaling_factor"]), float(vae_config.get("shift_factor") or 0.0))

    def scaled(self, z: Tensor) -> Tensor:
        """x0 of z."""
        return (z - self.shift) * self.scale

    def unscaled(self, x0: Tensor) -> Tensor:
        """What the VAE decodes; the inverse of `scaled`."""
        return x0 / self.scale + self.shift


def latent_scale_faults(vae_config: Mapping[str, Any]) -> list[str]:
    """What keeps a vae/config.json from saying how its latents are scaled; diffusers would take 0.18215, or nothing."""
    faults = []
    scale, shift = vae_config.get("scaling_factor"), vae_config.get("shift_factor") or 0.0
    if scale is None:
        faults.append("vae/config.json has no scaling_factor (the SDXL VAE's is 0.13025); add it")
    elif not _is_number(scale) or scale <= 0:
        faults.append(f"vae/config.json: scaling_factor {scale!r} is no positive number (the SDXL VAE's is 0.13025)")
    if not _is_number(shift):
        faults.append(f"vae/config.json: shift_factor {shift!r} is no number")
    if vae_config.get("latents_mean") is not None or vae_config.get("latents_std") is not None:
        faults.append(
            "vae/config.json has latents_mean or latents_std: a PixArt-Sigma's latents have one shift and one scale "
            "for all channels; set both to null if the transformer was trained without them"
        )
    return faults


def safe_dtype(vae_config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 for float16 where the VAE overflows in it and says so (`force_upcast`), as the SDXL VAE."""
    return torch.float32 if dtype == torch.float16 and vae_config.get("force_upcast", True) else dtype


def encode_moments(vae: AutoencoderKL, pixels: Tensor, device: torch.device | None = None) -> Tensor:
    """Mean and standard deviation of the VAE's posterior, (N, 2, C, H, W) float32 on the CPU, not scaled.

    pixels   (N, 3, height, width)
    device   where the VAE will run, if it is moved there only then
    """
    device = vae.device if device is None else device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean.float(), (posterior.logvar.float() / 2).exp()], dim=1).cpu()


def encode_pixels(vae: AutoencoderKL, pixels: Tensor, device: torch.device | None = None) -> Tensor:
    """The latents (N, C, H, W) float32 of pixels: the posterior's mean. Raises UserError if they are not finite."""
    return LatentScale.of(vae.config).scaled(_finite(vae, encode_moments(vae, pixels, device)[:, 0]))


@torch.no_grad()
def decode_to_pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels (N, 3, height, width) float32, about -1..1, of latents (N, C, H, W), decoded one at a time.

    Raises UserError if latents or pictures are not finite.
    """
    if not latents.isfinite().all():
        raise UserError("sampling gave NaN or infinity; try dtype float32, a lower guidance or lora_scale")
    unscaled = LatentScale.of(vae.config).unscaled(latents.float()).to(vae.dtype)
    return torch.stack([_finite(vae, vae.decode(z[None], return_dict=False)[0][0].float()) for z in unscaled])


def decode_to_pictures(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents (N, C, H, W); raises as `decode_to_pixels`."""
    return to_pictures(to_unit(decode_to_pixels(vae, latents)))


def to_unit(pixels: Tensor) -> Tensor:
    """0..1 of pixels, cut where they go beyond."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pictures(values: Tensor) -> list[Image.Image]:
    """Of values (N, 3, height, width) in 0..1."""
    numbers = (values * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in numbers]


def _finite(vae: AutoencoderKL, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise UserError(f"the VAE gave NaN or infinity in {vae.dtype}; use dtype bfloat16 or float32")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
