"""Trains the demo's AutoencoderKL: factor 8, four latent channels, on random crops and whole pictures.

What it must not lose is hue. So half of the crops have their hues turned or their channels exchanged, some are cards
of plain colours, and the loss has a term for the colour, relative to how strong the colour is. Resumable: a checkpoint
every `CHECKPOINT_STEPS` steps; every step draws from a generator seeded by its index.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_course import Course
from demo_muon import BatchedMuon
from diffusers import AutoencoderKL

from pixart_ft.model.vae import encode_moments

CHECKPOINT_STEPS = 200
KL_WEIGHT, KL_STEPS = 5e-4, 2000  # times the KL to N(0, 1) in nats per latent number; steps until it has its weight
CARDS, TURNED, EXCHANGED = 0.1, 0.4, 0.3  # shares of the crops
# (until this share of the steps, pixels a side, pictures a step): many steps on small crops of many pictures cost least
# and teach most; whole pictures come last, since the group norms see all of a picture
PHASES = ((0.6, 64, 8), (0.9, 128, 3), (1.0, 256, 2))
FIRST_LOG_VARIANCE = -6.0  # of the posterior: at 0 the noise drowns all but the brightness, and grey pictures come out
EMA_DECAY = 0.999
SATURATED = 64 / 255  # a pixel whose largest and smallest channel differ by this much has a hue
ADAMW_RATE, MUON_RATE = 2e-3, 2e-3  # peaks
DECAY_SHARE = 0.3  # the last steps take the rates linearly to zero


def build_vae() -> AutoencoderKL:
    """1.4 M parameters; no attention in the middle, so that crops and whole pictures meet the same network.

    Few channels at full resolution: there a convolution costs 64 times what it costs on the latents. One group for
    every norm: groups of two channels take each pair's mean over the picture away, and the hue with it.
    """
    blocks = 4
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=256,
        mid_block_add_attention=False,
    )
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], FIRST_LOG_VARIANCE)
    return vae


def turn_hue(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """(..., 3) uint8 pixels with the HSV hue turned; value and saturation stay."""
    rgb = pixels.astype(np.float32)
    value, low = rgb.max(-1, keepdims=True), rgb.min(-1, keepdims=True)
    hue = hue_degrees(torch.from_numpy(rgb)).numpy()[..., None] + degrees
    k = (np.array([5.0, 3.0, 1.0], np.float32) + hue / 60) % 6
    turned = value - (value - low) * np.clip(np.minimum(k, 4 - k), 0, 1)
    return np.where(value > low, turned, rgb).round().astype(np.uint8)


def hue_degrees(rgb: torch.Tensor) -> torch.Tensor:
    """The HSV hue of (..., 3) colours in degrees, 0 for greys."""
    red, green, blue = rgb.unbind(-1)
    high, chroma = rgb.amax(-1), rgb.amax(-1) - rgb.amin(-1)
    safe = chroma.clamp(min=1e-6)
    sextant = torch.where(
        high == red,
        ((green - blue) / safe) % 6,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return torch.where(chroma > 0, 60 * sextant, 0.0)


def colour_card(generator: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: a plain colour or a gradient with up to four discs and boxes of other colours."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size

    def paint() -> np.ndarray:
        first = generator.integers(256, size=3)
        if generator.random() < 0.5:
            return np.broadcast_to(first, (size, size, 3))
        a = generator.random() * 2 * np.pi
        along = np.clip(0.5 + (x - 0.5) * np.cos(a) + (y - 0.5) * np.sin(a), 0, 1)[..., None]
        return first * (1 - along) + generator.integers(256, size=3) * along

    card = np.full((size, size, 3), 255.0) if generator.random() < 0.3 else np.array(paint(), np.float64)
    for _ in range(generator.integers(5)):
        (cx, cy), (w, h) = generator.random(2), generator.uniform(0.05, 0.5, 2)
        dx, dy = np.abs(x - cx) / w, np.abs(y - cy) / h
        inside = np.maximum(dx, dy) < 1 if generator.random() < 0.5 else dx**2 + dy**2 < 1
        card[inside] = np.asarray(paint())[inside]
    return card.round().astype(np.uint8)


def crops(pictures: np.ndarray, generator: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """`count` random crops, flipped, recoloured or replaced by a card at random, as (N, 3, size, size) in [-1, 1].

    Of two places the one with more in it is taken: half of all pixels are white margins.
    """
    out = np.empty((count, size, size, 3), np.uint8)
    for i, n in enumerate(generator.integers(len(pictures), size=count)):
        if generator.random() < CARDS:
            out[i] = colour_card(generator, size)
            continue
        places = generator.integers(pictures.shape[1] - size + 1, size=(2, 2))
        two = [pictures[n, y : y + size, x : x + size] for y, x in places]
        crop = max(two, key=lambda c: float(c[::4, ::4].std()))
        crop = crop[:, ::-1] if generator.random() < 0.5 else crop
        if generator.random() < TURNED:
            crop = turn_hue(crop, generator.uniform(0, 360))
        if generator.random() < EXCHANGED:
            crop = crop[..., generator.permutation(3)]
        out[i] = crop
    return to_pixels(out)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(N, 3, height, width) in [-1, 1] of bytes (N, height, width, 3)."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def chroma(x: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 2, H, W): colour without brightness; its angle is the hue, its length the strength."""
    red, green, blue = x.unbind(1)
    return torch.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], 1)


def reconstruction_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the pixels, L1 of their differences (edges), and the colour.

    The squared error of 8 x 8 averages, and of their colours again, is what makes a network that draws grey shapes
    after 200 steps look for the colour. The second kind of colour term is relative to the colour's strength: in all
    others a wrong hue of a dark green is next to nothing.
    """

    def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]

    def colour(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = chroma(a), chroma(b)
        error = (a - b).square().sum(1).add(1e-4).sqrt()
        return (error / (b.square().sum(1).sqrt() + 0.3)).mean()

    edges = sum(F.l1_loss(a, b) for a, b in zip(differences(pred), differences(target), strict=True))
    by_four = F.avg_pool2d(pred, 4), F.avg_pool2d(target, 4)
    by_eight = F.avg_pool2d(by_four[0], 2), F.avg_pool2d(by_four[1], 2)
    pixels = F.l1_loss(pred, target) + 3 * F.mse_loss(pred, target) + 0.5 * edges
    averages = (
        F.l1_loss(*by_eight) + 2 * F.mse_loss(*by_eight) + 2 * F.mse_loss(chroma(by_eight[0]), chroma(by_eight[1]))
    )
    return pixels + averages + 0.3 * colour(pred, target) + 0.3 * colour(*by_four)


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: np.ndarray, degrees: float = 0.0) -> tuple[float, float]:
    """(dB, mean hue error in degrees of the saturated pixels) of pictures with their hues turned by `degrees`.

    The latent is the posterior's mean. dB is the mean over the pictures; the hue's error over all pixels whose
    channels differ by `SATURATED` or more.
    """
    decibels, wrong, count = [], 0.0, 0
    for picture in pictures:
        target = torch.from_numpy(turn_hue(picture, degrees) if degrees else picture.copy()).float() / 255
        x = target.permute(2, 0, 1)[None] * 2 - 1
        decoded = vae.decode(vae.encode(x).latent_dist.mean).sample[0].permute(1, 2, 0).clamp(-1, 1) / 2 + 0.5
        decibels.append(-10 * math.log10((decoded - target).square().mean().item()))
        saturated = (target.amax(-1) - target.amin(-1)) >= SATURATED
        turn = (hue_degrees(decoded) - hue_degrees(target)).abs()[saturated]
        wrong, count = wrong + torch.minimum(turn, 360 - turn).sum().item(), count + len(turn)
    return float(np.mean(decibels)), wrong / max(count, 1)


def main_hue(picture: np.ndarray) -> float | None:
    """The hue in degrees that nine tenths of the coloured pixels of (H, W, 3) are within 20 of; None without one.

    They must be bright, since a dark orange is a brown, and at least a tenth of the picture.
    """
    rgb = torch.from_numpy(picture.copy()).float() / 255
    coloured = rgb[(rgb.amax(-1) - rgb.amin(-1)) >= SATURATED]
    if len(coloured) < 0.1 * picture[..., 0].size or coloured.amax(-1).mean() < 0.75:
        return None
    hues = hue_degrees(coloured).deg2rad()
    middle = torch.atan2(hues.sin().mean(), hues.cos().mean()).rad2deg().item()
    apart = (hues.rad2deg() - middle + 180) % 360 - 180
    return middle if (apart.abs() <= 20).float().mean() >= 0.9 else None


class VaeTraining:
    """The VAE, its average and optimizers; `run` trains them, resuming from a checkpoint in `folder`."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.vae = build_vae()
        matrices = [p for p in self.vae.parameters() if p.ndim == 4 and min(p.flatten(1).shape) >= 16]
        self.course = Course(
            self.vae,
            BatchedMuon(matrices),
            rates=(MUON_RATE, ADAMW_RATE),
            decay=EMA_DECAY,
            file=folder / "state.pt",
        )

    def loss(self, pictures: np.ndarray, share: float) -> tuple[torch.Tensor, float, float]:
        """(loss, KL in nats per number, mean squared error) of this step's batch, `share` of the training done."""
        size, count = next((size, count) for until, size, count in PHASES if share < until)
        x = crops(pictures, np.random.default_rng(self.course.step), count, size)
        posterior = self.vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(self.course.step))
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        squared = F.mse_loss(decoded.detach().clamp(-1, 1), x).item()
        weight = KL_WEIGHT * min(1.0, self.course.step / KL_STEPS)
        return reconstruction_loss(decoded, x) + weight * kl, kl.item(), squared

    def run(self, pictures: np.ndarray, steps: int) -> None:
        """Train up to `steps`: warm-up, constant rates, then linearly to zero."""
        self.vae.train()
        began, start, running = time.monotonic(), self.course.step, 0.0
        while self.course.step < steps:
            factor = min(1.0, (self.course.step + 1) / 100, (1 - self.course.step / steps) / DECAY_SHARE)
            loss, kl, squared = self.loss(pictures, self.course.step / steps)
            self.course.update(loss, factor)
            running = squared if running == 0 else 0.98 * running + 0.02 * squared
            if self.course.step % 25 == 0:
                rate = (self.course.step - start) / (time.monotonic() - began)
                print(
                    f"vae {self.course.step}/{steps}  loss {loss.item():.4f}  kl {kl:.2f}  "
                    f"{10 * math.log10(4 / running):.2f} dB  {rate:.2f} steps/s",
                    flush=True,
                )
            if self.course.step % CHECKPOINT_STEPS == 0 or self.course.step == steps:
                self.course.save()

    def averaged(self) -> AutoencoderKL:
        """The VAE with the averaged weights, in eval mode: this is what is shipped."""
        vae = build_vae()
        vae.load_state_dict(self.course.average)
        return vae.eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: np.ndarray, scaling_factor: float = 0.13025) -> None:
    """Give every latent channel mean 0 and standard deviation 1 / `scaling_factor` over `pictures`, exactly.

    The shift and scale go into the 1x1 convolutions around the latent, which leaves every reconstruction as it
    was: z' = (z - m) / (s f) per channel on the encoder's side, its inverse on the decoder's. The factor is the
    SDXL VAE's, so that a forgotten factor shows here as it would with the real model.
    """
    moments = [encode_moments(vae, to_pixels(pictures[i : i + 8])) for i in range(0, len(pictures), 8)]
    z = torch.cat(moments)[:, 0].transpose(0, 1).flatten(1)
    shift, scale = z.mean(1), z.std(1) * scaling_factor
    count = vae.config.latent_channels
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:count] /= scale.view(-1, 1, 1, 1)
    into.bias[:count] = (into.bias[:count] - shift) / scale
    into.bias[count:] -= 2 * scale.log()  # the other half is the log variance
    out.bias += (out.weight[:, :, 0, 0] * shift).sum(1)
    out.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=scaling_factor)
