"""Captions that are tags parted by commas, in other orders."""

import math
from dataclasses import replace

import torch

from pixart_ft.data.rows import Row
from pixart_ft.randomness import generator


def in_orders(row: Row, count: int, keep: int) -> Row:
    """The row with each of its captions in up to `count` orders, which share its draws alike; see `orders`."""
    found = [
        (text, share / len(texts))
        for caption, share in zip(row.captions, row.shares or (1.0,), strict=True)
        for texts in [orders(caption, count, keep)]
        for text in texts
    ]
    if len(found) == len(row.captions):
        return row
    return replace(row, others=tuple(text for text, _ in found[1:]), shares=tuple(share for _, share in found))


def orders(caption: str, count: int, keep: int) -> list[str]:
    """The caption as it is written, then its tags in others of their orders, `count` at most; each once.

    The first `keep` tags stay where they are. What comes is a function of the caption, so that runs of another seed
    share a cache; where there are no more than `count` orders, all of them come.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, free = tags[:keep], tags[keep:]
    found = {", ".join(tags): caption}
    for number in range(20 * count):  # equal tags and chance repeat an order
        if len(found) >= min(count, math.factorial(len(free))):
            break
        order = torch.randperm(len(free), generator=generator(0, number, f"tags of {caption}")).tolist()
        text = ", ".join([*kept, *(free[place] for place in order)])
        found.setdefault(text, text)
    return list(found.values())
