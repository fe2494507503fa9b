"""Captions to text embeddings: the one text path of cache, trainer and sampler.

Shapes: N captions, L tokens, D the text encoder's width. A caption's embedding is (L_i, D), its real tokens
only; padding is added when a batch is put together. The transformer masks padding out, so that the length a
batch is padded to changes nothing but the cost.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.config.text import is_text, visible
from pixart_ft.errors import UserError

TEXT_PREPARATION = "lower().strip()"
"""Recorded in caches and adapters, so that text prepared in another way is never taken for ours."""


def prepare_text(text: str) -> str:
    """The caption as the text encoder sees it: what the stock pipeline does with `clean_caption=False`."""
    return text.lower().strip()


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int | None) -> list[list[int]]:
    """Token ids of each caption, end token included, no padding; every token in this package is made here.

    Captions longer than `max_tokens` are cut, the end token kept; None: they are not. Raises UserError naming those
    that are no text.
    """
    if bad := [visible(caption) for caption in captions if not is_text(caption)]:
        raise UserError(f"{len(bad)} of {len(captions)} texts are no Unicode text (half a surrogate pair):{_few(bad)}")
    if not captions:
        return []
    prepared = [prepare_text(caption) for caption in captions]
    ids: list[list[int]] = []
    cut = {"truncation": max_tokens is not None, "max_length": max_tokens, "verbose": False}
    for start in tqdm(range(0, len(prepared), 1024), "texts read, in thousands", delay=1, leave=False, disable=None):
        ids += tokenizer(prepared[start : start + 1024], **cut).input_ids
    return ids


def token_counts(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> dict[str, int]:
    """The tokens of each whole caption, end token included."""
    texts = list(dict.fromkeys(captions))
    return {text: len(ids) for text, ids in zip(texts, token_ids(tokenizer, texts, None), strict=True)}


def warn_of_losses(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int = 300) -> None:
    """Warn, once a kind, of what the text encoder will not see of these captions.

    That is ends that are cut, letters that the vocabulary lacks, and captions that become the same for these or other
    reasons; ones that differ in capitals or spaces alone count as the same.
    """
    texts = list({" ".join(text.split()): text for text in map(prepare_text, captions)}.values())
    ids = token_ids(tokenizer, texts, max_tokens)
    # Only a caption that fills the limit can have been cut, so only those are counted again in full.
    full = [text for text, row in zip(texts, ids, strict=True) if len(row) == max_tokens]
    cut = [(text, count) for text, count in token_counts(tokenizer, full).items() if count > max_tokens]
    strange = [text for text, row in zip(texts, ids, strict=True) if tokenizer.unk_token_id in row]
    alike: dict[tuple[int, ...], list[str]] = {}
    for text, row in zip(texts, ids, strict=True):
        alike.setdefault(tuple(row), []).append(text)
    same = [group for group in alike.values() if len(group) > 1]
    losses = []
    if cut:
        examples = _few([f"{length} tokens: {text[:80]!r}" for text, length in cut])
        losses.append(f"{len(cut)} of {len(texts)} texts exceed max_tokens {max_tokens} and were cut:{examples}")
    if strange:
        examples = _few([f"{unknown_letters(tokenizer, text)} in {text[:80]!r}" for text in strange[:3]], len(strange))
        losses.append(
            f"{len(strange)} of {len(texts)} texts have letters that the tokenizer does not know; the model sees one "
            f"unknown token for each or several of them:{examples}"
        )
    if same:
        examples = _few([" = ".join(repr(text[:80]) for text in group[:3]) for group in same])
        losses.append(f"different texts become the same tokens, so the model cannot tell them apart:{examples}")
    for loss in losses:
        warnings.warn(loss, stacklevel=2)


def _few(examples: Sequence[str], count: int | None = None) -> str:
    """The first three on lines of their own; `count` of them there are."""
    rest = (count or len(examples)) - 3
    return "".join(f"\n  {example}" for example in examples[:3]) + (f"\n  and {rest} more" if rest > 0 else "")


def unknown_letters(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The letters of a text that the vocabulary lacks."""
    letters = list(dict.fromkeys(text))
    rows = tokenizer(letters).input_ids
    found = [letter for letter, row in zip(letters, rows, strict=True) if tokenizer.unk_token_id in row]
    return " ".join(letter if letter.isprintable() else f"U+{ord(letter):04X}" for letter in found[:20])


def tokenize(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int = 300
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch, both (N, L) int64, padded on the right to the longest caption."""
    return _padded(token_ids(tokenizer, captions, max_tokens), tokenizer)


def encode_captions(
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    max_tokens: int = 300,
    batch_size: int = 16,
) -> list[Tensor]:
    """The embedding of each caption in the order given: (L_i, D) on the CPU, in the encoder's dtype.

    Warns as `warn_of_losses` does. Raises UserError if an embedding is not finite, naming the caption, or if the
    encoder is in training mode or was cast to float16 after loading.
    """
    warn_of_losses(tokenizer, captions, max_tokens)
    found = encode_each(text_encoder, tokenizer, captions, max_tokens=max_tokens, batch_size=batch_size)
    return [embedding for _, embedding in sorted(found, key=lambda pair: pair[0])]


def encode_each(
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    max_tokens: int = 300,
    batch_size: int = 16,
) -> Iterator[tuple[int, Tensor]]:
    """As `encode_captions`, one (position, embedding) at a time, longest first: memory fails early or never.

    The empty caption is always encoded alone, so that its bytes never depend on its batch.
    """
    _check_encoder(text_encoder)
    ids = token_ids(tokenizer, captions, max_tokens)
    empty = [index for index, caption in enumerate(captions) if not prepare_text(caption)]
    others = sorted(set(range(len(ids))).difference(empty), key=lambda index: -len(ids[index]))
    batches = [others[start : start + batch_size] for start in range(0, len(others), batch_size)]
    for batch in batches + [[index] for index in empty]:
        embeddings = _encode(text_encoder, *_padded([ids[index] for index in batch], tokenizer))
        for index, embedding in zip(batch, embeddings, strict=True):
            embedding = embedding[: len(ids[index])].clone()
            if not embedding.isfinite().all():
                but = ", and not in 8 bits" if getattr(text_encoder, "is_loaded_in_8bit", False) else ""
                raise UserError(
                    f"the text encoder ({text_encoder.dtype}) gave NaN or infinity for the caption "
                    f"{captions[index]!r}; load it in bfloat16 or float32{but}"
                )
            yield index, embedding


def null_caption(text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The embedding of the empty caption, (1, D): what dropped captions and the unconditional branch see."""
    return encode_captions(text_encoder, tokenizer, [""])[0]


def pad_text(embeddings: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings (N, L, D), zero-padded, and their mask (N, L) int64; L is `length` or the longest's."""
    longest = max(len(embedding) for embedding in embeddings)
    length = longest if length is None else length
    if length < longest:
        raise UserError(f"text cannot be padded to {length} tokens: the longest caption has {longest}")
    padded = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[1])
    mask = torch.zeros(len(embeddings), length, dtype=torch.int64, device=padded.device)
    for row, embedding in enumerate(embeddings):
        padded[row, : len(embedding)] = embedding
        mask[row, : len(embedding)] = 1
    return padded, mask


def drop_captions(embeddings: Sequence[Tensor], dropped: Sequence[bool], null: Tensor) -> list[Tensor]:
    """The embeddings with the null caption in place of the dropped ones.

    Length goes with the embedding, so `pad_text` gives a dropped caption the null caption's mask as well.
    """
    return [null if drop else embedding for embedding, drop in zip(embeddings, dropped, strict=True)]


def _padded(ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in ids)
    padded = torch.full((len(ids), length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), length), dtype=torch.int64)
    for row, values in enumerate(ids):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
        mask[row, : len(values)] = 1
    return padded, mask


def _encode(text_encoder: T5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    # T5's `wo` exceeds float16: under an active float16 autocast even float32 weights would give NaN.
    device = text_encoder.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        hidden = text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    embeddings: Tensor = hidden.to("cpu", text_encoder.dtype)
    return embeddings


def _check_encoder(text_encoder: T5EncoderModel) -> None:
    if text_encoder.training:
        raise UserError("the text encoder is in training mode, so dropout would alter captions; call .eval()")
    # from_pretrained(dtype=float16) keeps `wo` in float32; a later .half() or .to(float16) does not, and the
    # clamps inside T5 then make the result finite and wrong.
    wo = [weight for name, weight in text_encoder.named_parameters() if name.endswith(".wo.weight")]
    if any(weight.dtype == torch.float16 for weight in wo):
        raise UserError(
            "the text encoder was cast to float16 after loading, which silently alters T5's embeddings; "
            "load it with from_pretrained(..., dtype=torch.float16), or in bfloat16 or float32"
        )
