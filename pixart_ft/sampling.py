"""From text embeddings to pictures: the sampling loop with classifier-free guidance, and the VAE's decoder.

Shapes: N pictures, C latent channels, H W latent height and width, L text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from pixart_ft.data.captions import pad_text
from pixart_ft.denoiser import denoise
from pixart_ft.diffusion.process import PredictionType, network_timesteps, predict, to_x0
from pixart_ft.diffusion.respacing import Spacing, spaced_indices
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.solvers import Variance, ddim_step, ddpm_step
from pixart_ft.errors import UserError
from pixart_ft.samplers import SAMPLERS


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    embeds: Tensor,
    mask: Tensor,
    null: Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    eta: float = 0.0,
    variance: Variance = "beta_tilde",
    spacing: Spacing = "iddpm",
    autocast: torch.dtype | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Latents (N, *shape) float32, in the VAE's scale, of the captions `embeds` (N, L, D) with `mask` (N, L).

    null: (L', D), what the unconditional branch sees: the null caption, or a negative prompt.
    guidance: the mean half of the output is u + guidance (c - u) on all channels (Ho & Salimans 2022), the
        variance half is the conditional branch's; at 1 the unconditional branch is not run.
    generators: one CPU generator a picture, for its first noise and every later one.
    eta (ddim) and variance (ddpm): as in `diffusion.solvers`.
    autocast: half type to run the network in; the latents stay float32.
    progress: called after every step.

    Raises ValueError for a network in training mode, and for settings that schedule or solver refuse.
    """
    if any(module.training for module in transformer.modules()):
        raise ValueError("the network is in training mode: its dropout would alter the pictures; call .eval()")
    assert len(generators) == len(embeds)
    device = embeds.device
    kept = torch.tensor(spaced_indices(schedule.num_steps, steps, spacing), device=device)
    process = schedule.respaced(kept.tolist())
    guided = guidance != 1.0
    if guided:
        embeds, mask = _with_unconditional(embeds, mask, null)

    def noise() -> Tensor:
        rows = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
        return torch.stack(rows).to(device)

    x = noise()
    for index in reversed(range(steps)):
        t = torch.full((len(x),), index, dtype=torch.int64, device=device)
        timesteps = network_timesteps(process, t)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if guided:
                both = denoise(transformer, x.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds, mask)
                output = _guide(both, shape[0], guidance)
            else:
                output = denoise(transformer, x, timesteps, embeds, mask)
        prediction = predict(process, output, x, t, prediction_type)
        if prediction_type == "posterior_mean":  # that of the step it was trained on, not of the longer one taken here
            prediction = replace(prediction, x0=to_x0(schedule, output[:, : shape[0]], x, kept[t], prediction_type))
        if sampler == "ddim":
            x = ddim_step(process, prediction, x, t, eta=eta, noise=noise() if eta else None)
        elif sampler == "ddpm":
            x = ddpm_step(process, prediction, x, t, variance=variance, noise=noise())
        else:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
        if progress is not None:
            progress()
    return x


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents (N, C, H, W) in the VAE's scale, decoded one at a time to bound the memory.

    Raises UserError if latents or pictures are not finite.
    """
    if not latents.isfinite().all():
        raise UserError("sampling gave NaN or infinity; try dtype float32, a lower guidance or lora_scale")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    unscaled = latents.float() / vae.config.scaling_factor + shift
    pictures = []
    for latent in unscaled.to(vae.device, vae.dtype):
        picture = vae.decode(latent[None], return_dict=False)[0][0].float()
        if not picture.isfinite().all():
            raise UserError(f"the VAE gave NaN or infinity in {vae.dtype}; use dtype bfloat16 or float32")
        values = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        pictures.append(Image.fromarray(values.permute(1, 2, 0).numpy()))
    return pictures


def _with_unconditional(embeds: Tensor, mask: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Text and mask of 2N rows: `null` (L', D) for each row, then the rows, all padded to one length."""
    length = max(embeds.shape[1], len(null))
    null_embeds, null_mask = pad_text([null.to(embeds)] * len(embeds), length)
    missing = length - embeds.shape[1]
    return (
        torch.cat([null_embeds, F.pad(embeds, (0, 0, 0, missing))]),
        torch.cat([null_mask.to(mask), F.pad(mask, (0, missing))]),
    )


def _guide(both: Tensor, channels: int, guidance: float) -> Tensor:
    """Guided output (N, ...) from the unconditional and the conditional half of `both` (2N, ...)."""
    without, given = both.chunk(2)
    mean = without[:, :channels] + guidance * (given[:, :channels] - without[:, :channels])
    return torch.cat([mean, given[:, channels:]], dim=1)
