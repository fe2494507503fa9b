"""Pictures and captions to feature vectors, by a network of transformers: what the metrics of pictures see by."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pixart_ft.errors import UserError
from pixart_ft.model.place import DEMO_FOLDER
from pixart_ft.runs.hub import HubModel, reached

DEMO_EXTRACTOR = DEMO_FOLDER.parent / "extractor"
_READY = "a model of transformers with image features and weights for them, such as facebook/dinov2-base, "
_READY += "openai/clip-vit-large-patch14 or google/siglip-base-patch16-224"


@dataclass(eq=False, repr=False)
class Extractor:
    """A frozen network in float32 with its own way to prepare pictures.

    name    as it was asked for
    digest  16 hex digits of SHA-256 over all of its weights: two of one name may differ
    """

    name: str
    digest: str
    network: Any
    processor: Any
    tokenizer: Any = None  # of the text half, where it has one

    @classmethod
    def load(cls, name: str, key: str, *, device: torch.device | str = "cpu") -> Self:
        """The one in a folder, or of a Hub id, with "@revision" or without; "demo" is the demo's own.

        Raises UserError, naming `key`, for one that cannot be had, or whose features nothing would have trained.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        place, how = str(DEMO_EXTRACTOR) if name == "demo" else name, {}
        if not Path(place).is_dir():
            hub = HubModel.named(name)
            if hub is None:
                raise UserError(f"{key}: {name} is no folder, and no Hub id; expected {_READY}")
            place, how = hub.id, {"revision": hub.revision or "main"}
        with reached(f"{key}: {name} cannot be taken as a feature extractor", f"; expected {_READY}"):
            processor = AutoImageProcessor.from_pretrained(place, **how)
            network, report = AutoModel.from_pretrained(
                place, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **how
            )
            tokenizer = None
            if hasattr(network, "get_text_features"):
                tokenizer = AutoTokenizer.from_pretrained(place, **how)
        if report["missing_keys"]:  # a head that transformers adds, with random weights
            raise UserError(f"{key}: {name} has no weights for {sorted(report['missing_keys'])[0]}; expected {_READY}")
        network = network.requires_grad_(False).eval().to(device)
        return cls(name, _digest(network), network, processor, tokenizer)

    def __repr__(self) -> str:
        return f"Extractor({self.name}, {self.digest})"

    def of_pictures(
        self,
        pictures: Sequence[Any],
        opened: Callable[[Any], Image.Image] = lambda picture: picture,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """Features (N, D) float64 on the CPU of RGB pictures of any sizes; as CLIP's are before they get length 1.

        opened   makes an item a picture, a batch at a time, so that not all are in memory at once.

        Raises UserError where there is no picture, or where a feature is no number.
        """
        if not pictures:
            raise UserError(f"{self.name}: there is no picture to take features of")

        def features(some: Sequence[Any]) -> Tensor:
            pixels = self.processor(images=[*map(opened, some)], return_tensors="pt")["pixel_values"].to(
                self.network.device
            )
            of_clip = hasattr(self.network, "get_image_features")
            found = (self.network.get_image_features if of_clip else self.network)(pixel_values=pixels)
            if getattr(found, "pooler_output", None) is None:
                raise UserError(f"{self.name} gives no one vector for a picture; expected {_READY}")
            return found.pooler_output.flatten(1)

        return self._batches("features of pictures", pictures, batch_size, features)

    def of_captions(self, captions: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Features (N, D) float64 on the CPU of texts, cut to the longest that the network reads.

        Raises UserError for an extractor without a text half, and where there is no text.
        """
        if self.tokenizer is None:
            raise UserError(f"features: {self.name} reads no captions; for those take one of CLIP's kind")
        if not captions:
            raise UserError(f"{self.name}: there is no caption to take features of")
        longest = self.network.config.text_config.max_position_embeddings
        padding = "max_length" if self.network.config.model_type.startswith("siglip") else True  # as it was trained

        def features(some: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(
                list(some), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.network.device)
            wanted = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
            return self.network.get_text_features(**wanted).pooler_output

        return self._batches("features of captions", captions, batch_size, features)

    @torch.no_grad()
    def _batches(self, what: str, items: Sequence[Any], size: int, features: Callable[[Any], Tensor]) -> Tensor:
        starts = tqdm(range(0, len(items), size), what, delay=2, dynamic_ncols=True, disable=None)
        found = torch.cat([features(items[start : start + size]).double().cpu() for start in starts])
        if not found.isfinite().all():
            raise UserError(f"{self.name} gives features that are no numbers; take another extractor")
        return found


def _digest(network: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, weights in sorted(network.state_dict().items()):
        found.update(f"{name}{tuple(weights.shape)}".encode() + weights.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
