"""Makes the demo's feature extractor, `pixart_ft/demo/extractor/`: a small ResNet that knows emoji and their damage.

    python scripts/build_extractor.py --work ~/demo-build --state ~/demo-build/extractor.pt

`--work` is that of `scripts/build_demo.py`. From 40 features it learns to tell the thing, its group, its style (six),
the colours of each quarter, and how much a picture was blurred, noised, mottled and turned in hue: nothing of these is
hidden from it by augmentation. No picture of `pixart_ft/demo/pictures/` is shown to it. A quarter of an hour of one
core; goes on from the state's file. What ships had its first 475 steps by a plan for 1,800.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from build_demo import SIZE, SYMBOLS, THINGS
from demo_pictures import STYLES, fetch, fine_tuning_split, fluent_emoji, rendered, styled_emoji
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss, normalize
from transformers import ResNetConfig, ResNetModel

SIDE = 128  # what the network sees; a blur of one pixel of 256 must not vanish before it
FEATURES = 40  # few, so that a Frechet distance of 60 pictures is a number
BATCH, STEPS, RATE = 96, 1000, 3e-3
PROCESSOR = {  # any picture to SIDE pixels by averaging areas (Pillow's BOX), values in [-1, 1]
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 4,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# of a picture in [-1, 1] of SIDE pixels: least and largest strength, drawn evenly in their logarithm
NOISE, BLUR, MOTTLE = (0.004, 0.3), (0.15, 4.0), (0.01, 0.3)  # standard deviation, pixels, standard deviation
MOTTLE_WIDTH = (1.0, 6.0)  # pixels
KINDS = ("noise", "blur", "mottle", "hue")
SPOILED = 0.18  # of the pictures, for each kind by itself
UNITS = 6.0  # how far the worst damage of a kind moves the features; the things' own spread is a few of these


def build_network() -> ResNetModel:
    """Untrained. The mean over a rectified map sees texture, which a transformer's patches hardly do."""
    return ResNetModel(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 96, FEATURES],
            depths=[1, 1, 2, 1],
            layer_type="basic",
            hidden_act="relu",
        )
    )


class Readers(nn.Module):
    """What is read off the features by vectors of length 1: so the features must move far for what is to be seen."""

    def __init__(self, widths: dict[str, int]):
        super().__init__()
        self.widths = widths
        self.rows = nn.Parameter(torch.randn(sum(widths.values()), FEATURES))
        self.bias = nn.Parameter(torch.zeros(sum(widths.values())))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        read = features @ normalize(self.rows, dim=1).T + self.bias
        return dict(zip(self.widths, read.split(list(self.widths.values()), dim=1), strict=True))


def seen(work: Path) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pictures (N, SIDE, SIDE, 3) uint8 of all but the demo's fine-tuning set; of each its thing, group and style."""
    places = fetch(work / "npm")
    glossy = fluent_emoji(places)
    hidden = {emoji.code for part in fine_tuning_split(glossy) for emoji in part}
    pictures, shown = [], []
    for style in (*STYLES, "fluent"):
        emojis = glossy if style == "fluent" else styled_emoji(places, style, (*THINGS, SYMBOLS))
        rows = [i for i, e in enumerate(emojis) if e.group != SYMBOLS and (style != "fluent" or e.code not in hidden)]
        artwork = rendered(emojis, SIZE, work / f"{style}.npy")
        for start in range(0, len(rows), 256):
            part = torch.from_numpy(artwork[rows[start : start + 256]]).permute(0, 3, 1, 2).float()
            pictures.append(avg_pool2d(part, SIZE // SIDE).round().byte().permute(0, 2, 3, 1).numpy())
        shown += [(emojis[i].name, emojis[i].group, style) for i in rows]
    kinds = {}
    for kind, values in zip(("thing", "group", "style"), zip(*shown, strict=True), strict=True):
        numbers = {value: i for i, value in enumerate(sorted(set(values)))}
        kinds[kind] = torch.tensor([numbers[value] for value in values])
    return np.concatenate(pictures), kinds


def blurred(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Pictures (N, 3, H, W), each under a Gaussian of its `sigma` (N,) pixels, going round the borders."""
    height, width = pictures.shape[-2:]
    squares = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2
    bell = torch.exp(-2 * math.pi**2 * sigma[:, None, None, None] ** 2 * squares)
    return torch.fft.irfft2(torch.fft.rfft2(pictures) * bell, s=(height, width))


def hue_turned(pictures: Tensor, angle: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] with colours turned around the grey axis by `angle` (N,) radians."""
    third, cos, sin = 1 / 3, angle.cos()[:, None, None], angle.sin()[:, None, None]
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = cos * torch.eye(3) + sin * cross + (1 - cos) * third
    return torch.einsum("nij,njhw->nihw", turn, pictures).clamp(-1, 1)


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil some of the pictures (N, 3, H, W) in place; how strong each damage is, (N, 4) in the order of KINDS.

    In [0, 1], and steep near 0, so that little damage is told from none.
    """
    strength = torch.zeros(len(pictures), len(KINDS))
    hit = torch.rand(strength.shape, generator=generator) < SPOILED

    def drawn(kind: int, limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Which pictures, and how much, (n,); notes the strength."""
        rows = hit[:, kind].nonzero()[:, 0]
        least, most = limits
        much = least * (most / least) ** torch.rand(len(rows), generator=generator)
        strength[rows, kind] = torch.log1p(10 * much / most) / math.log(11)
        return rows, much

    rows = hit[:, 3].nonzero()[:, 0]
    turned = hue_turned(pictures[rows], 2 * math.pi * torch.rand(len(rows), generator=generator))
    strength[rows, 3] = (2 * (turned - pictures[rows]).abs().mean((1, 2, 3))).clamp(max=1)  # greys have no hue
    pictures[rows] = turned
    rows, sigma = drawn(1, BLUR)
    pictures[rows] = blurred(pictures[rows], sigma)
    rows, std = drawn(2, MOTTLE)
    low, high = MOTTLE_WIDTH
    spots = torch.randn(pictures[rows].shape, generator=generator)
    spots = blurred(spots, low + (high - low) * torch.rand(len(rows), generator=generator))
    pictures[rows] += std[:, None, None, None] * spots / spots.std((1, 2, 3), keepdim=True)
    rows, std = drawn(0, NOISE)
    pictures[rows] += std[:, None, None, None] * torch.randn(pictures[rows].shape, generator=generator)
    pictures.clamp_(-1, 1)
    return strength


def loss_of(read: dict[str, Tensor], pictures: Tensor, strength: Tensor, kinds: dict[str, Tensor]) -> dict[str, Tensor]:
    """The errors of what is read; their sum is what is trained."""
    errors = {kind: cross_entropy(read[kind], right, label_smoothing=0.1) for kind, right in kinds.items()}
    errors["damage"] = mse_loss(read["damage"], UNITS * strength)
    errors["colours"] = mse_loss(read["colours"], 3 * avg_pool2d(pictures, SIDE // 2).flatten(1))
    return errors


def train(work: Path, steps: int, file: Path) -> ResNetModel:
    """The trained network; what is reached is kept in `file` now and then, and gone on from."""
    artwork, kinds = seen(work)
    counts = {kind: int(numbers.max()) + 1 for kind, numbers in kinds.items()}
    print(f"{len(artwork)} pictures; {counts}", flush=True)
    torch.manual_seed(0)
    network = build_network().train().to(memory_format=torch.channels_last)  # a third faster
    readers = Readers(counts | {"damage": len(KINDS), "colours": 12})
    weights = [*network.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    state = {"network": network, "readers": readers, "optimizer": optimizer}
    first = 0
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        first = saved["step"]
        for name, each in state.items():
            each.load_state_dict(saved[name])
    began, means = time.perf_counter(), dict[str, float]()
    for step in range(first, steps):
        g = torch.Generator().manual_seed(step)
        rows = torch.randint(len(artwork), (BATCH,), generator=g)
        pictures = torch.from_numpy(artwork[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        down, right = torch.randint(-6, 7, (2,), generator=g).tolist()
        pictures = pictures.roll((down, right), (2, 3))  # the borders are white, mostly
        pictures[::2] = pictures[::2].flip(3)
        strength = spoil(pictures, g)
        features = network(pixel_values=pictures.contiguous(memory_format=torch.channels_last)).pooler_output.flatten(1)
        errors = loss_of(readers(features), pictures, strength, {kind: of[rows] for kind, of in kinds.items()})
        rate = RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        torch.stack([*errors.values()]).sum().backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()
        means = {k: 0.95 * means.get(k, e.item()) + 0.05 * e.item() for k, e in errors.items()}
        if (step + 1) % 25 == 0 or step == steps - 1:
            words = "  ".join(f"{k} {mean:.3f}" for k, mean in means.items())
            print(f"{step + 1}/{steps}  {words}  {time.perf_counter() - began:.0f} s", flush=True)
            torch.save({"step": step + 1} | {name: each.state_dict() for name, each in state.items()}, file)
    return network.eval()


def write(network: ResNetModel, out: Path) -> None:
    """The folder that `AutoModel` and `AutoImageProcessor` open; float16, which halves it."""
    shutil.rmtree(out, ignore_errors=True)
    network.half().save_pretrained(str(out))
    (out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the work folder of build_demo.py")
    parser.add_argument("--state", type=Path, required=True, help="file for what is reached")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("pixart_ft/demo/extractor"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    write(train(args.work, args.steps, args.state), args.out)


if __name__ == "__main__":
    main()
