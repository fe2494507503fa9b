"""What the network calls for one batch of pictures share, computed once: the text's projection, keys and values, and
the positions of a size that is not the network's own. The output is the same to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import Tensor, nn

from pixart_ft.model.adapter_switch import acting_adapters
from pixart_ft.model.attention import Kernel, KernelAttention, by_shape
from pixart_ft.model.network import network_output

# (x_t (N, C, H, W), timesteps (N,)) -> output
Network = Callable[[Tensor, Tensor], Tensor]


class _Once(nn.Module):
    """A layer on the text, run at the first call with each number of rows, and each set of adapters that act."""

    def __init__(self, layer: nn.Module, acting: Callable[[], tuple[str, ...]]) -> None:
        super().__init__()
        self.layer, self.acting = layer, acting
        self.found: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def forward(self, text: Tensor) -> Tensor:
        key = len(text), self.acting()
        if key not in self.found:
            self.found[key] = self.layer(text)
        return self.found[key]


class _TextAttention(KernelAttention):
    """Cross-attention whose keys and values are made at the first call with each of these too."""

    def __init__(self, kernel: Kernel, acting: Callable[[], tuple[str, ...]]) -> None:
        super().__init__(kernel)
        self.acting = acting
        self.found: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    @torch.compiler.disable  # a compiled block asks for what was found, and is not compiled anew for it
    def keys_and_values(self, attn: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        key = len(context), self.acting()
        if key not in self.found:
            self.found[key] = super().keys_and_values(attn, context)
        return self.found[key]


@contextmanager
def prepared(transformer: nn.Module, embeds: Tensor, mask: Tensor, size: tuple[int, int]) -> Iterator[Network]:
    """The network for these texts (M, L, D), mask (M, L), and latents of height and width `size`.

    A call takes M rows, or fewer: then the last rows of the text. Inside, the transformer must not be called otherwise
    or trained; afterwards it is as it was. Any other module than diffusers' transformer is called plainly.
    """

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        return network_output(transformer, x, timesteps, embeds[-len(x) :], mask[-len(x) :])

    if not isinstance(transformer, PixArtTransformer2DModel):
        yield network
        return
    patches, projection, processors = transformer.pos_embed, transformer.caption_projection, transformer.attn_processors
    own = patches.height, patches.width, patches.pos_embed
    patch = patches.patch_size
    acting = partial(acting_adapters, transformer)
    try:
        _set_positions(patches, size[0] // patch, size[1] // patch)
        transformer.caption_projection = None if projection is None else _Once(projection, acting)
        kernels = {name: getattr(processor, "kernel", by_shape) for name, processor in processors.items()}
        transformer.set_attn_processor(
            {
                name: _TextAttention(kernel, acting) if ".attn2." in name else KernelAttention(kernel)
                for name, kernel in kernels.items()
            }
        )
        yield network
    finally:
        patches.height, patches.width, patches.pos_embed = own
        transformer.caption_projection = projection
        transformer.set_attn_processor(processors)


def _set_positions(patches: PatchEmbed, height: int, width: int) -> None:
    """Make the positions of `height` times `width` patches the layer's own; it would compute them at every call."""
    if patches.pos_embed_max_size or (patches.height, patches.width) == (height, width):
        return
    positions = get_2d_sincos_pos_embed(
        embed_dim=patches.pos_embed.shape[-1],
        grid_size=(height, width),
        base_size=patches.base_size,
        interpolation_scale=patches.interpolation_scale,
        device=patches.pos_embed.device,
        output_type="pt",
    )
    patches.height, patches.width, patches.pos_embed = height, width, positions.float().unsqueeze(0)
