"""What a network runs on here: whether that can be had, and which kernels of attention are the fastest.

Each kernel is timed once, on tensors of the network's own shapes.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.config.train import Attention
from pixart_ft.errors import Mistakes
from pixart_ft.model.attention import KERNELS, MAX_PLAIN_TOKENS, Kernel, Kernels, xformers_fault
from pixart_ft.model.repeated import compile_fault

_TIE = 1.05  # times the least: what is no slower than that is taken if it comes earlier
_RUNS = 3


def check_engine(
    attention: Attention, compiled: bool, device: torch.device, dtype: torch.dtype, section: str = ""
) -> None:
    """Raise UserError for kernels that do not run there, or where nothing can be compiled; tries both.

    section   of the keys, with its dot
    """
    mistakes = Mistakes()
    if attention == "xformers" and (fault := xformers_fault(device, dtype)):
        mistakes.add(f"{section}attention xformers cannot run on {device} here ({fault}); use sdpa, or auto")
    if compiled and (fault := compile_fault(device)):
        mistakes.add(
            f"{section}compile: nothing can be compiled for {device} here ({fault}); install a C++ compiler (the "
            "package g++) and Python's headers (python3-dev), or leave it false"
        )
    mistakes.raise_if_any()


@dataclass(frozen=True)
class Calls:
    """The calls that a choice is for.

    rows, image, text   pictures at once, image tokens of each, tokens of its text
    backward            whether gradients are made too
    """

    rows: int
    image: int
    text: int
    dtype: torch.dtype
    device: torch.device
    backward: bool


def fastest_kernels(transformer: PixArtTransformer2DModel, calls: Calls) -> tuple[Kernels, str]:
    """The fastest kernels for these calls of a network, and what was found, in a line."""
    config = transformer.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        values = torch.randn(calls.rows, count, heads, width, generator=draw).to(calls.device, calls.dtype)
        return values.transpose(1, 2).requires_grad_(calls.backward)

    bias = torch.zeros(calls.rows, 1, 1, calls.text, device=calls.device, dtype=calls.dtype)
    query = tokens(calls.image)
    image = _timed(_candidates(calls, calls.image), query, tokens(calls.image), None)
    text = _timed(_candidates(calls, calls.text), query, tokens(calls.text), bias)
    chosen = Kernels(_first(image), _first(text))
    passes = "forward and backward" if calls.backward else "forward"
    return chosen, (
        f"{chosen.image} among image tokens ({_shown(image)}), {chosen.text} to the text ({_shown(text)}); {passes} of "
        f"{calls.rows} x {calls.image} tokens, {calls.text} of text"
    )


def where(device: torch.device) -> str:
    """The kind of device that a choice holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _candidates(calls: Calls, keys: int) -> dict[str, Kernel]:
    """Those that run there, without the memory of all probabilities where these are many."""
    found = ["sdpa"]
    if calls.image * keys <= MAX_PLAIN_TOKENS**2:
        found.append("plain")
    if calls.device.type == "cpu":
        found.append("headwise")
    if xformers_fault(calls.device, calls.dtype) is None:
        found.append("xformers")
    return {name: KERNELS[name] for name in found}


def _timed(kernels: Mapping[str, Kernel], query: Tensor, key: Tensor, bias: Tensor | None) -> dict[str, float]:
    """Seconds of each, the least of a few runs after one to warm up."""
    synchronize = getattr(torch, query.device.type).synchronize
    found = {}
    for name, kernel in kernels.items():
        seconds = []
        for _ in range(1 + _RUNS):
            synchronize()
            began = time.perf_counter()
            attended = kernel(query, key, key, bias)
            if query.requires_grad:
                torch.autograd.grad(attended.sum(), (query, key))
            synchronize()
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds[1:])
    return found


def _first(seconds: Mapping[str, float]) -> str:
    return next(name for name, value in seconds.items() if value <= _TIE * min(seconds.values()))


def _shown(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
