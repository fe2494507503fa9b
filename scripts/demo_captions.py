"""What the demo's base learns: things in several styles, each with the captions that may stand for it.

A caption is the thing's name or a synonym, with the style's word behind a comma; without a word it means Noto. Some
things are held out of one style each, so that "this thing in a style it was never seen in" can be looked at.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from demo_pictures import FAMILIAR, STYLES, Emoji, held_out_things

PLAIN_STYLE = "noto"  # what a caption without a style's word means
BARE_SHARE, SYNONYM_SHARE = 0.5, 0.15  # of a Noto picture's captions; of every picture's that has synonyms
HELD_OUT_SHARE = 0.1
# Familiar things that at least so many of the styles draw are what the base is to know well; the rest is drawn less
# often: five styles of 1,400 names are much for so small a network.
FAMILIAR_STYLES = 4
SELDOM, SELDOM_AT_LAST = 0.3, 0.1  # how often, relative to those: from nothing, and to finish a model
PLAIN_AT_LAST = 0.6  # of the familiar things in Noto, which the shipped model knew best
# Fixed before any training, all of them in every style: what a stranger is asked to name.
EYE_NAMES = (
    "rocket",
    "hamburger",
    "umbrella",
    "mushroom",
    "sailboat",
    "tulip",
    "light bulb",
    "honeybee",
    "guitar",
    "birthday cake",
    "crown",
    "octopus",
    "house",
    "tomato",
    "key",
    "fish",
)


@dataclass(frozen=True)
class Example:
    """A picture of the base's set: which thing, in which style, and its captions with their shares (sum 1)."""

    code: str
    name: str
    style: str
    captions: tuple[tuple[str, float], ...]
    frequency: float  # how often it is drawn, relative to the others


def captions_of(name: str, style: str, synonyms: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The captions of one picture and how often each stands for it."""
    word = STYLES[style].word
    texts = [(name, 1.0 if not synonyms else 1 - SYNONYM_SHARE)]
    texts += [(synonym, SYNONYM_SHARE / len(synonyms)) for synonym in synonyms]
    if style != PLAIN_STYLE:
        return tuple((f"{text}, {word}", share) for text, share in texts)
    bare = [(text, share * BARE_SHARE) for text, share in texts]
    return tuple(bare + [(f"{text}, {word}", share * (1 - BARE_SHARE)) for text, share in texts])


def examples(
    sets: Mapping[str, Sequence[Emoji]], synonyms: Mapping[str, Sequence[str]], *, finishing: bool = False
) -> list[Example]:
    """Every picture of every style, in the order of `sets`; held-out ones too (see `held_out`)."""
    drawn = Counter(emoji.code for emojis in sets.values() for emoji in emojis)

    def frequency(emoji: Emoji, style: str) -> float:
        if emoji.group not in FAMILIAR or drawn[emoji.code] < FAMILIAR_STYLES:
            return SELDOM_AT_LAST if finishing else SELDOM
        return PLAIN_AT_LAST if finishing and style == PLAIN_STYLE else 1.0

    return [
        Example(
            emoji.code,
            emoji.name,
            style,
            captions_of(emoji.name, style, synonyms.get(emoji.code, ())),
            frequency(emoji, style),
        )
        for style, emojis in sets.items()
        for emoji in emojis
    ]


def held_out(pictures: Sequence[Example], path: Path) -> set[int]:
    """The rows that train nothing: a tenth of the things that have three styles or more, each out of one of them.

    Chosen with a fixed seed and written to `path` for whoever looks at the base later.
    """
    rows: dict[str, list[int]] = {}
    for row, example in enumerate(pictures):
        rows.setdefault(example.code, []).append(row)
    many = [code for code, each in rows.items() if len(each) >= 3 and pictures[each[0]].name not in EYE_NAMES]
    generator = np.random.default_rng(3)
    chosen = {int(generator.choice(rows[code])) for code in sorted(held_out_things(many, HELD_OUT_SHARE, seed=2))}
    listed = [
        {"name": p.name, "style": p.style, "code": p.code, "familiar": p.frequency > SELDOM}
        for p in (pictures[i] for i in sorted(chosen))
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in listed))
    return chosen
