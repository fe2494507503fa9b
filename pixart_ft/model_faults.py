"""What in a model's configurations tells that it is no PixArt-Sigma, or would load silently wrong."""

from collections.abc import Mapping
from typing import Any


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
