"""Prompts to embeddings, for drawing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.config.train import Quantization
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.text import encode_each, prepare_text, warn_of_losses


@dataclass(eq=False, repr=False)
class TextEncoder:
    """Prompts to embeddings, each encoded once; the encoder itself can be freed when all are known.

    known: prepared prompt -> (L, D); that of "" is the null caption, an adapter's own where there is one.
    """

    max_tokens: int
    tokenizer: PreTrainedTokenizerBase | None = None
    encoder: T5EncoderModel | None = None
    known: dict[str, Tensor] = field(default_factory=dict)
    quantization: Quantization = "none"  # what the encoder is held in

    @classmethod
    def load(
        cls,
        base: Base,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int,
        quantization: Quantization = "none",
    ) -> Self:
        """That of a base."""
        found = loading.load_text_encoder(base, dtype=dtype, quantization=quantization, device=device)
        return cls(max_tokens, *found, quantization=quantization)

    def __repr__(self) -> str:
        state = "freed" if self.encoder is None else "loaded"
        return f"TextEncoder({len(self.known)} texts known, encoder {state})"

    def of(self, prompt: str) -> Tensor:
        """The embedding (L, D) of a prompt on the CPU. Raises ValueError for a new one after the encoder was freed."""
        self.encode([prompt])
        return self.known[prepare_text(prompt)]

    def encode(self, prompts: Iterable[str]) -> None:
        """Encode the new ones of these, each by itself, so that no other decides its last bits."""
        new = [text for text in dict.fromkeys(map(prepare_text, prompts)) if text not in self.known]
        if not new:
            return
        if self.encoder is None or self.tokenizer is None:
            raise ValueError(f"the text encoder was freed before {new[0]!r} was encoded; give load() all prompts")
        warn_of_losses(self.tokenizer, new, self.max_tokens)
        found = encode_each(self.encoder, self.tokenizer, new, max_tokens=self.max_tokens, batch_size=1)
        for index, embedding in tqdm(found, "prompts encoded", len(new), delay=1, dynamic_ncols=True, disable=None):
            self.known[new[index]] = embedding

    def encode_and_free(self, prompts: Sequence[str]) -> None:
        """Encode these and the empty prompt, and drop the encoder."""
        self.encode(["", *prompts])
        self.encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
