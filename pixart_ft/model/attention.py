"""The attention kernel of short sequences on a CPU, and the one check of text masks.

Shapes: N batch, H heads, Q queries, L keys (text or image tokens), E head width, D = H * E.
"""

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

# Longest sequence for which `plain_attention` beat SDPA on a CPU in bfloat16, forward plus backward: 4 to 6
# times faster at 64 tokens, 1.2 to 1.7 times at 256, 1.6 times at 576, slower at 1024. In float32 SDPA won at
# every length, and without a backward pass at nearly every one.
MAX_PLAIN_TOKENS = 576


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(E) + bias) value, as three matrix operations.

    `query` is (N,H,Q,E), `key` and `value` (N,H,L,E), `bias` broadcasts to (N,H,1,L); returns (N,H,Q,E). The
    same result as `scaled_dot_product_attention`, whose CPU backward is very slow on short bfloat16
    sequences.
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


def plain_is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether `plain_attention` is the faster kernel for this call (see `MAX_PLAIN_TOKENS`)."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float32
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
        and max(query.shape[2], key.shape[2]) <= MAX_PLAIN_TOKENS
    )


class ShortSequenceAttention:
    """diffusers attention processor for PixArt's self- and cross-attention: the faster kernel of each call.

    PixArt's attention has neither query/key norms nor group norms nor an inner residual, so none is applied.
    """

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
        if plain_is_faster(query, key):
            attended = plain_attention(query, key, value, bias)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        project, dropout = attn.to_out
        return dropout(project(attended.transpose(1, 2).flatten(2)))

    def keys_and_values(self, attn: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        """Both (N,H,L,E) of what is attended to, (N,L,D)."""
        return _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    """(N,L,D) -> (N,H,L,E)."""
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def use_plain_attention(transformer: PixArtTransformer2DModel) -> None:
    """Let every attention of `transformer` use the plain kernel where it is faster; elsewhere SDPA stays."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            assert module.norm_q is None and module.group_norm is None and not module.residual_connection
    transformer.set_attn_processor(ShortSequenceAttention())


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
