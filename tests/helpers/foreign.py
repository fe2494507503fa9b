"""What ComfyUI and kohya's scripts do with an adapter's file, by hand: weights with its updates. Shared."""

from collections.abc import Mapping

import torch
from torch import Tensor


def comfy_merged(weights: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the authors' layout with a `diffusion_model.` LoRA of their layers."""
    return _merged(weights, file, {f"diffusion_model.{name.removesuffix('.weight')}": name for name in weights})


def kohya_merged(weights: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of diffusers' layout with a `lora_transformer_` LoRA, LoKr or LoHa."""
    names = {f"lora_transformer_{name.removesuffix('.weight').replace('.', '_')}": name for name in weights}
    return _merged(weights, file, names)


def _merged(weights: Mapping[str, Tensor], file: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor of the file must be used. The scale of an update is alpha over the rank of its first factor."""
    found, used = dict(weights), set()
    for layer, name in names.items():
        own = {key[len(layer) + 1 :]: value for key, value in file.items() if key.startswith(f"{layer}.")}
        if not own or not name.endswith(".weight"):
            continue
        used |= {f"{layer}.{part}" for part in own}
        weight = found[name]
        whole = weight + _change(own).reshape(weight.shape)
        if "dora_scale" in own:
            assert own["dora_scale"].shape[0] == len(weight)  # of rows, which the newer ComfyUI tells by the shape
            whole = whole / whole.flatten(1).norm(dim=1, keepdim=True) * own["dora_scale"]
        found[name] = whole
    assert used == file.keys(), file.keys() - used
    return found


def _change(own: Mapping[str, Tensor]) -> Tensor:
    if "lora_down.weight" in own:
        down, up = own["lora_down.weight"].flatten(1), own["lora_up.weight"].flatten(1)
        return own["alpha"] / len(down) * (up @ down)
    if "hada_w1_a" in own:
        one, other = own["hada_w1_a"] @ own["hada_w1_b"], own["hada_w2_a"] @ own["hada_w2_b"]
        return own["alpha"] / len(own["hada_w1_b"]) * one * other
    one = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    other = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    ranks = [len(own[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in own]
    return (own["alpha"] / ranks[0] if ranks else 1.0) * torch.kron(one, other)
