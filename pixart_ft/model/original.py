"""The names of the authors' own PixArt code, of its .pth files and of ComfyUI, and the layers of diffusers they mean.

Three of diffusers' layers, to_q, to_k and to_v, are the rows of one there, and two are where the text is attended to.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NULL_EMBEDDING, POSITIONS = "y_embedder.y_embedding", "pos_embed"
_OUTER = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_TABLE = "scale_shift_table"
# What wrappers of a network (several processes, FSDP, checkpointing, compiling) put into its names, and before them.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_HELD_IN = re.compile(r"^(?:(?:base_model|model|diffusion_model)\.)+")


def bare(key: str) -> str:
    """A name without what wrappers put into it."""
    return _HELD_IN.sub("", _WRAPPED.sub("", key))


def depth_of(keys: Mapping[str, object], blocks: str) -> int:
    """How many blocks there are in names that begin with `blocks` and a number."""
    numbers = [int(found[1]) for key in keys if (found := re.match(rf"{blocks}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def layers(depth: int) -> dict[str, tuple[str, ...]]:
    """Each layer of the original network, and those of diffusers' that are its rows, from the top."""
    return _OUTER | {
        f"blocks.{index}.{theirs}": tuple(f"transformer_blocks.{index}.{layer}" for layer in ours)
        for index in range(depth)
        for theirs, ours in _IN_BLOCK.items()
    }


def _tables(depth: int) -> dict[str, str]:
    blocks = {f"blocks.{index}.{_TABLE}": f"transformer_blocks.{index}.{_TABLE}" for index in range(depth)}
    return {f"final_layer.{_TABLE}": _TABLE, **blocks}


def to_diffusers(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the original network by diffusers' names, and those that have none. Rows of a layer are copies.

    A layer that is absent, or has no such rows, is left to whoever checks the names and shapes.
    """
    depth, rest = depth_of(weights, "blocks"), dict(weights)
    found: dict[str, Tensor] = {}
    for theirs, ours in layers(depth).items():
        for part in ("weight", "bias"):
            if (value := rest.pop(f"{theirs}.{part}", None)) is not None:
                rows = [value] if len(ours) == 1 else [rows.clone() for rows in value.chunk(len(ours))]
                found |= {f"{name}.{part}": own for name, own in zip(ours, rows, strict=False)}
    for theirs, name in _tables(depth).items():
        if theirs in rest:
            found[name] = rest.pop(theirs)
    return found, rest


def to_original(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The way back: by the original names, and the weights that have none."""
    depth, rest = depth_of(weights, "transformer_blocks"), dict(weights)
    found: dict[str, Tensor] = {}
    for theirs, ours in layers(depth).items():
        for part in ("weight", "bias"):
            names = [f"{name}.{part}" for name in ours]
            if all(name in rest for name in names):
                rows = [rest.pop(name) for name in names]
                found[f"{theirs}.{part}"] = torch.cat(rows) if len(rows) > 1 else rows[0]
    for theirs, name in _tables(depth).items():
        if name in rest:
            found[theirs] = rest.pop(name)
    return found, rest
