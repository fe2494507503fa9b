"""The text path: preparation, tokens, encoding, padding, dropping.

Oracles: the stock pipeline's own preprocessing and tokenizer call; the T5 called on one caption; float32.
"""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.errors import UserError
from pixart_ft.model.text import (
    drop_captions,
    encode_captions,
    null_caption,
    pad_text,
    prepare_text,
    token_ids,
    tokenize,
    warn_of_losses,
)

CAPTIONS = [
    "A red circle on grey",
    "a photo of ZX123y",
    "the picture of the black square on the pink picture",
    "a",
    "  Blue\nsquare ",
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tiny / "tokenizer"))


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(str(folder / "text_encoder"), dtype=dtype).eval()


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> T5EncoderModel:
    return load_encoder(tiny)


@pytest.mark.parametrize("text", [*CAPTIONS, "", "İstanbul SKS  two  spaces", "p3rs0n, <tag> http://x.y"])
def test_tokens_are_those_of_the_stock_pipeline(tiny: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny), transformer=None, vae=None, text_encoder=None)
    stock_text = pipeline._text_preprocessing(text, clean_caption=False)[0]
    stock = tokenizer([stock_text], max_length=300, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = tokenize(tokenizer, [text, "a much longer caption of the square, so that there is padding"])
    assert prepare_text(text) == stock_text
    assert torch.equal(ids[0], stock.input_ids[0, : ids.shape[1]])
    assert torch.equal(mask[0], stock.attention_mask[0, : ids.shape[1]])
    assert mask.dtype == ids.dtype == torch.int64 and mask.sum(1)[0] == stock.attention_mask.sum()


def test_long_captions_are_cut_with_one_warning(tokenizer: PreTrainedTokenizerBase) -> None:
    captions = ["a red", *[f"a photo of the picture {word}" for word in ("red", "green", "blue", "pink")]]
    whole = token_ids(tokenizer, captions, 300)
    ids = token_ids(tokenizer, captions, 5)
    message, same = losses(tokenizer, captions, 5)
    assert "4 of 5 texts exceed max_tokens 5" in message
    assert f"{len(whole[1])} tokens: 'a photo of the picture red'" in message
    assert "blue" in message and "pink" not in message and message.endswith("and 1 more")
    assert "'a photo of the picture red' = 'a photo of the picture green' = 'a photo of the picture blue'" in same
    assert ids[0] == whole[0]
    assert [row[:-1] for row in ids[1:]] == [row[:4] for row in whole[1:]]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    assert losses(tokenizer, captions, len(whole[1])) == []


def losses(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_tokens: int = 300) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_losses(tokenizer, captions, max_tokens)
    return [str(warning.message) for warning in caught]


def test_letters_that_the_tokenizer_lacks_and_texts_that_become_the_same_are_named(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    captions = ["a red circle", "赤いりんご", "a RED  circle ", "犬", "a café\u200b circle"]
    unknown, same = losses(tokenizer, captions)
    assert unknown.startswith("3 of 4 texts have letters that the tokenizer does not know; the model sees one unknown")
    assert "赤 い り ん ご in '赤いりんご'" in unknown and "é U+200B in 'a café" in unknown
    assert token_ids(tokenizer, ["赤いりんご"], 300) == token_ids(tokenizer, ["犬"], 300)  # what it is about
    assert same.splitlines()[1:] == ["  '赤いりんご' = '犬'"] and "cannot tell them apart" in same
    assert losses(tokenizer, ["a red circle", "A red circle", "a  red circle", "a blue circle"]) == []
    assert losses(tokenizer, []) == []


def test_half_a_surrogate_is_refused_with_all_of_its_kind(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError) as caught:
        encode_captions(encoder, tokenizer, ["a red", "a \ud83d", "caf\udce9"])
    assert str(caught.value).splitlines() == [
        "2 of 3 texts are no Unicode text (half a surrogate pair):",
        r"  a \ud83d",
        r"  caf\udce9",
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_encoding_is_that_of_each_caption_alone(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    embeddings = encode_captions(encoder, tokenizer, CAPTIONS, batch_size=batch_size)
    for caption, embedding in zip(CAPTIONS, embeddings, strict=True):
        ids, mask = tokenize(tokenizer, [caption])
        with torch.no_grad():
            alone = encoder(ids, attention_mask=mask).last_hidden_state[0]
        assert embedding.shape == alone.shape
        torch.testing.assert_close(embedding, alone, rtol=1e-5, atol=1e-5)


def test_padding_to_300_as_the_stock_pipeline_does_changes_nothing(
    tiny: Path, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny), transformer=None, vae=None)
    stock, stock_mask, null, null_mask = pipeline.encode_prompt(CAPTIONS[0], clean_caption=False, device="cpu")
    ours = encode_captions(encoder, tokenizer, [CAPTIONS[0], ""])
    for embedding, reference, mask in ((ours[0], stock, stock_mask), (ours[1], null, null_mask)):
        assert len(embedding) == mask.sum()
        torch.testing.assert_close(embedding, reference[0, : len(embedding)], rtol=1e-5, atol=1e-5)


def test_the_null_caption_has_the_same_bytes_in_any_company(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    null = null_caption(encoder, tokenizer)
    assert null.shape == (1, encoder.config.d_model)
    among = encode_captions(encoder, tokenizer, ["", *CAPTIONS, "  ", "a red"], batch_size=4)
    assert torch.equal(among[0], null) and torch.equal(among[6], null)


def test_dropping_every_caption_gives_the_null_pair(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    null = null_caption(encoder, tokenizer)
    embeddings = encode_captions(encoder, tokenizer, CAPTIONS)
    dropped = drop_captions(embeddings, [True] * len(embeddings), null)
    for length in (None, 20):
        embeds, mask = pad_text(dropped, length)
        unconditional, unconditional_mask = pad_text([null] * len(embeddings), length)
        assert torch.equal(embeds, unconditional) and torch.equal(mask, unconditional_mask)
        assert mask.sum(1).tolist() == [1] * len(embeddings)
    kept = drop_captions(embeddings, [False, True, False, False, False], null)
    assert [len(row) for row in kept] == [len(embeddings[0]), 1, *map(len, embeddings[2:])]
    assert torch.equal(kept[0], embeddings[0]) and torch.equal(kept[1], null)


def test_pad_text_pads_with_zeros_on_the_right() -> None:
    one, two = torch.ones(1, 3, dtype=torch.bfloat16), torch.full((2, 3), 2.0, dtype=torch.bfloat16)
    embeds, mask = pad_text([one, two])
    assert embeds.dtype == torch.bfloat16 and mask.dtype == torch.int64
    assert embeds.tolist() == [[[1.0] * 3, [0.0] * 3], [[2.0] * 3, [2.0] * 3]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    longer, longer_mask = pad_text([one, two], 4)
    assert longer.shape == (2, 4, 3) and longer_mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    with pytest.raises(UserError, match="to 1 tokens: the longest caption has 2"):
        pad_text([one, two], 1)


@pytest.fixture(scope="module")
def overflowing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose feed-forward outputs exceed float16's 65504 while all else is tame, as in T5-XXL."""
    encoder = load_encoder(tiny)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith(".wo.weight"):
                weight.mul_(5e4)
            elif ".wi_" in name:
                weight.mul_(3)
    folder = tmp_path_factory.mktemp("overflowing")
    encoder.save_pretrained(str(folder / "text_encoder"))
    return folder


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    gap, norm = torch.cat(found).float() - torch.cat(truth), torch.cat(truth).norm()
    return float(gap.norm() / norm)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_t5_that_overflows_float16_encodes_finitely(
    overflowing: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, autocast: bool
) -> None:
    truth = encode_captions(load_encoder(overflowing), tokenizer, CAPTIONS)
    encoder = load_encoder(overflowing, dtype)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = encode_captions(encoder, tokenizer, CAPTIONS)
    assert {row.dtype for row in found} == {dtype}
    assert relative_error(found, truth) < {torch.float32: 1e-6, torch.float16: 0.02, torch.bfloat16: 0.05}[dtype]


def test_the_overflowing_t5_really_overflows(overflowing: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = load_encoder(overflowing)
    ids, mask = tokenize(tokenizer, CAPTIONS)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert not encoder(ids, attention_mask=mask).last_hidden_state.isfinite().all()


def test_an_encoder_cast_after_loading_is_refused(tiny: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="cast to float16 after loading"):
        encode_captions(load_encoder(tiny).half(), tokenizer, CAPTIONS)


def test_an_encoder_in_training_mode_is_refused(tiny: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"training mode.*call \.eval\(\)"):
        encode_captions(load_encoder(tiny).train(), tokenizer, CAPTIONS)


def test_a_caption_that_gives_nan_is_named(tiny: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = load_encoder(tiny)
    unlucky = tokenizer("ZX123y".lower()).input_ids[2]
    with torch.no_grad():
        encoder.get_input_embeddings().weight[unlucky] = float("nan")
    with pytest.raises(UserError, match=r"float32.* NaN or infinity for the caption 'a photo of ZX123y'"):
        encode_captions(encoder, tokenizer, CAPTIONS[:3], batch_size=1)


def test_no_captions_no_embeddings(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_captions(encoder, tokenizer, []) == []
