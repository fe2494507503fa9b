"""What becomes of a caption, in words. Oracles: expected output; the stock pipeline's own preprocessing where its two
libraries are there; the tokenizer's own call."""

import warnings
from pathlib import Path

import pytest
from diffusers import PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pixart_ft.errors import UserError
from pixart_ft.model.captions import account_of, stock_cleaning, warn_of_trigger_words
from pixart_ft.model.text import prepare_text

# what is written, and what diffusers' pipeline makes of it by reading its rules by hand
CLEANED = {
    "A photo of SKS dog": "a photo of sks dog",
    "a photo of jc6640, in a bag": "a photo of , in a bag",
    "a <sks> dog by @me #123": "a dog by",
    "a p3rs0n": "a",
    "a 熊 &amp; a b<i>i</i>g (cat)": "a a big cat",
    "my_very_old_red_cat": "my very old red cat",
    "a cat < a dog": "a cat < a dog",
}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tiny / "tokenizer"))


@pytest.mark.parametrize("text", CLEANED)
def test_stock_cleaning_is_what_the_rules_of_diffusers_say(text: str) -> None:
    assert stock_cleaning(text) == CLEANED[text]


@pytest.mark.parametrize("text", ["A cat <![ [x", "A cat <![foo"])
def test_what_no_parser_takes_is_no_failure(text: str) -> None:
    assert stock_cleaning(text).startswith("a cat")
    warn_of_trigger_words([text] * 2)


@pytest.mark.skipif(
    not (is_bs4_available() and is_ftfy_available()), reason="without bs4 and ftfy diffusers cleans nothing"
)
@pytest.mark.parametrize("text", CLEANED)
def test_stock_cleaning_is_that_of_the_pipeline(text: str) -> None:
    pipeline = PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)
    assert pipeline._text_preprocessing(text, clean_caption=True) == [CLEANED[text]]


def test_a_caption_is_accounted_for_to_the_last_token(tokenizer: PreTrainedTokenizerBase) -> None:
    caption = " a RED circle, <sks> 犬 on the grey picture "
    whole = tokenizer(prepare_text(caption)).input_ids
    account = account_of(tokenizer, caption, 300)
    assert account["caption"] == f'"{caption}"' and account["T5 sees"].startswith('"a red circle, <sks> 犬 on the grey')
    count, _, pieces = account["tokens"].partition(" of at most 300: ")
    assert int(count) == len(whole) and pieces.split(" ") == tokenizer.convert_ids_to_tokens(whole)
    assert account["unknown"].startswith("犬: one <unk>") or "犬" in account["unknown"]
    assert account["small letters"] == "RED: seen as red" and "cut" not in account
    assert account["diffusers"].endswith('sees "a red circle, on the grey picture", without <sks>, 犬')
    cut = account_of(tokenizer, caption, 6)
    seen = cut["tokens"].removeprefix("6 of at most 6: ").split(" ")
    assert seen == [*tokenizer.convert_ids_to_tokens(whole[:5]), tokenizer.eos_token]
    assert cut["cut"] == f'{len(whole) - 6} tokens not seen: "{tokenizer.decode(whole[5:-1])}"'


def test_a_plain_caption_and_the_empty_one_have_little_to_tell(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = account_of(tokenizer, "a red circle", 300)
    assert set(plain) == {"caption", "T5 sees", "tokens", "diffusers"} and plain["diffusers"].endswith("sees the same")
    empty = account_of(tokenizer, " ", 300)
    assert empty["tokens"] == "1 of at most 300: </s>" and empty["T5 sees"].endswith("the null caption")
    with pytest.raises(UserError, match="half a surrogate"):
        account_of(tokenizer, "\ud83d", 300)


def told(captions: list[str], *named: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_trigger_words(captions, named)
    return [str(warning.message) for warning in caught]


def test_words_that_many_captions_share_and_that_change_are_warned_of() -> None:
    others = ["A Cat at NASA", "one dog (big), two cats"] * 20
    assert told(others) == ["words of the captions that T5 sees in small letters, always: NASA (20 of 40)"]
    seldom = ["a dog"] * 39 + ["a JC6640 SKS"]
    assert told(seldom) == []
    small, lost = told(seldom, "SKS, JC6640")
    assert small.endswith(": JC6640 (1 of 40), SKS (1 of 40)") and ": jc6640 (1 of 40);" in lost
    small, lost = told(["a TOK dog jc6640"] * 2 + ["a <sks> dog"] * 4 + ["a dog"] * 34)
    assert small.endswith(": TOK (2 of 40)")
    assert "clean_caption=True, its default): <sks> (4 of 40), jc6640 (2 of 40);" in lost
    assert told([]) == []
    many = told(["a TOK dog"] * 4001)
    assert many[0].endswith(": TOK (2001 of 2001)")
