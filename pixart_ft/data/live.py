"""Pictures and captions that are encoded when they are drawn: nothing of them is kept."""

import warnings
from collections.abc import Sequence
from threading import Lock

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.data.cache import WITHOUT_LATENTS, area_of, pictures_at_once, pixels_of
from pixart_ft.data.pixels import Fit
from pixart_ft.data.rows import Row, listed
from pixart_ft.data.seen import in_threads
from pixart_ft.errors import UserError
from pixart_ft.model.text import encode_each, prepare_text, warn_of_losses
from pixart_ft.model.vae import encode_moments


class LivePictures:
    """The training data as `CachedPictures` gives it, by the VAE and T5 that are at hand."""

    def __init__(
        self,
        rows: Sequence[Row],
        digests: Sequence[str],
        fits: Sequence[Sequence[Fit]],
        vae: AutoencoderKL,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        *,
        max_tokens: int,
        strict: bool,
    ) -> None:
        """`digests` are of the rows, and `fits` their views, of all as many; strict: one without latents is refused.

        lost   those found to have none so far
        """
        self._rows, self._digests, self._fits, self.views = rows, digests, fits, len(fits[0])
        others = (caption for row in rows for caption in row.others)
        self._texts = [prepare_text(caption) for caption in (*(row.caption for row in rows), *others)]
        self._vae, self._tokenizer, self._text_encoder, self._max_tokens = vae, tokenizer, text_encoder, max_tokens
        self.lost, self._strict = set[int](), strict
        self._turn = Lock()  # a checkpoint's loss is looked at while the next batch is made
        warn_of_losses(tokenizer, self._texts, max_tokens)

    def __len__(self) -> int:
        return len(self._rows)

    def latents(self, indices: Sequence[int], views: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """See `CachedPictures.latents`; a picture for which the VAE gives NaN or infinity is told of and then `lost`.

        Raises UserError where that is refused, and as `pixels_of` does.
        """
        chosen = self._chosen(indices, views or [0] * len(indices))
        digests = [self._digests[index] for index in indices]
        wanted = [(row, digest, fit) for (row, fit), digest in zip(chosen, digests, strict=True)]
        pixels = torch.stack(list(in_threads(lambda one: pixels_of(*one), wanted)))
        parts = pixels.split(pictures_at_once(chosen[0][1].size))
        with self._turn:
            moments = torch.cat([encode_moments(self._vae, part) for part in parts])
            self._leave_out({index for index, one in zip(indices, moments, strict=True) if not one.isfinite().all()})
        mean, std = moments.unbind(1)
        return mean, std

    def _leave_out(self, found: set[int]) -> None:
        """Tell of those of them that are new, or refuse them."""
        new, before = found - self.lost, {self._rows[index].where for index in self.lost}
        self.lost |= new
        places = {self._rows[index].where for index in new}  # one may stand at several
        named = listed(WITHOUT_LATENTS, sorted(map(str, places)))
        if new and self._strict:
            raise UserError(f"some pictures cannot be used:\n{named}\n  --data.strict false leaves them out")
        if places - before:
            warnings.warn(f"left out, and others shown in their place:\n{named}", stacklevel=3)

    def areas(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """See `CachedPictures.areas`."""
        chosen = self._chosen(indices, views)
        (width, height), config = chosen[0][1].size, self._vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        whole = torch.ones(config.latent_channels, height // factor, width // factor)
        return torch.stack([whole if row.mask is None else area_of(row, fit, whole) for row, fit in chosen])

    def _chosen(self, indices: Sequence[int], views: Sequence[int]) -> list[tuple[Row, Fit]]:
        pairs = zip(indices, views, strict=True)
        return [(self._rows[index], self._fits[index][view]) for index, view in pairs]

    def texts(self, indices: Sequence[int]) -> list[Tensor]:
        """See `CachedPictures.texts`."""
        texts = [self._texts[index] for index in indices]
        with self._turn:
            found = list(encode_each(self._text_encoder, self._tokenizer, texts, max_tokens=self._max_tokens))
        return [embedding for _, embedding in sorted(found, key=lambda pair: pair[0])]
