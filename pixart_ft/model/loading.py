"""The parts of a `Base` with their weights: each frozen, in eval mode, and every weight accounted for."""

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer

from pixart_ft.config.train import Quantization
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import is_of_adapter
from pixart_ft.model.base import Base
from pixart_ft.model.quantized import quantized_t5
from pixart_ft.model.vae import safe_dtype
from pixart_ft.model.weights import check_keys, quiet, readable, variant
from pixart_ft.runs.manifest import check_whole

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


def load_transformer(base: Base, *, dtype: torch.dtype) -> PixArtTransformer2DModel:
    """The denoiser.

    Weights are float32 or bfloat16; float16 is for autocast. Raises UserError for missing or unknown weights.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"model.dtype: the transformer's weights are float32 or bfloat16, not {dtype}; "
            "for float16 arithmetic use float32 weights under autocast (train.mixed_precision fp16)"
        )
    if base.metadata is not None:
        check_whole(Path(base.place), "model.base", hashed="transformer/*")
    transformer: PixArtTransformer2DModel = _load(PixArtTransformer2DModel, base, "transformer", torch_dtype=dtype)
    return transformer


def skeleton(base: Base) -> PixArtTransformer2DModel:
    """The denoiser's layers without any values (on the meta device): for what their names and shapes decide."""
    with torch.device("meta"), quiet(base.place), readable(base.place, "transformer"):
        transformer: PixArtTransformer2DModel = PixArtTransformer2DModel.from_config(_own(base.transformer))
    return transformer


def vae_skeleton(base: Base) -> AutoencoderKL:
    """Those of the autoencoder."""
    with torch.device("meta"), quiet(base.place), readable(base.place, "vae"):
        vae: AutoencoderKL = AutoencoderKL.from_config(_own(base.vae))
    return vae


def text_encoder_skeleton(base: Base) -> T5EncoderModel:
    """Those of the T5 encoder, which the base must have."""
    assert base.text_encoder is not None
    with torch.device("meta"), quiet(base.place), readable(base.place, "text_encoder"):
        return T5EncoderModel(T5Config.from_dict(_own(base.text_encoder)))


def load_vae(base: Base, *, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder.

    One whose config says `force_upcast` overflows in float16 (as the SDXL VAE does): it is loaded in float32
    with a warning.
    """
    safe = safe_dtype(base.vae, dtype)
    if safe != dtype:
        warnings.warn("this VAE overflows in float16 (force_upcast): loaded in float32", stacklevel=2)
    vae: AutoencoderKL = _load(AutoencoderKL, base.whole, "vae", torch_dtype=safe)
    return vae


def decoder_only(vae: AutoencoderKL) -> AutoencoderKL:
    """Free the encoder's half of `vae`, in place: for runs that only turn samples into pictures."""
    del vae.encoder, vae.quant_conv
    return vae


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """What cuts captions into tokens."""
    words = Path(base.place) / "tokenizer"
    if Path(base.place).is_dir() and not any((words / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(f"model.base: {words} holds neither tokenizer.json nor spiece.model; copy the model again")
    with quiet(base.place), readable(base.place, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = T5Tokenizer.from_pretrained(
            base.place, subfolder="tokenizer", revision=base.commit or "main"
        )
    return tokenizer


def load_text_encoder(
    base: Base, *, dtype: torch.dtype, quantization: Quantization = "none", device: torch.device | str = "cpu"
) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    """The tokenizer and the T5 encoder, on `device`, its linear layers in 4 or 8 bits where `quantization` says so.

    Load in the dtype you want and never cast afterwards: in float16 only `from_pretrained` keeps the layers
    that overflow (`wo`) in float32, and a T5 that was cast gives finite, wrong embeddings.
    """
    base = base.whole
    if base.text_encoder is None:
        raise UserError(
            f"model.base: {base.place} comes without a text encoder, and there are texts to encode; give a whole "
            "diffusers PixArt-Sigma, whose model_index.json names its text_encoder"
        )
    tokenizer = load_tokenizer(base)
    with readable(base.place, "text_encoder"):
        config = T5Config.from_dict(_own(base.text_encoder))
    how = {"dtype": dtype, "config": config} | quantized_t5(quantization, dtype=dtype, device=device)
    encoder: T5EncoderModel = _load(T5EncoderModel, base, "text_encoder", **how)
    overflowing = [weight for name, weight in encoder.named_parameters() if ".wo." in name]
    assert dtype != torch.float16 or all(weight.dtype == torch.float32 for weight in overflowing)
    return tokenizer, encoder if quantization != "none" else encoder.to(device)


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for a library, which may write into it: what a `Base` says of itself stays as it was read."""
    return copy.deepcopy(dict(config))


def _load(kind: Any, base: Base, part: str, **how: Any) -> Any:
    """A part of `base` as `kind` loads it, with its own arguments in `how`."""
    with quiet(base.place), readable(base.place, part):
        model, report = kind.from_pretrained(
            base.place,
            subfolder=part,
            revision=base.commit or "main",
            variant=variant(base.place, part),
            output_loading_info=True,
            **how,
        )
    unexpected = set(report["unexpected_keys"]) - _HARMLESS_KEYS
    if kind is T5EncoderModel:  # a whole T5 has a decoder too
        unexpected = set()
    check_keys(base.place, part, report["missing_keys"], unexpected)
    return model.requires_grad_(False).eval()


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
        if is_of_adapter(name):
            continue
        few = few_values(parameter).to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + few.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def few_values(parameter: Tensor) -> Tensor:
    """Some sixteen of its values, evenly spread: they tell whether it is another, or was changed."""
    values = parameter.detach().flatten()
    return values[:: max(1, values.numel() // 16)].clone()
