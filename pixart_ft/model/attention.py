"""The kernels of attention, which of them a network uses, and the one check of text masks.

Shapes: N batch, H heads, Q queries, L keys (text or image tokens), E head width, D = H * E. A kernel gives
softmax(query key^T / sqrt(E) + bias) value, (N,H,Q,E), of `query` (N,H,Q,E), `key` and `value` (N,H,L,E) and a `bias`
that broadcasts to (N,H,1,L), or None. All give the same result to rounding.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Longest sequence for which `plain` beat SDPA on a CPU in bfloat16, forward plus backward: 4 to 6
# times faster at 64 tokens, 1.2 to 1.7 times at 256, 1.6 times at 576, slower at 1024. In float32 SDPA won at
# every length, and without a backward pass at nearly every one.
MAX_PLAIN_TOKENS = 576
BLOCK = 1024  # queries that `headwise` takes at once: their scores of one head stay in the cache
_ALIGNMENT = 8  # numbers; xformers wants the length of a bias, and the distance of its rows, in multiples of it


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's own choice of kernel."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Three matrix operations, which keep all probabilities for the backward pass.

    SDPA's CPU backward is very slow on short bfloat16 sequences.
    """
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    q = query.reshape(batch * heads, num_queries, width)
    k = key.reshape(batch * heads, num_keys, width).transpose(1, 2)
    v = value.reshape(batch * heads, num_keys, width)
    scale = width**-0.5
    if bias is None:
        scores = torch.bmm(q * scale, k)
    else:
        row = bias.expand(batch, heads, 1, num_keys).reshape(batch * heads, 1, num_keys)
        scores = torch.baddbmm(row, q, k, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, num_queries, width)


@torch.compiler.disable  # a compiler would unroll the loop over heads
def headwise(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix products of one head and `BLOCK` queries at a time, whose probabilities the backward pass makes again.

    The memory of SDPA, with the processor's own matrix instructions in the backward pass too.
    """
    found: Tensor = _Headwise.apply(query, key, value, bias)
    return found


class _Headwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, num_queries, width = query.shape
        out = query.new_empty(batch, num_queries, heads, width).transpose(1, 2)  # as the output layer reads it
        norm = query.new_empty(query.shape[:3], dtype=_wide(query))  # log of the sum of exp(scores)
        for n, h, part in _parts(query):
            scores = _scores(query, key, bias, n, h, part)
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            out[n, h, part] = torch.mm(weights.to(value.dtype), value[n, h]) / total
            norm[n, h, part] = (highest + total.log()).squeeze(-1)
        ctx.save_for_backward(query, key, value, bias, out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, norm = ctx.saved_tensors
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        through = (grad.to(_wide(grad)) * out).sum(-1)  # what the gradient of a row of scores is relative to
        scale = query.shape[-1] ** -0.5
        for n, h, part in _parts(query):
            g = grad[n, h, part]
            weights = _scores(query, key, bias, n, h, part).sub_(norm[n, h, part, None]).exp_()
            grads[2][n, h] += torch.mm(weights.to(g.dtype).T, g)
            slope = (
                torch.mm(g, value[n, h].T).to(_wide(query)).sub_(through[n, h, part, None]).mul_(weights).mul_(scale)
            )
            slope = slope.to(query.dtype)
            grads[0][n, h, part] = torch.mm(slope, key[n, h])
            grads[1][n, h] += torch.mm(slope.T, query[n, h, part])
        return *grads, None


def _parts(query: Tensor) -> list[tuple[int, int, slice]]:
    """(row, head, queries) of each block."""
    batch, heads, num_queries, _ = query.shape
    starts = range(0, num_queries, BLOCK)
    return [(n, h, slice(start, start + BLOCK)) for n in range(batch) for h in range(heads) for start in starts]


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, n: int, h: int, part: slice) -> Tensor:
    """(queries, L), in float32 at least."""
    scores = torch.mm(query[n, h, part] * query.shape[-1] ** -0.5, key[n, h].T).to(_wide(query))
    return scores if bias is None else scores.add_(bias.expand(*query.shape[:2], 1, key.shape[2])[n, h])


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def xformers(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """xformers' `memory_efficient_attention`, on the GPUs that it has a kernel for.

    It takes (N,L,H,E), and a bias only of the whole shape (N,H,Q,L) with L and all distances in multiples of 8: keys of
    another length are padded with some that no query sees.
    """
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if bias is not None:
        (batch, num_queries, heads, _), missing = query.shape, -key.shape[1] % _ALIGNMENT
        bias = F.pad(bias.expand(batch, 1, 1, key.shape[1]), (0, missing), value=-math.inf)
        bias = bias.expand(batch, heads, num_queries, key.shape[1] + missing)
        key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (key, value))
    attended: Tensor = attend(query, key, value, attn_bias=bias)
    return attended.transpose(1, 2)


def xformers_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps `xformers` from running there, by a tiny attention forward and backward; None: nothing."""
    query, key = (torch.ones(1, 2, length, 72, device=device, dtype=dtype, requires_grad=True) for length in (4, 5))
    try:
        attended = xformers(query, key, key, torch.zeros(1, 1, 1, 5, device=device, dtype=dtype))
        attended.sum().backward()
    except ImportError:
        return "the package xformers is not installed, or not for this torch: pip install xformers, on a CUDA machine"
    except Exception as error:  # it raises almost anything where it has no kernel
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def by_shape(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`plain` where it is known to be the faster one, else `sdpa`: the same on every machine of a kind."""
    return (plain if plain_is_faster(query, key) else sdpa)(query, key, value, bias)


def plain_is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether `plain` is the faster kernel for this call (see `MAX_PLAIN_TOKENS`)."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float32
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
        and max(query.shape[2], key.shape[2]) <= MAX_PLAIN_TOKENS
    )


# What a network may be told to use.
KERNELS: Mapping[str, Kernel] = {kernel.__name__: kernel for kernel in (by_shape, sdpa, plain, headwise, xformers)}


@dataclass(frozen=True)
class Kernels:
    """Names of the kernels of a network: among its image tokens, and from them to the text."""

    image: str = "by_shape"
    text: str = "by_shape"


class KernelAttention:
    """diffusers attention processor for PixArt's self- and cross-attention, by one of the kernels above.

    PixArt's attention has neither query/key norms nor group norms nor an inner residual, so none is applied.
    """

    def __init__(self, kernel: Kernel = by_shape) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` (N,Q,D) to `encoder_hidden_states` (N,L,D), itself if None.

        `attention_mask` is the additive bias (N,1,L) the transformer makes of a 2-D mask. Returns (N,Q,D).
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _heads(attn, attn.to_q(hidden_states))
        key, value = self.keys_and_values(attn, context)
        bias = None if attention_mask is None else attention_mask[:, None].to(dtype=query.dtype)
        project, dropout = attn.to_out
        return dropout(project(self.kernel(query, key, value, bias).transpose(1, 2).flatten(2)))

    def keys_and_values(self, attn: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        """Both (N,H,L,E) of what is attended to, (N,L,D)."""
        return _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    """(N,L,D) -> (N,H,L,E)."""
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def use_kernels(transformer: PixArtTransformer2DModel, kernels: Kernels = Kernels()) -> None:
    """Let every attention of `transformer` use these."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            assert module.norm_q is None and module.group_norm is None and not module.residual_connection
    image, text = (KernelAttention(KERNELS[name]) for name in (kernels.image, kernels.text))
    transformer.set_attn_processor({name: text if ".attn2." in name else image for name in transformer.attn_processors})


def check_text(embeds: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless `mask` is (N,L) for `embeds` (N,L,D).

    The transformer turns only a 2-D mask into a bias; a 0/1 mask of any other rank would be added to the
    scores as it is, which masks nothing and raises nothing.
    """
    if mask.ndim != 2:
        raise ValueError(f"the text mask must be 2-D (N, L), got {tuple(mask.shape)}; squeeze the extra dimensions")
    if embeds.ndim != 3 or mask.shape != embeds.shape[:2]:
        shapes = f"mask {tuple(mask.shape)}, embeddings {tuple(embeds.shape)}"
        raise ValueError(f"the text mask (N, L) does not fit the embeddings (N, L, D): {shapes}")
