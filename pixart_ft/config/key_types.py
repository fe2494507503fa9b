"""What a key of a configuration accepts: in words for messages, and read from what was typed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from pixart_ft.config import yaml_text


def expected(field: FieldInfo) -> str:
    """What a key accepts, in words: `integer >= 1`, `ddim | ddpm`, `[text, ...]`, `path or null`."""
    words = _type_words(field.annotation)
    if _is_pair(field):
        return "two numbers LOW HIGH" + (", or null" if words.endswith(" or null") else "")
    bounds = _bound_words(field.metadata)
    if not bounds:
        return words
    plain = words.removesuffix(" or null")
    return f"{plain} {bounds}" + (", or null" if plain != words else "")


def is_empty(value: object) -> bool:
    """Whether a value is a text of nothing but white space, or a list that holds one."""
    texts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(text, str) and not text.strip() for text in texts)


def parse_override(text: object, field: FieldInfo) -> Any:
    """The value that a text means where this key is asked for. Raises ValueError for what cannot be read."""
    optional = NoneType in get_args(field.annotation)
    if isinstance(text, list) and item_of(field) not in _TEXTS:  # of an option that was given several times
        each = [parse_override(item, field) for item in text]
        return [part for one in each for part in (one if isinstance(one, list) and holds_numbers(field) else [one])]
    if not isinstance(text, str) or is_empty(text):
        return text
    if optional and text == "null":
        return None
    if item_of(field) in _TEXTS:
        return _parse_texts(text)
    if holds_numbers(field) and "," in text and not text.lstrip().startswith("["):
        return yaml_text.parse(f"[{text}]")
    words = _type_words(field.annotation).removesuffix(" or null")
    return text if words in _TEXTS else yaml_text.parse(text)


def _parse_texts(text: str) -> Any:
    """A list of texts as typed: one text as it is, or several in brackets, as the shell has left them."""
    if not text.lstrip().startswith("["):
        return text
    try:
        values = yaml_text.parse(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(
            'the shell takes quotation marks away: put the whole list in single ones, as \'["a cat", "a dog"]\''
        )
    return values


def item_of(field: FieldInfo) -> str | None:
    """What a list holds, in words; None for a key that is no list."""
    parts = (field.annotation, *get_args(field.annotation))
    return next((_type_words(get_args(part)[0]) for part in parts if get_origin(part) is tuple), None)


def holds_numbers(field: FieldInfo) -> bool:
    """Whether a key is a list of numbers."""
    return (item_of(field) or "").startswith((_WORDS[int], _WORDS[float]))


def inside(field: FieldInfo) -> Mapping[str, FieldInfo]:
    """The keys of each item, where a key is a list of mappings."""
    items = get_args(field.annotation) if get_origin(field.annotation) is tuple else ()
    return getattr(items[0], "model_fields", {}) if items else {}


def _is_pair(field: FieldInfo) -> bool:
    """Whether the key is a list of exactly two."""
    bounds = [getattr(bound, name, None) for bound in field.metadata for name in ("min_length", "max_length")]
    return [bound for bound in bounds if bound is not None] == [2, 2]


_SIGNS = {
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "a multiple of {}",
    "min_length": "(not empty)",
    "max_length": "(at most {})",
}
_TEXTS = ("text", "path")
_WORDS = {int: "integer", float: "number", str: "text", bool: "true | false", Path: "path", NoneType: "null"}


def _bound_words(metadata: Iterable[Any]) -> str:
    limits = ((sign, getattr(bound, name, None)) for bound in metadata for name, sign in _SIGNS.items())
    return ", ".join(sign.format(_plain_number(limit)) for sign, limit in limits if limit is not None)


def _plain_number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _type_words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for part in inner[1:] for bound in getattr(part, "metadata", ())]
        return f"{_type_words(inner[0])} {_bound_words(bounds)}".strip()
    if origin is Literal:
        return " | ".join(inner)
    if origin is dict:
        return "{key: value, ...}"
    if origin is tuple:
        return f"[{_type_words(inner[0])}, ...]"
    if item := getattr(annotation, "model_fields", None):
        return f"{{{', '.join(item)}}}"
    if inner:  # a union with None
        return " or ".join(_type_words(part) for part in inner)
    return _WORDS[annotation]
