"""Weights of the blocks in 4 or 8 bits, by bitsandbytes, where memory is short: a frozen base's (QLoRA), and T5's.

Only a LoRA is trained on them: they have no gradients, and nothing is ever merged into them.
"""

import importlib
import importlib.util
import logging
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from pixart_ft.config.train import Quantization
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import is_of_adapter


def check_quantization(key: str, how: Quantization) -> None:
    """Raise UserError unless the package that it needs is here; `key` is where it was asked for."""
    if how != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'{key} {how} needs bitsandbytes: pip install "pixart_ft[quantized]", or leave it at none')


def quantize(
    transformer: PixArtTransformer2DModel, how: Quantization, *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Put the linear layers of the blocks, most of the network, into 4 (nf4) or 8 bits (int8), in place, on `device`.

    dtype: what they compute in. diffusers' own way refuses processors, where the layers themselves work.
    """
    if how == "none" or torch.device(device).type == "meta":  # where there are no values to round
        return
    check_quantization("model.quantization", how)
    _hush()
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    blocks = transformer.transformer_blocks
    for name, layer in [(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear)]:
        sizes = {"input_features": layer.in_features, "output_features": layer.out_features}
        if how == "nf4":
            short = bnb.Linear4bit(**sizes, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4")
            short.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=short)
        else:
            short = bnb.Linear8bitLt(**sizes, bias=layer.bias is not None, has_fp16_weights=False)
            short.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        short.bias = layer.bias
        blocks.set_submodule(name, short.to(device))
    transformer.is_loaded_in_4bit, transformer.is_loaded_in_8bit = how == "nf4", how == "int8"  # peft asks for these


def quantized_t5(how: Quantization, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What transformers is told to put the linear layers of T5 into few bits, each as it is read, on `device`.

    It leaves `wo` as it is, whose inputs are too large for that.
    """
    if how == "none":
        return {}
    check_quantization("text_encoder_quantization", how)
    _hush()
    short = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if how == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": short, "device_map": {"": str(device)}}


def _hush() -> None:
    """Layers of 8 bits compute in float16, and would say so at every call."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def bytes_saved(model: nn.Module, how: Quantization, dtype: torch.dtype) -> int:
    """How much less the linear weights of the network's blocks, or of T5's but for `wo`, take than in `dtype`."""
    if how == "none":
        return 0
    held = 1 if how == "int8" else 0.5 + 4 / 64  # and a float32 scale for each 64 of them
    own = [m for n, m in model.named_modules() if _is_of_a_block(n) and not n.endswith(".wo") and not is_of_adapter(n)]
    count = sum(layer.weight.numel() for layer in own if isinstance(layer, nn.Linear))
    return round(count * (dtype.itemsize - held))


def _is_of_a_block(name: str) -> bool:
    return name.startswith(("transformer_blocks.", "encoder.block."))


def is_quantized(transformer: nn.Module) -> bool:
    """Whether its blocks have weights of 4 or 8 bits."""
    return bool(getattr(transformer, "is_loaded_in_4bit", False) or getattr(transformer, "is_loaded_in_8bit", False))


def float_weight(layer: nn.Module) -> Tensor:
    """A layer's weight in float32, whatever it is held in."""
    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach().float()
