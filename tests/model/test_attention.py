"""The attention kernels and the text mask.

Oracles: SDPA in float64, diffusers' own processor, and values at masked positions, which must not matter.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pixart_ft.model import attention
from pixart_ft.model.attention import (
    MAX_PLAIN_TOKENS,
    check_text,
    plain_attention,
    plain_is_faster,
    use_plain_attention,
)


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (5, 11), (1, 1)])
def test_plain_attention_equals_sdpa_in_value_and_gradient(queries: int, keys: int, masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, queries, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    key = torch.randn(3, 4, keys, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    value = torch.randn(3, 4, keys, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 1, keys, generator=draw, dtype=torch.float64) * 3 if masked else None
    ours = plain_attention(query, key, value, bias)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_processor_equals_diffusers(tiny: Path, monkeypatch: pytest.MonkeyPatch, count: int, plain: bool) -> None:
    monkeypatch.setattr(attention, "plain_is_faster", lambda query, key: plain)
    stock, ours = load(tiny), load(tiny)
    use_plain_attention(ours)
    inputs = batch(count)
    torch.testing.assert_close(ours(**inputs).sample, stock(**inputs).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_values_at_masked_positions_do_not_matter(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, count: int, plain: bool
) -> None:
    monkeypatch.setattr(attention, "plain_is_faster", lambda query, key: plain)
    transformer = load(tiny)
    use_plain_attention(transformer)
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
        return plain_attention(query, key, value, bias)

    monkeypatch.setattr(attention, "plain_attention", note)
    stock, ours = load(tiny), load(tiny)
    use_plain_attention(ours)
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
