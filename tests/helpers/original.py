"""A PixArt-Sigma in the authors' own layout: its weights by their names, and its forward pass by hand. Shared."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def original_weights(
    *, depth: int = 2, width: int = 64, text: int = 32, size: int = 8, scale: float = 0.125, tokens: int = 300
) -> Weights:
    """Random ones, so large that every input counts; `size` is that of the latents, patches are 2 x 2."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, text),
        "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (2 * 2 * 8, width),
    }
    for block in range(depth):
        shapes |= {
            f"blocks.{block}.attn.qkv": (3 * width, width),
            f"blocks.{block}.attn.proj": (width, width),
            f"blocks.{block}.cross_attn.q_linear": (width, width),
            f"blocks.{block}.cross_attn.kv_linear": (2 * width, width),
            f"blocks.{block}.cross_attn.proj": (width, width),
            f"blocks.{block}.mlp.fc1": (4 * width, width),
            f"blocks.{block}.mlp.fc2": (width, 4 * width),
        }
    draw = torch.Generator().manual_seed(5)
    weights: Weights = {}
    for name, shape in shapes.items():
        inputs = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=draw) / inputs**0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)
    for name, rows in {"final_layer": 2, **{f"blocks.{block}": 6 for block in range(depth)}}.items():
        weights[f"{name}.scale_shift_table"] = torch.randn(rows, width, generator=draw) / width**0.5
    weights["y_embedder.y_embedding"] = torch.randn(tokens, text, generator=draw)
    weights["pos_embed"] = positions(width, size // 2, scale)[None]
    return weights


def positions(width: int, side: int, scale: float) -> Tensor:
    """The table (side * side, width): sines, then cosines, of the column in the first half, of the row in the other."""
    waves = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) / scale] * 2, indexing="ij")
    angles = [place.reshape(-1, 1) * waves for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def forward(w: Weights, x: Tensor, timestep: Tensor, text: Tensor, lengths: list[int], *, heads: int) -> Tensor:
    """The network's output (N, 8, H, W) for latents (N, 4, H, W) and texts (N, L, D) of these many tokens.

    x is of the size that the table of positions is for.
    """

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (value.unflatten(-1, (heads, -1)).transpose(0, 1) for value in (q, k, v))  # (heads, tokens, D)
        share = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return (share @ v).transpose(0, 1).flatten(1)

    number, _, height, wide = x.shape
    depth = max(int(name.split(".")[1]) for name in w if name.startswith("blocks.")) + 1
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    six = linear("t_block.1", F.silu(t)).unflatten(1, (6, -1))
    y = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
    for block in (f"blocks.{index}" for index in range(depth)):
        shift, scale, gate, shift2, scale2, gate2 = (w[f"{block}.scale_shift_table"] + six)[:, :, None].unbind(1)
        qkv = linear(f"{block}.attn.qkv", norm(h) * (1 + scale) + shift)
        own = torch.stack([attended(*one.chunk(3, dim=-1)) for one in qkv])
        h = h + gate * linear(f"{block}.attn.proj", own)
        q, kv = linear(f"{block}.cross_attn.q_linear", h), linear(f"{block}.cross_attn.kv_linear", y)
        of_text = [attended(q[n], *kv[n, : lengths[n]].chunk(2, dim=-1)) for n in range(number)]
        h = h + linear(f"{block}.cross_attn.proj", torch.stack(of_text))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * linear(f"{block}.mlp.fc2", inner)
    shift, scale = (w["final_layer.scale_shift_table"] + t[:, None])[:, :, None].unbind(1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    patches = out.unflatten(2, (2, 2, -1)).unflatten(1, (height // 2, wide // 2))  # N, rows, columns, 2, 2, C
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(number, -1, height, wide)
