"""The attention kernels and the text mask.

Oracles: SDPA in float64, diffusers' own processor, and values at masked positions, which must not matter.
"""

import itertools
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.config.train import Attention
from pixart_ft.errors import UserError
from pixart_ft.model import attention, engine
from pixart_ft.model.attention import (
    KERNELS,
    MAX_PLAIN_TOKENS,
    Kernels,
    check_text,
    plain,
    plain_is_faster,
    use_kernels,
    xformers_fault,
)
from pixart_ft.model.engine import Calls, check_engine, fastest_kernels


def load(tiny: Path) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(str(tiny), subfolder="transformer").requires_grad_(True)


def batch(count: int, tokens: int = 9) -> dict[str, Tensor]:
    """Inputs of the tiny transformer; captions of 1, 2, 3, ... real tokens in one padded batch."""
    draw = torch.Generator().manual_seed(count)
    lengths = torch.arange(count) % (tokens - 1) + 1
    return {
        "hidden_states": torch.randn(count, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(count, tokens, 32, generator=draw),
        "timestep": torch.randint(0, 1000, (count,), generator=draw),
        "encoder_attention_mask": (torch.arange(tokens)[None] < lengths[:, None]).to(torch.int64),
    }


def strict_operator(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    """Attention by the contract of xformers' CUTLASS operator, which refuses what that refuses.

    query (N,Q,H,E), key and value (N,L,H,E), all of one type, with E in multiples of 8; the bias, of that type too, of
    the whole shape (N,H,Q,L), its length and the distances of its rows in multiples of 8.
    """
    count, queries, heads, width = query.shape
    assert key.shape == value.shape == (count, key.shape[1], heads, width) and width % 8 == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    scores = torch.einsum("nqhe,nlhe->nhql", query, key) * width**-0.5
    if attn_bias is not None:
        assert attn_bias.shape == (count, heads, queries, key.shape[1]) and attn_bias.dtype == query.dtype
        assert not attn_bias.requires_grad and attn_bias.stride(-1) == 1
        assert attn_bias.shape[-1] % 8 == 0 and all(step % 8 == 0 for step in attn_bias.stride()[:-1])
        scores = scores + attn_bias
    return torch.einsum("nhql,nlhe->nqhe", scores.softmax(-1), value)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package xformers whose operator runs everywhere, by the same contract."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = strict_operator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (5, 11), (1, 1)])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "sdpa"])
def test_each_kernel_equals_sdpa_in_value_and_gradient(
    kernel: str, queries: int, keys: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, queries, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    key = torch.randn(3, 4, keys, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    value = torch.randn(3, 4, keys, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 1, keys, generator=draw, dtype=torch.float64) * 3 if masked else None
    ours = KERNELS[kernel](query, key, value, bias)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_each_kernel_takes_half_precision(kernel: str) -> None:
    draw = torch.Generator().manual_seed(0)
    half = [torch.randn(2, 2, 7, 8, generator=draw).bfloat16().requires_grad_() for _ in range(3)]
    bias = torch.zeros(2, 1, 1, 7).bfloat16()
    attended = KERNELS[kernel](half[0], half[1], half[2], bias)
    query, key, value = (x.double() for x in half)
    exact = F.scaled_dot_product_attention(query, key, value)
    assert attended.dtype == torch.bfloat16
    # scores of at most 8 in size, rounded to 2**-9 of themselves, move a weight, and so a mean of values, that much
    torch.testing.assert_close(attended.double(), exact, rtol=0, atol=8 * 2**-9 * 4)
    gradients = torch.autograd.grad(attended.sum(), half)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_xformers_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # as if it were not installed
    fault = xformers_fault(torch.device("cpu"), torch.float32)
    assert fault is not None and "pip install xformers" in fault
    with pytest.raises(UserError, match=r"model\.attention xformers cannot run on cpu.*use sdpa, or auto"):
        check_engine("xformers", False, torch.device("cpu"), torch.float32, "model.")


@pytest.mark.usefixtures("stand_in")
def test_xformers_runs_where_its_operator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xformers_fault(torch.device("cpu"), torch.bfloat16) is None
    check_engine("xformers", False, torch.device("cpu"), torch.bfloat16)

    def nowhere(*_: Tensor, attn_bias: Tensor) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n query")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", nowhere)
    fault = xformers_fault(torch.device("cpu"), torch.bfloat16)
    assert fault == "No operator found for `memory_efficient_attention_forward` with inputs:"


def test_what_may_be_asked_for_is_what_there_is() -> None:
    assert {*KERNELS, "auto"} == set(get_args(Attention))


def calls(backward: bool, tokens: int = 16) -> Calls:
    return Calls(rows=2, image=tokens, text=5, dtype=torch.float32, device=torch.device("cpu"), backward=backward)


@pytest.mark.parametrize("backward", [False, True])
def test_the_slow_kernel_is_not_chosen(tiny: Path, monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    passes = []

    def slow(*given: Tensor | None) -> Tensor:
        time.sleep(0.05)
        query, key, value, bias = given
        assert query is not None and key is not None and value is not None
        passes.append((query.requires_grad, tuple(query.shape), tuple(key.shape), bias is not None))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    monkeypatch.setattr(engine, "KERNELS", {**KERNELS, "sdpa": slow})
    kernels, line = fastest_kernels(load(tiny), calls(backward))
    assert "sdpa" not in (kernels.image, kernels.text)
    assert {kernels.image, kernels.text} <= KERNELS.keys() and line.startswith(f"{kernels.image} among image tokens (")
    # of the network's own heads and width, and of the calls it is asked for
    image, text = (2, 4, 16, 16), (2, 4, 5, 16)
    assert set(passes) == {(backward, image, image, False), (backward, image, text, True)}


def test_of_equal_kernels_torchs_own_is_chosen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(clock))
    assert fastest_kernels(load(tiny), calls(True))[0] == Kernels("sdpa", "sdpa")


def test_many_probabilities_are_never_kept(tiny: Path) -> None:
    """The memory of `plain` grows with their number, which a time of one attention does not tell."""
    line = fastest_kernels(load(tiny), calls(True, MAX_PLAIN_TOKENS + 1))[1]
    among_images, to_text = line.split(" to the text ")
    assert "plain" not in among_images.rpartition("), ")[0] and "plain" in to_text


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "by_shape"])
def test_a_network_gives_the_same_by_every_kernel(tiny: Path, kernel: str) -> None:
    stock, ours = load(tiny), load(tiny)
    use_kernels(ours, Kernels(kernel, kernel))
    assert {processor.kernel for processor in ours.attn_processors.values()} == {KERNELS[kernel]}
    inputs = batch(3)
    torch.testing.assert_close(ours(**inputs).sample, stock(**inputs).sample, rtol=1e-5, atol=1e-5)


def test_image_and_text_have_kernels_of_their_own(tiny: Path) -> None:
    transformer = load(tiny)
    use_kernels(transformer, Kernels(image="headwise", text="plain"))
    for name, processor in transformer.attn_processors.items():
        assert processor.kernel is KERNELS["plain" if ".attn2." in name else "headwise"]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_processor_equals_diffusers(tiny: Path, monkeypatch: pytest.MonkeyPatch, count: int, plain: bool) -> None:
    monkeypatch.setattr(attention, "plain_is_faster", lambda query, key: plain)
    stock, ours = load(tiny), load(tiny)
    use_kernels(ours)
    inputs = batch(count)
    torch.testing.assert_close(ours(**inputs).sample, stock(**inputs).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_values_at_masked_positions_do_not_matter(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, count: int, plain: bool
) -> None:
    monkeypatch.setattr(attention, "plain_is_faster", lambda query, key: plain)
    transformer = load(tiny)
    use_kernels(transformer)
    inputs = batch(count)
    text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    silent, spoken = mask[..., None] == 0, mask[..., None] == 1
    with torch.no_grad():
        before = transformer(**inputs).sample
        after = transformer(**inputs | {"encoder_hidden_states": text.masked_fill(silent, 999.0)}).sample
        heard = transformer(**inputs | {"encoder_hidden_states": text.masked_fill(spoken, 999.0)}).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    # Else the network would be deaf, and the line above would prove nothing.
    assert (heard - before).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_bfloat16_autocast_training_uses_the_plain_kernel(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = []

    def note(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        kernels.append(query.dtype)
        return plain(query, key, value, bias)

    monkeypatch.setattr(attention, "plain", note)
    stock, ours = load(tiny), load(tiny)
    use_kernels(ours)
    inputs = batch(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, output = stock(**inputs).sample, ours(**inputs).sample
    assert kernels == [torch.bfloat16] * 4  # two blocks of self- and cross-attention
    torch.testing.assert_close(output.float(), expected.float(), rtol=0, atol=0.05)


def test_kernel_choice() -> None:
    def heads(tokens: int, dtype: torch.dtype, needs_grad: bool) -> Tensor:
        return torch.zeros(1, 1, tokens, 4, dtype=dtype, requires_grad=needs_grad)

    short = heads(64, torch.bfloat16, True)
    assert plain_is_faster(short, short)
    assert not plain_is_faster(short, heads(MAX_PLAIN_TOKENS + 1, torch.bfloat16, True))
    assert not plain_is_faster(*[heads(64, torch.bfloat16, False)] * 2)
    assert not plain_is_faster(*[heads(64, torch.float32, True)] * 2)
    with torch.no_grad():
        assert not plain_is_faster(short, short)


def test_check_text_accepts_only_two_dimensions() -> None:
    embeds, mask = torch.zeros(2, 5, 8), torch.ones(2, 5)
    check_text(embeds, mask)
    with pytest.raises(ValueError, match=r"must be 2-D \(N, L\), got \(2, 1, 5\)"):
        check_text(embeds, mask[:, None])
    with pytest.raises(ValueError, match=r"does not fit .*: mask \(2, 4\), embeddings \(2, 5, 8\)"):
        check_text(embeds, mask[:, :4])
    with pytest.raises(ValueError, match="does not fit"):
        check_text(embeds[0], mask)
