"""What becomes of a caption before T5 sees it, here and in diffusers' own pipeline, in words."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from html.parser import HTMLParser
from types import FunctionType, SimpleNamespace

from diffusers.utils import is_bs4_available, is_ftfy_available
from transformers import PreTrainedTokenizerBase

from pixart_ft.config.text import numbered
from pixart_ft.model.text import prepare_text, token_ids, unknown_letters

_LOOKED_AT = 2000  # captions; what many share, these show
_SHARED = 20  # a word may be a trigger if one caption of so many has it


def account_of(tokenizer: PreTrainedTokenizerBase, caption: str, max_tokens: int) -> dict[str, str]:
    """What the text encoder sees of a caption, by what each line is about. Raises UserError for what is no text."""
    (ids,) = token_ids(tokenizer, [caption], max_tokens)
    (whole,) = token_ids(tokenizer, [caption], None)
    seen = prepare_text(caption)
    found = {
        "caption": f'"{caption}"',
        "T5 sees": f'"{seen}", in training and in sampling alike' + ("" if seen else ": the null caption"),
        "tokens": f"{len(ids)} of at most {max_tokens}: {' '.join(tokenizer.convert_ids_to_tokens(ids))}",
    }
    if len(whole) > len(ids):
        cut = tokenizer.decode(whole[len(ids) - 1 : -1])
        found["cut"] = f'{numbered(len(whole) - len(ids), "token")} not seen: "{cut}"'
    if tokenizer.unk_token_id in ids:
        letters = unknown_letters(tokenizer, seen)
        found["unknown"] = f"{letters}: one {tokenizer.unk_token} for each or several of them"
    if lowered := _with_inner_capitals(caption):
        found["small letters"] = f"{', '.join(lowered)}: seen as {', '.join(map(str.lower, lowered))}"
    cleaned = stock_cleaning(caption)
    altered = f", without {', '.join(lost)}" if (lost := _altered(seen, cleaned)) else ""
    told = "sees the same" if cleaned == seen else f'sees "{cleaned}"{altered}'
    return found | {"diffusers": f"with clean_caption=True, its pipeline's default, {told}"}


def warn_of_trigger_words(captions: Sequence[str], named: Sequence[str] = ()) -> None:
    """Warn of words that are not read as they are written, here or in diffusers: such as many captions share, and
    those that are named to be triggers."""
    looked_at = captions[:: max(1, len(captions) // _LOOKED_AT)]
    triggers = _words(" ".join(named))
    lowered = _shared([_with_inner_capitals(caption) for caption in looked_at], triggers)
    altered = _shared(
        [_altered(prepare_text(caption), stock_cleaning(caption)) for caption in looked_at], map(str.lower, triggers)
    )
    if lowered:
        warnings.warn(f"words of the captions that T5 sees in small letters, always: {lowered}", stacklevel=2)
    if altered:
        warnings.warn(
            "words of the captions that diffusers' own pipeline deletes or changes (clean_caption=True, its default): "
            f"{altered}; here they stay as they are. There draw with clean_caption=False, or choose plain letters",
            stacklevel=2,
        )


def stock_cleaning(caption: str) -> str:
    """The caption as diffusers' pipeline reads it with clean_caption=True, its default where bs4 and ftfy are there.

    What no parser takes, such as "<![ [x", it cannot read at all: that is given as it is read here.
    """
    clean = _stock_function()
    try:
        return clean(clean(caption))
    except Exception:  # of any kind, as the parsers raise what they like: this serves warnings alone
        return prepare_text(caption)


@cache
def _stock_function() -> Callable[[str], str]:
    """diffusers' own. Without the two libraries that it asks for, the markup is taken out by Python's own parser, and
    letters that were once read in a wrong encoding stay as they are."""
    from diffusers import PixArtSigmaPipeline

    clean = PixArtSigmaPipeline._clean_caption
    if not (is_bs4_available() and is_ftfy_available()):
        instead = {"BeautifulSoup": _Markup, "ftfy": SimpleNamespace(fix_text=str)}
        clean = FunctionType(clean.__code__, clean.__globals__ | instead)
    return lambda caption: str(clean(PixArtSigmaPipeline, caption))


class _Markup(HTMLParser):
    """The one thing that is asked of BeautifulSoup: the text between the tags."""

    def __init__(self, markup: str, features: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data


def _words(text: str) -> list[str]:
    """Without the marks around them; what has no letter and no digit is none."""
    words = (part.strip(".,;:!?()[]{}\"'") for part in text.split())
    return [word for word in words if any(map(str.isalnum, word))]


def _with_inner_capitals(text: str) -> list[str]:
    """The words with a capital after their first letter, each once: others are capitals of sentences and names."""
    inner = {word: re.sub(r"\W", "", word)[1:] for word in _words(text)}
    return [word for word, letters in inner.items() if letters != letters.lower()]


def _altered(text: str, becomes: str) -> list[str]:
    """The words of a text that are not among those of what becomes of it, each once."""
    left = set(_words(becomes))
    return list(dict.fromkeys(word for word in _words(text) if word not in left))


def _shared(found: Sequence[Sequence[str]], triggers: Iterable[str]) -> str:
    """Words that one caption of `_SHARED` has or more, and triggers, the most frequent first; "" for none.

    found   of each caption
    """
    counted, always = Counter(word for words in found for word in words).most_common(), set(triggers)
    often = [
        f"{word} ({times} of {len(found)})"
        for word, times in counted
        if _SHARED * times >= len(found) or word in always
    ]
    return ", ".join(often[:5]) + (f" and {len(often) - 5} more" if len(often) > 5 else "")
