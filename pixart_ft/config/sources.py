"""Where the pictures of a training come from: the keys of an item of data.sources."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pixart_ft.config.reading import Section


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Source = Annotated[str, AfterValidator(os.path.expanduser)]  # a folder, or a name such as "demo" or a Hub id
Names = Annotated[tuple[Source, ...], BeforeValidator(_listed)]
Use = Literal["train", "held_out", "prior"]
ALPHA = "alpha"  # of mask: the picture's own transparency
KINDS = ("folder", "dataset", "parquet", "webdataset")


class PictureSource(Section):
    """Pictures from one place.

    folder           of pictures with captions, or "demo"
    dataset          a Hub id, or a folder of the library `datasets`; its split, subset and revision
    parquet          files with a column of pictures; * stands for anything, a folder for all in it
    webdataset       tar files with a picture and its caption under one name; likewise
    image            the column of the pictures: of a folder's table file_name, of the others image; of tar files how
                     the pictures' names end, which is only needed where a name has several
    caption          the column of the captions, or several: each is a caption of the picture. () = text, or caption
    caption_weights  how much more often a caption of each column is shown than of another; () = alike
    repeats          how often an epoch shows each picture
    weight           in place of repeats: the share of the draws, by the sum of the weights of all
    use              what for: trained on, measured alone, or what the base must not forget
    background       the colour behind transparent pictures
    mask             alpha: a picture is trained on where it is not transparent; or the column of grey pictures as
                     large, or of their file names, white where it is; of tar files how their names end
    """

    folder: Source | None = None
    dataset: Source | None = None
    parquet: Names = ()
    webdataset: Names = ()
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    image: Annotated[str, Field(min_length=1)] | None = None
    caption: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    caption_weights: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] = ()
    repeats: int = Field(1, ge=1, le=1000)
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    use: Use = "train"
    background: str = "white"
    mask: Annotated[str, Field(min_length=1)] | None = None

    @property
    def mask_column(self) -> str | None:
        """The column of the masks, where there is one."""
        return None if self.mask == ALPHA else self.mask

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """All that its keys may not say together, in one ValueError."""
        faults = []
        kinds = [kind for kind in KINDS if getattr(self, kind)]
        if len(kinds) != 1:
            faults.append(f"it names {' and '.join(kinds) or 'no place'}; give one of {', '.join(KINDS)}")
        if kinds and kinds != ["dataset"]:
            own = {"split": "train", "subset": None, "revision": None}
            asked = [key for key, usual in own.items() if getattr(self, key) != usual]
            faults += [f"{key} is for dataset alone; leave it out" for key in asked]
        if self.caption_weights and len(self.caption_weights) != len(self.caption):
            faults.append(f"{len(self.caption_weights)} caption_weights for {len(self.caption)} columns of caption")
        if self.weight is not None and self.repeats > 1:
            faults.append("repeats and weight both say how often it is shown; give one")
        if self.use == "held_out" and (self.weight is not None or self.repeats > 1):
            faults.append("what is held out is measured once; leave repeats and weight out")
        if self.use == "held_out" and self.mask:
            faults.append("what is held out is measured whole; leave mask out")
        if not _is_colour(self.background):
            faults.append(f'background is "{self.background}"; expected a colour such as white or "#808080"')
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _is_colour(text: str) -> bool:
    from PIL import ImageColor

    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False
