"""The weights of the blocks in 4 or 8 bits, by bitsandbytes: a frozen base where memory is short (QLoRA).

Only a LoRA is trained on them: they have no gradients, and nothing is ever merged into them.
"""

import importlib
import importlib.util
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from pixart_ft.config.train import Quantization
from pixart_ft.errors import UserError
from pixart_ft.model.adapter_switch import is_of_adapter


def check_quantization(how: Quantization) -> None:
    """Raise UserError unless the package that it needs is here."""
    if how != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f'model.quantization {how} needs bitsandbytes: pip install "pixart_ft[quantized]", or leave it at none'
        )


def quantize(
    transformer: PixArtTransformer2DModel, how: Quantization, *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Put the linear layers of the blocks, most of the network, into 4 (nf4) or 8 bits (int8), in place, on `device`.

    dtype: what they compute in. diffusers' own way refuses processors, where the layers themselves work.
    """
    if how == "none" or torch.device(device).type == "meta":  # where there are no values to round
        return
    check_quantization(how)
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


def bytes_saved(transformer: nn.Module, how: Quantization, dtype: torch.dtype) -> int:
    """How much less the blocks' linear weights take than in `dtype`."""
    if how == "none":
        return 0
    held = 1 if how == "int8" else 0.5 + 4 / 64  # and a float32 scale for each 64 of them
    own = [m for n, m in transformer.named_modules() if n.startswith("transformer_blocks.") and not is_of_adapter(n)]
    count = sum(layer.weight.numel() for layer in own if isinstance(layer, nn.Linear))
    return round(count * (dtype.itemsize - held))


def is_quantized(transformer: nn.Module) -> bool:
    """Whether its blocks have weights of 4 or 8 bits."""
    return bool(getattr(transformer, "is_loaded_in_4bit", False) or getattr(transformer, "is_loaded_in_8bit", False))


def float_weight(layer: nn.Module) -> Tensor:
    """A layer's weight in float32, whatever it is held in."""
    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach().float()
