"""One call of the network: the only place that knows the transformer's calling convention."""

import torch
from torch import Tensor

from pixart_ft.model.attention import check_text


def network_output(
    transformer: torch.nn.Module, x_t: Tensor, timesteps: Tensor, embeds: Tensor, mask: Tensor
) -> Tensor:
    """The network's raw output (N, C or 2C, H, W) at x_t, in float32 (float64 for a float64 network).

    x_t (N, C, H, W); timesteps (N,) int64 or float32 in the original process's count, since bfloat16 holds only 506
    of the integers below 1000; embeds (N, L, D) and mask (N, L) of 0 and 1. Raises ValueError for anything else.
    """
    if timesteps.dtype not in (torch.int64, torch.float32):
        raise ValueError(f"timesteps must be int64 or float32, got {timesteps.dtype}")
    check_text(embeds, mask)
    dtype = next(transformer.parameters()).dtype
    output = transformer(
        x_t.to(dtype),
        encoder_hidden_states=embeds.to(dtype),
        encoder_attention_mask=mask,
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))
