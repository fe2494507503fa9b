"""Predicted memory. Oracles: the loaded weights, closed forms of an optimizer, torch's own hooks on saved tensors, and
the whole network where short ones were asked.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixart_ft.config.train import Quantization, load_config
from pixart_ft.diffusion.intervals import WHOLE
from pixart_ft.model import loading
from pixart_ft.model.attention import use_kernels
from pixart_ft.model.base import Base
from pixart_ft.model.network import network_output
from pixart_ft.training import memory
from pixart_ft.training.memory import Case

TOKENS, ROWS = 12, 3


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return Base.read(tiny)


def case(base: Base, changes: dict[str, Any] | None = None, *, on_gpu: bool = False, blocks: int = 2) -> Case:
    keys = {"train.mixed_precision": "no", "train.batch_size": ROWS, "validation.prompts": ["cat"]}
    config = load_config({"data": {"folder": "demo"}}, keys | (changes or {}))
    long = replace(base, transformer={**base.transformer, "num_layers": blocks})
    return Case.of(config, long, tokens=TOKENS, on_gpu=on_gpu)


def size(module: torch.nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


KINDS: list[dict[str, Any]] = [
    {},
    {"adapter.init": "pissa", "adapter.targets": "all-linear"},
    {"adapter.kind": "full", "diffusion.objective": "simple"},
]


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "pissa", "full"])
def test_what_is_kept_is_what_the_loaded_network_has(base: Base, kind: dict[str, Any]) -> None:
    """The network with what is trained, one gradient, two moments, one average."""
    asked = case(base, kind)
    network = loading.load_transformer(base, dtype=torch.float32)
    asked.kind.prepare(network, seed=0, interval=WHOLE, device=torch.device("cpu"))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    parts = memory.training(asked).parts
    assert parts["weights"] == pytest.approx(size(network), rel=1e-3)  # numbers of rows, which two layers share
    assert parts["gradients"] == parts["average"] == 4 * trained
    assert parts["optimizer"] == pytest.approx(8 * trained, rel=1e-3)  # and a step counter for each matrix


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "pissa", "full"])
def test_what_a_run_leaves_on_the_disk(base: Base, kind: dict[str, Any]) -> None:
    """Of 500 steps: two checkpoints and one being written; results at every grid, of full the newest two, the lowest,
    the last averaged and raw."""
    trained = memory.training(case(base, kind)).parts["gradients"] / 4
    whole = sum(p.numel() for p in loading.skeleton(base).parameters())
    for every in (0, 100):
        asked = case(base, kind | {"train.steps": 500, "validation.samples_every": every})
        assert asked.counts() == (trained, whole)
        parts = memory.on_disk(asked).parts
        assert parts["checkpoints"] == pytest.approx(3 * (4 + 8 + 4) * trained, rel=1e-3)
        if kind.get("adapter.kind") == "full":
            assert parts["models"] == 4 * whole * ((2 if every else 0) + 1 + 2)
        else:
            assert parts["adapters"] == 4 * trained * ((5 if every else 0) + 1 + 2)


def test_a_lora_of_as_many_weights_stands_for_another_adapter(base: Base) -> None:
    asked = {"adapter.kind": "peft", "adapter.peft_type": "LOHA", "adapter.options": {"r": 4}}
    found = memory.training(case(base, asked)).parts["gradients"]
    assert found == 4 * 16 * (2 * 4 * (64 + 64))  # of 16 layers, two pairs of matrices of rank 4


def test_blocks_of_few_bits_take_less(base: Base) -> None:
    """Of two blocks: eight matrices 64 x 64, two 64 x 256, from 4 bytes to 4 bits and a scale for each 64."""
    whole, short = (memory.training(case(base, {"model.quantization": how})).parts for how in ("none", "nf4"))
    assert whole["weights"] - short["weights"] == 2 * (8 * 64 * 64 + 2 * 64 * 256) * (4 - 0.5 - 4 / 64)


def test_what_is_kept_is_what_the_loaded_parts_have(base: Base) -> None:
    """T5 in bfloat16, the VAE in float32."""
    _, t5 = loading.load_text_encoder(base, dtype=torch.bfloat16)
    found = memory.captions(case(base, {"model.text_encoder_dtype": "bfloat16"}))
    assert found is not None and found.parts["weights"] == size(t5)
    assert memory.pictures(case(base)).parts["weights"] == size(loading.load_vae(base, dtype=torch.float32))
    assert "average" not in {name for name, n in memory.training(case(base, {"train.ema_decay": 0})).parts.items() if n}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(("how", "scales"), [("int8", 0), ("nf4", 4 / 64)])  # bytes beside each weight
def test_t5_of_few_bits_takes_what_it_has_when_loaded(base: Base, how: Quantization, scales: float) -> None:
    """In each of its two blocks four matrices 32 x 32 and two 32 x 64; `wo` stays."""
    _, t5 = loading.load_text_encoder(base, dtype=torch.bfloat16, quantization=how)
    asked = {"model.text_encoder_dtype": "bfloat16", "model.text_encoder_quantization": how}
    found = memory.captions(case(base, asked))
    assert found is not None
    assert found.parts["weights"] == size(t5) + scales * 2 * (4 * 32 * 32 + 2 * 32 * 64)


def saved_for_backward(base: Base, asked: Case) -> int:
    """Bytes of the storages that a real forward pass keeps beside the weights."""
    network = loading.load_transformer(base, dtype=torch.float32)
    asked.kind.prepare(network, seed=0, interval=WHOLE, device=torch.device("cpu"))
    use_kernels(network)
    network.train()
    known = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in known:
            kept[place] = x
        return x

    x, embeds = torch.zeros(ROWS, 4, 8, 8), torch.zeros(ROWS, TOKENS, 32)
    t, mask = torch.ones(ROWS, dtype=torch.int64), torch.ones(ROWS, TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network_output(network, x, t, embeds, mask).square().mean()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_activations_are_what_autograd_keeps_and_little_more(base: Base) -> None:
    """At the peak some gradients are there already."""
    asked = case(base)
    kept, parts = saved_for_backward(base, asked), memory.training(asked).parts
    assert kept < parts["activations"] + parts["gradients"] < 1.25 * kept


@pytest.mark.parametrize(
    ("blocks", "changes"),
    [
        (5, {}),
        pytest.param(6, {"model.gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(9, {"model.gradient_checkpointing": 2}, marks=pytest.mark.slow),
        pytest.param(5, {"train.accumulation": 2, "adapter.targets": "all-linear"}, marks=pytest.mark.slow),
    ],
)
def test_a_long_network_is_told_of_by_two_short_ones(blocks: int, changes: dict[str, Any], base: Base) -> None:
    asked = case(base, changes, blocks=blocks)
    told, whole = memory._extrapolated(asked, memory._training_peaks), memory._training_peaks(asked, blocks)
    assert told == whole


def test_what_saves_memory_is_predicted_to(base: Base) -> None:
    def peak(changes: dict[str, Any], *, on_gpu: bool = False) -> int:
        return memory.training(case(base, changes, on_gpu=on_gpu)).parts["activations"]

    half = {"train.mixed_precision": "bf16"}
    whole, short = peak({}), peak(half)
    assert peak({"model.gradient_checkpointing": True}) < 0.7 * whole
    assert peak({"train.batch_size": 1}) < 0.4 * whole
    assert short < 0.8 * whole
    assert short < peak(half, on_gpu=True) < whole  # norms of layers


def test_a_step_that_needs_room_of_its_own_is_seen(base: Base) -> None:
    """bfloat16 weights: gradients of two bytes, float32 moments; a part of the weights is float32 for a moment."""
    parts = memory.training(case(base, {"train.mixed_precision": "bf16", "optim.stochastic_rounding": True})).parts
    assert parts["optimizer"] == pytest.approx(4 * parts["gradients"], rel=1e-3)
    assert parts["average"] == 2 * parts["gradients"]


def test_sample_grids_hold_the_training_the_decoder_and_a_second_set_of_weights(base: Base) -> None:
    asked = case(base)
    train, drawn = memory.training(asked).parts, memory.samples(asked).parts
    assert drawn["average"] == 2 * train["average"] and drawn["optimizer"] == train["optimizer"]
    decoder = loading.decoder_only(loading.load_vae(base, dtype=torch.float32))
    assert drawn["VAE"] == size(decoder)
