"""Trains the demo's AutoencoderKL: factor 8, four latent channels, on random crops, then on whole pictures.

Resumable: a checkpoint every `CHECKPOINT_STEPS` steps; every step draws from a generator seeded by its index.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

CHECKPOINT_STEPS = 200
KL_WEIGHT = 1e-3  # times the KL to N(0, 1) in nats per latent number


def build_vae() -> AutoencoderKL:
    """1.6 M parameters; no attention in the middle, so that crops and whole pictures meet the same network."""
    blocks = 4
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
    )


def crops(pictures: np.ndarray, generator: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """`count` random crops, flipped at random, as (N, 3, size, size) in [-1, 1]."""
    out = np.empty((count, size, size, 3), np.uint8)
    for i, n in enumerate(generator.integers(len(pictures), size=count)):
        y, x = generator.integers(pictures.shape[1] - size + 1, size=2)
        crop = pictures[n, y : y + size, x : x + size]
        out[i] = crop[:, ::-1] if generator.random() < 0.5 else crop
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on their differences (edges) and on 8 x 8 averages, the squared error, and one of the hue.

    Without the last term rare hues (green, purple) come out grey: their error is a small part of all others.
    """

    def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]

    def hue(x: torch.Tensor) -> torch.Tensor:  # red against green, blue against yellow, averaged over 4 x 4 pixels
        red, green, blue = F.avg_pool2d(x, 4).unbind(1)
        return torch.stack([red - green, blue - (red + green) / 2], 1)

    edges = sum(F.l1_loss(a, b) for a, b in zip(differences(pred), differences(target), strict=True))
    averages = F.l1_loss(F.avg_pool2d(pred, 8), F.avg_pool2d(target, 8))
    hues = F.mse_loss(hue(pred), hue(target)) + 0.25 * F.l1_loss(hue(pred), hue(target))
    return F.l1_loss(pred, target) + F.mse_loss(pred, target) + 0.5 * edges + averages + 4.0 * hues


def train_vae(pictures: np.ndarray, folder: Path, steps: int, peak_rate: float = 1.5e-3) -> AutoencoderKL:
    """Train to `steps`, resuming from `folder`; returns the trained model in eval mode."""
    torch.manual_seed(0)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, start = folder / "state.pt", 0
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    vae.train()
    began, running = time.monotonic(), 0.0
    for step in range(start, steps):
        warm_up, decay = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm_up * max(decay, 0.01)
        whole = step >= 0.8 * steps
        x = crops(pictures, np.random.default_rng(step), *((2, 256) if whole else (8, 128)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl() / posterior.mean[0].numel()
        loss = reconstruction_loss(decoded.float(), x) + KL_WEIGHT * kl.float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mse = F.mse_loss(decoded.float().clamp(-1, 1), x).item()
        running = mse if running == 0 else 0.99 * running + 0.01 * mse
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.monotonic() - began)
            print(
                f"vae {step + 1}/{steps}  loss {loss.item():.4f}  kl {kl.mean().item():.2f}  "
                f"{10 * np.log10(4 / running):.2f} dB  {rate:.2f} steps/s",
                flush=True,
            )
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
    return vae.eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: np.ndarray, scaling_factor: float = 0.13025) -> None:
    """Give every latent channel mean 0 and standard deviation 1 / `scaling_factor` over `pictures`, exactly.

    The shift and scale go into the 1x1 convolutions around the latent, which leaves every reconstruction as it
    was: z' = (z - m) / (s f) per channel on the encoder's side, its inverse on the decoder's. The factor is the
    SDXL VAE's, so that a forgotten factor shows here as it would with the real model.
    """
    chunks = [pictures[i : i + 8].copy() for i in range(0, len(pictures), 8)]
    means = [vae.encode(torch.from_numpy(c).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean for c in chunks]
    z = torch.cat(means).transpose(0, 1).flatten(1)
    shift, scale = z.mean(1), z.std(1) * scaling_factor
    count = vae.config.latent_channels
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:count] /= scale.view(-1, 1, 1, 1)
    into.bias[:count] = (into.bias[:count] - shift) / scale
    into.bias[count:] -= 2 * scale.log()  # the other half is the log variance
    out.bias += (out.weight[:, :, 0, 0] * shift).sum(1)
    out.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=scaling_factor)
