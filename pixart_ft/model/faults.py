"""What in a model's configurations tells that it is no PixArt-Sigma, or would load silently wrong."""

import math
from collections.abc import Mapping
from typing import Any

LARGEST_NUMBER = 2**17  # of anything that a model counts; a damaged file must not ask for all memory there is
_COUNTS = {
    "transformer": (
        *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads"),
        *("attention_head_dim", "cross_attention_dim", "caption_channels"),
    ),
    "vae": ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "sample_size"),
    "text_encoder": ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"),
    "scheduler": ("num_train_timesteps",),
}
_NULLABLE = ("out_channels", "caption_channels", "cross_attention_dim", "interpolation_scale", "num_train_timesteps")
_NUMBERS = {"transformer": ("interpolation_scale",), "scheduler": ("beta_start", "beta_end")}


def type_faults(part: str, config: Mapping[str, Any]) -> list[str]:
    """Which keys of a part's configuration are of a type, or a size, that no model has."""
    faults = [
        f"{key} is {_shown(value)}, expected an integer from 1 to {LARGEST_NUMBER}"
        for key in _COUNTS[part]
        if not _is_count(value := config.get(key, 1)) and not (value is None and key in _NULLABLE)
    ]
    faults += [
        f"{key} is {_shown(value)}, expected a number"
        for key in _NUMBERS.get(part, ())
        if (value := config.get(key)) is not None
        and not (type(value) in (int, float) and math.isfinite(value) and 0 < value < LARGEST_NUMBER)
    ]
    blocks = config.get("block_out_channels")
    if part == "vae" and not (isinstance(blocks, list) and 0 < len(blocks) < 12 and all(map(_is_count, blocks))):
        faults.append(f"block_out_channels is {_shown(blocks)}, expected a list of integers")
    return faults


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_NUMBER


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def index_faults(class_name: object) -> list[str]:
    """What is wrong with the pipeline class in model_index.json."""
    if class_name == "PixArtAlphaPipeline":
        return ["it is PixArt-alpha (another VAE, 120 text tokens); this toolkit is for PixArt-Sigma"]
    if class_name not in ("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"):
        return [f"its model_index.json says {class_name}, not PixArtSigmaPipeline"]
    return []


def transformer_faults(config: Mapping[str, Any]) -> list[str]:
    """What in a transformer's config.json PixArt-Sigma cannot have, or diffusers would take wrongly."""
    class_name = config.get("_class_name")
    # Checkpoints older than the PixArt class say Transformer2DModel, and diffusers maps that one.
    if class_name not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        return [f"its transformer is a {class_name}, not a PixArtTransformer2DModel"]
    faults = []
    size, patch = config.get("sample_size", 128), config.get("patch_size", 2)
    conditions, scale = config.get("use_additional_conditions"), config.get("interpolation_scale")
    if conditions or (conditions is None and size == 128):  # diffusers takes None at 128 for True
        faults.append(
            "use_additional_conditions is true, which is PixArt-alpha's embedding of the picture size; if "
            "this is a PixArt-Sigma with an incomplete transformer/config.json, add "
            '"use_additional_conditions": false to it'
        )
    used = max(size // 64, 1) if scale is None else scale  # diffusers' default for None
    if used != size / 64 and (scale is None or size in (32, 64, 128, 256)):
        faults.append(
            f"interpolation_scale is {scale} (used as {used}), but a PixArt-Sigma of sample_size {size} has "
            f'{size / 64:g}: write "interpolation_scale": {size / 64:g} into transformer/config.json'
        )
    if size % patch:
        faults.append(f"sample_size {size} is no multiple of patch_size {patch}")
    channels, output = config.get("in_channels", 4), config.get("out_channels", 8)
    if output not in (None, channels, 2 * channels):
        faults.append(f"out_channels {output} is neither in_channels ({channels}) nor twice that (learned variance)")
    return faults


def fit_faults(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any] | None
) -> list[str]:
    """What keeps the parts of a base, by their configurations, from working together."""
    faults = []
    channels, latent = transformer.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        faults.append(f"the transformer takes {channels} latent channels and the VAE makes {latent}")
    width, text = transformer.get("caption_channels"), (text_encoder or {}).get("d_model")
    if text is not None and width != text:
        faults.append(f"the transformer takes text of width {width} and the text encoder gives {text}")
    return faults
