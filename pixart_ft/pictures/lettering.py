"""Fonts for any script: the installed font that has a text's letters, and escapes for those that none has."""

import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont

# fonts of boxes, and matplotlib's of mathematical signs, whose codes are not those of Unicode
_NOT_FOR_TEXT = ("last resort", ".lastresort", "adobe blank", "cm", "stix")


@cache
def font_of(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels."""
    return ImageFont.truetype(path, size)


def fitting(text: str) -> tuple[str, str]:
    """The file of the font to write `text` with, and the text as that font can write it.

    DejaVu Sans, which matplotlib brings along, where that has every letter; else the installed font with most of them,
    if that has half of those which DejaVu lacks. What the font lacks is escaped, as \\u72ac, or left out where it has
    no shape of its own.
    """
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    path = dejavu_sans()
    if lacking := wanted - _letters(path):
        best = max((path, *_installed()), key=lambda file: len(wanted & _letters(file)))  # the first of the best
        path = best if 2 * len(lacking & _letters(best)) >= len(lacking) else path
    lacking = wanted - _letters(path)
    return path, "".join(_escaped(letter) if ord(letter) in lacking else letter for letter in text)


@cache
def dejavu_sans() -> str:
    """The font that is always there."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _escaped(letter: str) -> str:
    shapeless = unicodedata.category(letter) in ("Cf", "Mn")  # joiners, variation selectors, marks
    return "" if shapeless else letter.encode("ascii", "backslashreplace").decode()


@cache
def _installed() -> tuple[str, ...]:
    """The installed fonts for text, upright ones of normal weight first."""
    from matplotlib.font_manager import fontManager

    fonts = [font for font in fontManager.ttflist if not font.name.lower().startswith(_NOT_FOR_TEXT)]
    fonts.sort(key=lambda font: (font.style != "normal", font.weight not in (400, "normal", "regular"), font.fname))
    return tuple(dict.fromkeys(font.fname for font in fonts))


@cache
def _letters(path: str) -> frozenset[int]:
    """The letters that a font has; none if it cannot be written with, such as coloured emoji of one size."""
    from matplotlib.ft2font import FT2Font

    try:
        font_of(path, 12)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
