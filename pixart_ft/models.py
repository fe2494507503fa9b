"""Load the parts of a PixArt-Sigma from a diffusers folder, the embedded demo or the Hub; each comes frozen.

What is no PixArt-Sigma, or would load silently wrong, is refused by its configurations, before any weight.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer

from pixart_ft.diffusion.names import PredictionType
from pixart_ft.diffusion.schedules import DIFFUSERS_KEYS, NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.model_faults import index_faults, transformer_faults, type_faults
from pixart_ft.scheduler_config import process_of
from pixart_ft.vae import LatentScale, latent_scale_faults, safe_dtype
from pixart_ft.weights import check_keys, quiet, readable, variant

VarianceState = Literal["trained", "stale", "none"]

_PARTS = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
# Buffers that older checkpoints hold and this class recomputes.
_HARMLESS_KEYS = {"pos_embed.pos_embed"}
# What changes a network's function without changing a weight or its shape.
_FUNCTIONAL_KEYS = (
    "sample_size",
    "patch_size",
    "interpolation_scale",
    "num_attention_heads",
    "num_heads",
    "num_layers",
    "scaling_factor",
    "shift_factor",
    "norm_num_groups",
)


def load_transformer(base: str, *, dtype: torch.dtype, revision: str | None = None) -> PixArtTransformer2DModel:
    """The denoiser, frozen and in eval mode, with every weight accounted for.

    `base` is what `resolve_base` returned. Weights are float32 or bfloat16; float16 is for autocast. Raises
    UserError for another kind of model, PixArt-alpha, parts that do not fit, missing or unknown weights.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"model.dtype: the transformer's weights are float32 or bfloat16, not {dtype}; "
            "for float16 arithmetic use float32 weights under autocast (train.mixed_precision fp16)"
        )
    check_base(base, revision=revision)
    with quiet(base), readable(base, "transformer"):
        transformer, report = PixArtTransformer2DModel.from_pretrained(
            base,
            subfolder="transformer",
            revision=revision,
            variant=variant(base, "transformer"),
            torch_dtype=dtype,
            output_loading_info=True,
        )
    check_keys(base, "transformer", report["missing_keys"], set(report["unexpected_keys"]) - _HARMLESS_KEYS)
    return transformer.requires_grad_(False).eval()


def skeleton(base: str, *, revision: str | None = None) -> PixArtTransformer2DModel:
    """The denoiser's layers without any values (on the meta device): for what only their names decide."""
    with torch.device("meta"), quiet(base), readable(base, "transformer"):
        transformer: PixArtTransformer2DModel = PixArtTransformer2DModel.from_config(
            _read_config(base, "transformer", revision)
        )
    return transformer


def load_vae(base: str, *, dtype: torch.dtype, revision: str | None = None) -> AutoencoderKL:
    """The autoencoder, frozen and in eval mode.

    One whose config says `force_upcast` overflows in float16 (as the SDXL VAE does): it is loaded in float32
    with a warning.
    """
    safe = safe_dtype(_read_config(base, "vae", revision), dtype)
    if safe != dtype:
        warnings.warn("this VAE overflows in float16 (force_upcast): loaded in float32", stacklevel=2)
    with quiet(base), readable(base, "vae"):
        vae, report = AutoencoderKL.from_pretrained(
            base,
            subfolder="vae",
            revision=revision,
            variant=variant(base, "vae"),
            torch_dtype=safe,
            output_loading_info=True,
        )
    check_keys(base, "vae", report["missing_keys"], report["unexpected_keys"])
    return vae.requires_grad_(False).eval()


def decoder_only(vae: AutoencoderKL) -> AutoencoderKL:
    """Free the encoder's half of `vae`, in place: for runs that only turn samples into pictures."""
    del vae.encoder, vae.quant_conv
    return vae


def load_text_encoder(
    base: str, *, dtype: torch.dtype, revision: str | None = None
) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    """The tokenizer and the T5 encoder, frozen and in eval mode.

    Load in the dtype you want and never cast afterwards: in float16 only `from_pretrained` keeps the layers
    that overflow (`wo`) in float32, and a T5 that was cast gives finite, wrong embeddings.
    """
    _read_config(base, "text_encoder", revision)
    words = Path(base) / "tokenizer"
    if Path(base).is_dir() and not any((words / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(f"model.base: {words} holds neither tokenizer.json nor spiece.model; copy the model again")
    with quiet(base), readable(base, "tokenizer"):
        tokenizer = T5Tokenizer.from_pretrained(base, subfolder="tokenizer", revision=revision or "main")
    with quiet(base), readable(base, "text_encoder"):
        loaded: Any = T5EncoderModel.from_pretrained(
            base,
            subfolder="text_encoder",
            revision=revision or "main",
            variant=variant(base, "text_encoder"),
            dtype=dtype,
            output_loading_info=True,
        )
    encoder, report = loaded
    check_keys(base, "text_encoder", report["missing_keys"], ())
    overflowing = [weight for name, weight in encoder.named_parameters() if ".wo." in name]
    assert dtype != torch.float16 or all(weight.dtype == torch.float32 for weight in overflowing)
    return tokenizer, encoder.requires_grad_(False).eval()


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent, along each side."""
    return _vae_factor(vae.config)


def load_schedule(base: str, *, revision: str | None = None) -> tuple[NoiseSchedule, PredictionType]:
    """The noise schedule the base was trained with and what it predicts, from its scheduler_config.json."""
    process = _process(base, revision)
    prediction_type = process["prediction_type"]
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{base}/{_PARTS['scheduler']}: unknown prediction_type {prediction_type!r}; a PixArt-Sigma predicts "
            "epsilon, v_prediction or sample"
        )
    try:
        return NoiseSchedule.from_diffusers_config(process), prediction_type
    except ValueError as error:
        raise UserError(f"{base}/{_PARTS['scheduler']}: {error}") from error


def schedule_config(base: str, *, revision: str | None = None) -> dict[str, Any]:
    """What defines the base's noise schedule in its scheduler_config.json, for an adapter's metadata."""
    process = _process(base, revision)
    return {key: process[key] for key in DIFFUSERS_KEYS if key in process}


def _process(base: str, revision: str | None) -> dict[str, Any]:
    """What the base's scheduler_config.json says of its process."""
    config = _read_config(base, "scheduler", revision)
    try:
        if config.get("network_timesteps") is not None:
            raise ValueError(
                "it tells the network other timesteps than its own indices (network_timesteps): a way to sample from a "
                "base, not a base; use the folder that it was made from"
            )
        return process_of(config)
    except ValueError as error:
        raise UserError(f"{base}/{_PARTS['scheduler']}: {error}") from error


def native_size(base: str, *, revision: str | None = None) -> int:
    """The side in pixels of the pictures that the base was trained on."""
    size: int = _read_config(base, "transformer", revision).get("sample_size", 128)
    return size * _vae_factor(_read_config(base, "vae", revision))


def size_unit(base: str, *, revision: str | None = None) -> int:
    """What a picture's height and width must be multiples of: patch size times VAE factor."""
    patch: int = _read_config(base, "transformer", revision).get("patch_size", 2)
    return patch * _vae_factor(_read_config(base, "vae", revision))


def latent_scale(base: str, *, revision: str | None = None) -> LatentScale:
    """How the transformer's latents follow from the VAE's; `check_base` refuses a base that does not say."""
    return LatentScale.of(_read_config(base, "vae", revision))


def check_base(base: str, *, revision: str | None = None) -> None:
    """Raise UserError, naming every fault, unless the configurations of `base` make up a PixArt-Sigma.

    Reads no weights, so it is quick and may come before everything else.
    """
    if revision is not None and Path(base).is_dir():
        raise UserError(
            f"model.revision {revision!r} chooses among the versions of a Hub model, and {base} is a folder; remove it"
        )
    index = _read_json(base, "model_index.json", revision)
    faults = index_faults(index.get("_class_name"))
    if not faults:
        config = _read_config(base, "transformer", revision)
        faults += transformer_faults(config)
        channels = config.get("in_channels", 4)
        vae = _read_config(base, "vae", revision)
        faults += latent_scale_faults(vae)
        latent = vae.get("latent_channels", 4)
        if channels != latent:
            faults.append(f"the transformer takes {channels} latent channels and the VAE makes {latent}")
        width, text = config.get("caption_channels"), _text_width(base, index, revision)
        if text is not None and width != text:
            faults.append(f"the transformer takes text of width {width} and the text encoder gives {text}")
    if faults:
        raise UserError("\n  - ".join([f"model.base: {base} cannot be used:", *faults]))


def fingerprint(module: nn.Module) -> str:
    """16 hex digits of SHA-256 over config and a few values of every parameter: tells one base from another.

    The same in float32 and bfloat16, with and without an unmerged adapter, and across library versions:
    values are rounded to bfloat16, adapter weights left out, and of the config only what changes the function
    counts.
    """
    config: Mapping[str, Any] = getattr(module, "config", {})
    config = config if isinstance(config, Mapping) else config.to_dict()
    settings = {key: str(config.get(key)) for key in _FUNCTIONAL_KEYS}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, parameter in sorted((n.replace(".base_layer.", "."), p) for n, p in module.named_parameters()):
        if ".lora_" in name:
            continue
        values = parameter.detach().flatten()
        few = values[:: max(1, values.numel() // 16)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + few.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def variance_of(transformer: PixArtTransformer2DModel) -> VarianceState:
    """The state of a stock base's learned variance: "trained" with a variance half, "none" without.

    A stock 8-channel base without metadata counts as trained; an adapter's metadata may say "stale" instead.
    """
    config = transformer.config
    return "trained" if config["out_channels"] == 2 * config["in_channels"] else "none"


def has_variance(base: str, *, revision: str | None = None) -> bool:
    """Whether the base's transformer has variance channels, from its config.json alone."""
    config = _read_config(base, "transformer", revision)
    channels: int = config.get("in_channels", 4)
    return config.get("out_channels", 8) == 2 * channels


def _vae_factor(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _text_width(base: str, index: Mapping[str, Any], revision: str | None) -> int | None:
    """The width of the base's text encoder, or None if the folder comes without one (its index says null)."""
    library_and_class = index.get("text_encoder")
    if library_and_class is None or library_and_class == [None, None]:
        return None
    width: int | None = _read_config(base, "text_encoder", revision).get("d_model")
    return width


def _read_config(base: str, part: str, revision: str | None) -> dict[str, Any]:
    config = _read_json(base, _PARTS[part], revision)
    if faults := type_faults(part, config):
        raise UserError(f"model.base: {base}/{_PARTS[part]}: {'; '.join(faults)}; copy or download the model again")
    return config


def _read_json(base: str, name: str, revision: str | None) -> dict[str, Any]:
    path = Path(base) / name
    if not Path(base).is_dir():
        with readable(base, name):
            path = Path(hf_hub_download(base, name, revision=revision))
    elif not path.is_file():
        held = ", ".join(sorted(entry.name for entry in Path(base).iterdir())) or "nothing"
        raise UserError(f"model.base: {path} is missing (the folder holds {held}); give a whole diffusers PixArt-Sigma")
    return read_object(path, "model.base", "copy or download the model again")
