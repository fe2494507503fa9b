"""The VAE's latents and the transformer's: one shift and one scale, the same in training and in sampling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


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
    elif not _finite(scale) or scale <= 0:
        faults.append(f"vae/config.json: scaling_factor {scale!r} is no positive number (the SDXL VAE's is 0.13025)")
    if not _finite(shift):
        faults.append(f"vae/config.json: shift_factor {shift!r} is no number")
    if vae_config.get("latents_mean") is not None or vae_config.get("latents_std") is not None:
        faults.append(
            "vae/config.json has latents_mean or latents_std: a PixArt-Sigma's latents have one shift and one scale "
            "for all channels; set both to null if the transformer was trained without them"
        )
    return faults


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
