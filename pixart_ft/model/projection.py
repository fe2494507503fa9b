"""The network's projection of texts, made once for each and kept, in place of in every step."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base

_LAYER = "caption_projection"


@dataclass(frozen=True, eq=False)
class Projection:
    """The frozen layers between T5 and the blocks, in float32, and 16 hex digits that name their weights."""

    layer: nn.Module
    mark: str

    @classmethod
    def load(cls, base: Base) -> Self:
        """That of a base; the rest of its transformer is freed."""
        layer = loading.load_transformer(base, dtype=torch.float32).caption_projection
        digest = hashlib.sha256()
        for name, weight in sorted(layer.state_dict().items()):
            digest.update(name.encode() + weight.contiguous().numpy().tobytes())
        return cls(layer, digest.hexdigest()[:16])

    @torch.no_grad()
    def of(self, embedding: Tensor) -> Tensor:
        """An embedding (L, D) of T5 as the blocks take it, (L, W), in its own dtype. Raises UserError if not finite."""
        weight = next(self.layer.parameters())
        found: Tensor = self.layer(embedding.to(weight)).to(embedding.device, embedding.dtype)
        if not found.isfinite().all():
            raise UserError(
                f"data.project_captions: the projection of a caption is NaN or infinite in {embedding.dtype}; set "
                "model.text_encoder_dtype bfloat16 or float32, or leave it out"
            )
        return found


def check_projection(base: Base, trained: Iterable[str]) -> None:
    """Raise UserError where texts cannot be projected ahead of a training of the parameters with these names."""
    if base.transformer.get("caption_channels") is None:
        raise UserError(f"data.project_captions: {base.name} takes texts without a projection; leave it out")
    if names := [name for name in trained if _LAYER in name.split(".")]:
        raise UserError(
            f"data.project_captions keeps what the base's {_LAYER} makes of texts, and that is trained here "
            f"({names[0]}); give adapter.targets or adapter.trainable without it, or leave data.project_captions out"
        )


def take_projected(transformer: PixArtTransformer2DModel) -> None:
    """Let the network take texts that were projected before; its weights and their names stay as they are."""
    transformer.caption_projection.forward = _as_it_comes


def projected_width(base: Base) -> int:
    """W, how many numbers a token has after the projection."""
    width: int = base.transformer["num_attention_heads"] * base.transformer["attention_head_dim"]
    return width


def _as_it_comes(text: Tensor) -> Tensor:
    return text
