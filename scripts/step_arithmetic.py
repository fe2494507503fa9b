"""The arithmetic of a training step: the least that a recipe allows, what torch counts, what this machine can do."""

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixart_ft.config.train import TrainConfig
from pixart_ft.training.encode import compute_dtype

BUSY = "BENCH_PROCESSOR_TIME"  # set for the subjects too, by the option of this name
CLOCK = time.process_time if BUSY in os.environ else time.perf_counter


def least_flops(network: Mapping[str, Any], *, rows: int, side: int, text: int, rank: int | None) -> int:
    """The floating point operations of a step that a LoRA of `rank` on the attentions, or all weights (None), needs.

    Of `rows` pictures whose latents have this side, with `text` tokens each: matrix products alone, each that has a
    gradient once forward, once for its input where that wants a gradient, once for its weights where they are trained.
    The backward pass of attention makes its probabilities again, since none are kept.
    """
    width = network["num_attention_heads"] * network["attention_head_dim"]
    patch, blocks, out = network["patch_size"] ** 2, network["num_layers"], network["out_channels"]
    image = side**2 // network["patch_size"] ** 2
    full = rank is None
    attention = 4 * blocks * width * image * (image + text)  # two products forward, five backward
    found = attention + attention * 5 // 2

    def layer(inputs: int, outputs: int, tokens: int, *, count: int = 1, adapted: bool = False, through: int) -> int:
        """Of `count` layers; of `through` of them the input has a gradient."""
        whole = 2 * inputs * outputs * tokens
        adapter = 2 * (rank or 0) * (inputs + outputs) * tokens * adapted
        # an adapter's inner gradient is made of its outputs' whether or not its input has one
        inner = 2 * (rank or 0) * outputs * tokens * adapted
        passes = count + through + count * full
        return whole * passes + adapter * 2 * count + inner * count + (adapter - inner) * through

    hidden = [
        layer(width, width, image, count=3 * blocks, adapted=True, through=3 * (blocks - 1 + full)),  # to_q, k, v
        layer(width, width, image, count=3 * blocks, adapted=True, through=3 * blocks),  # to_out, to_q, to_out
        layer(width, width, text, count=2 * blocks, adapted=True, through=2 * blocks * full),  # the text's to_k, to_v
        layer(width, 4 * width, image, count=2 * blocks, through=2 * blocks),
        layer(patch * network["in_channels"], width, image, through=0),
        layer(network["caption_channels"], width, text, through=0),
        layer(width, width, text, through=int(full)),
        layer(256, width, 1, through=0),
        layer(width, 7 * width, 1, through=int(full)),  # the rest of the time's
        layer(width, patch * out, image, through=1),
    ]
    return rows * (found + sum(hidden))


def counter() -> FlopCounterMode:
    """torch's own, which knows its CPU kernel of attention too."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def matrix_peak(config: TrainConfig, network: Mapping[str, Any], side: int, device: torch.device) -> float:
    """Floating point operations a second of the network's largest layer here, the best of a few."""
    width = network["num_attention_heads"] * network["attention_head_dim"]
    rows = config.train.batch_size * side**2 // network["patch_size"] ** 2
    one = torch.ones(rows, width, device=device, dtype=compute_dtype(config))
    other = torch.ones(width, 4 * width, device=device, dtype=compute_dtype(config))
    seconds = []
    for _ in range(4):
        synchronize(device)
        began = CLOCK()
        one @ other
        synchronize(device)
        seconds.append(CLOCK() - began)
    return 2 * one.numel() * 4 * width / min(seconds)


def synchronize(device: torch.device) -> None:
    getattr(torch, device.type).synchronize()
