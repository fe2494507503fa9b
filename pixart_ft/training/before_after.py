"""The sheet of a run's prompts before the training and after it, beside the real pictures of the same captions."""

from collections.abc import Mapping, Sequence

from PIL import Image

from pixart_ft.data.rows import Row
from pixart_ft.model.text import prepare_text
from pixart_ft.pictures.sheets import grid, stacked

LEARNED, HELD_OUT = "captions of pictures it learned from", "captions of pictures held out, which it never saw"
_OTHERS = "other prompts"
_COLUMNS = 8  # of a band: more would be small where the sheet is shown as wide as a page


def before_after(
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    rows: Mapping[str, Sequence[Row]],
    *,
    label: str = "before",
) -> Image.Image:
    """One picture of every prompt before and after, and below them the real one where a row has this caption.

    rows: those of the pictures, by a heading for what they are to the run; a prompt stands under the first that has
    its caption, and under "other prompts" else. Where no prompt has a picture, the sheet has no headings. `label` names
    the row of before. At most eight prompts stand side by side.
    """
    bands = []
    for heading, numbers in _headed(prompts, rows).items():
        pictures = _by_caption(rows.get(heading, ()))
        for start in range(0, len(numbers), _COLUMNS):
            chosen = numbers[start : start + _COLUMNS]
            shown = {label: [before[i] for i in chosen], "after": [after[i] for i in chosen]}
            if pictures:
                shown["real"] = [pictures[prepare_text(prompts[i])].opened().picture for i in chosen]
            bands.append(
                grid(
                    list(shown.values()),
                    title=None if start else heading,
                    row_labels=list(shown),
                    column_labels=[prompts[i] for i in chosen],
                    cell=max(before[chosen[0]].size),
                )
            )
    return stacked(bands)


def _by_caption(rows: Sequence[Row]) -> dict[str, Row]:
    """The first row with every caption."""
    return {prepare_text(caption): row for row in reversed(rows) for caption in row.captions}


def _headed(prompts: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> dict[str, list[int]]:
    """The numbers of the prompts under each heading, in order; all under "" where none has a picture."""
    captions = {heading: set(_by_caption(each)) for heading, each in rows.items()}
    found: dict[str, list[int]] = {heading: [] for heading in (*captions, _OTHERS)}
    for number, prompt in enumerate(prompts):
        heading = next((h for h, texts in captions.items() if prepare_text(prompt) in texts), _OTHERS)
        found[heading].append(number)
    if len(found[_OTHERS]) == len(prompts):
        return {"": found[_OTHERS]}
    return {heading: numbers for heading, numbers in found.items() if numbers}
