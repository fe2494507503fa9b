"""Masks of pictures in every kind of source. Oracle: what was painted."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from pixart_ft.config.sources import PictureSource
from pixart_ft.data.cache import area_of
from pixart_ft.data.folders import survey as survey_folder
from pixart_ft.data.pixels import Fit, read_mask
from pixart_ft.data.rows import Account, Row
from pixart_ft.data.seen import Seen, look_at
from pixart_ft.data.sources import survey_source
from tests.helpers.packed import write_tar

LEFT = Image.new("L", (64, 32))  # of which the left half is white
LEFT.paste(255, (0, 0, 32, 32))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def painted(colour: str, alpha: Image.Image | None = None) -> bytes:
    picture = Image.new("RGB", (64, 32), colour)
    if alpha is not None:
        picture.putalpha(alpha)
    return png(picture)


def as_folder(folder: Path) -> dict[str, Any]:
    (folder / "masks").mkdir(parents=True)
    lines = [{"file_name": "a.png", "text": "a", "where": "masks/a.png"}, {"file_name": "b.png", "text": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, content in {"a": painted("red"), "b": painted("blue"), "masks/a": png(LEFT)}.items():
        (folder / f"{name}.png").write_bytes(content)
    return {"folder": str(folder), "mask": "where"}


def as_alpha(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for name, content in {"a": painted("red", LEFT), "b": painted("blue")}.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text(name)
    return {"folder": str(folder), "mask": "alpha"}


def as_parquet(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    cells = {"image": [painted("red"), painted("blue")], "text": ["a", "b"], "where": [png(LEFT), None]}
    datasets.Dataset.from_dict(cells).to_parquet(folder / "a.parquet")
    return {"parquet": str(folder), "mask": "where"}


def as_tars(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    red = {"png": painted("red"), "where.png": png(LEFT), "txt": b"a"}
    write_tar(folder / "a.tar", {"a": red, "b": {"png": painted("blue"), "txt": b"b"}})
    return {"webdataset": str(folder), "mask": "where.png"}


def as_tars_in_capitals(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    red = {"PNG": painted("red"), "Where.PNG": png(LEFT), "Says": b"a"}
    write_tar(folder / "a.tar", {"a": red, "b": {"png": painted("blue"), "json": b'{"Says": "b"}'}})
    return {"webdataset": str(folder), "image": "Png", "mask": "WHERE.png", "caption": "Says"}


def survey(asked: dict[str, Any]) -> Account:
    return survey_source(PictureSource(**asked), "data.sources[0]")


@pytest.mark.parametrize("shape", [as_folder, as_alpha, as_parquet, as_tars, as_tars_in_capitals])
def test_masks_come_with_their_pictures(shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is no picture; where there is none, all of the picture is trained on."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of datasets")
    asked = shape(tmp_path / "pictures")
    account = survey(asked)
    masked, whole = account.usable()
    assert account.pictures == 2 and [row.caption for row in account.rows] == ["a", "b"]
    found = masked.shown()
    assert found is not None and found.tobytes() == LEFT.tobytes()
    everything = whole.shown()
    assert (everything is None) == (asked["mask"] != "alpha")
    assert everything is None or everything.getextrema() == (255, 255)
    assert all(isinstance(one, Seen) for one in look_at(account.rows))


def test_a_mask_is_cut_as_its_picture_and_falls_on_the_latents(tmp_path: Path) -> None:
    masked, _ = survey(as_folder(tmp_path / "pictures")).rows

    def columns(fit: Fit) -> list[float]:
        width, height = fit.size
        area = area_of(masked, fit, torch.empty(4, height // 8, width // 8))
        assert (area == area[0, 0]).all()
        return [round(float(part), 2) for part in area[0, 0]]

    assert columns(Fit((64, 32))) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert columns(Fit((64, 32), mirrored=True)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert columns(Fit((32, 32))) == [1, 1, 0, 0]
    assert columns(Fit((32, 32), at=0.0)) == [1, 1, 1, 1] and columns(Fit((32, 32), at=0.25)) == [1, 1, 1, 0]
    assert columns(Fit((32, 32), at=None)) == pytest.approx([1, 1, 0, 0], abs=0.02)  # squeezed, so a little blurred


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    asked = as_folder(tmp_path / "pictures")
    mask, table = tmp_path / "pictures" / "masks" / "a.png", tmp_path / "pictures" / "metadata.jsonl"
    for content, words in (
        (png(LEFT.resize((32, 32))), "a mask of (32, 32) pixels for"),
        (png(Image.new("L", (64, 32))), "a mask that leaves nothing of"),
        (b"no picture", "cannot identify it as a picture"),
    ):
        mask.write_bytes(content)
        found, other = look_at(survey(asked).rows)
        assert isinstance(found, str) and words in found and "a.png" in found and isinstance(other, Seen)
    mask.unlink()
    absent = survey(asked).wrong["rows of metadata.jsonl that name an absent mask"]
    assert absent == ["metadata.jsonl line 1: masks/a.png"]
    table.write_text(table.read_text().replace("where", "mask"))
    assert 'write where instead of "mask"' not in str(survey(asked).wrong)
    assert "columns that metadata.jsonl lacks" in survey(asked).wrong and survey(asked).rows == []


@pytest.mark.parametrize("mask", ["a.png", "b.png", 5])
def test_what_is_no_mask_is_named_and_its_picture_left_out(mask: str | int, tmp_path: Path) -> None:
    """A picture of its own, or a number; the picture that it would take away is there all the same."""
    asked = as_folder(tmp_path / "pictures")
    said = (("a", "a", mask), ("b", "b", ""), ("masks/a", "c", None))
    lines = [{"file_name": f"{name}.png", "text": text, "where": where} for name, text, where in said]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = survey_folder(tmp_path / "pictures", PictureSource(**asked))
    assert report.pictures == 3 and [row.caption for row in report.rows] == ["b", "c"]
    ((kind, items),) = report.wrong.items()
    assert "mask" in kind and str(mask) in items[0]


@pytest.mark.parametrize("shape", [as_folder, as_parquet, as_tars])
def test_a_source_none_of_whose_pictures_has_the_masks_asked_for_is_not_used(
    shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all of them would be trained on whole, after a warning at most."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of datasets")
    asked = shape(tmp_path / "pictures") | {"mask": "wear"}
    account = survey(asked)
    assert account.rows == [] and any("wear" in "".join([kind, *items]) for kind, items in account.wrong.items())


def test_what_is_cut_out_of_a_mask_does_not_count(tmp_path: Path) -> None:
    """White everywhere, as some programs leave it where it is transparent."""
    white = Image.new("RGB", LEFT.size, "white")
    white.putalpha(LEFT)
    palette = LEFT.convert("RGB").quantize(2)
    for mask in (white, LEFT.convert("1"), palette, LEFT.convert("RGBA")):
        assert read_mask(tmp_path, png(mask), alpha=False).tobytes() == LEFT.tobytes()


def test_what_is_held_out_has_no_mask() -> None:
    with pytest.raises(ValueError, match="measured whole"):
        PictureSource(folder="x", use="held_out", mask="alpha")


def test_rows_of_equal_pictures_and_other_masks_have_other_names(tmp_path: Path) -> None:
    for name in ("a", "m", "n"):
        (tmp_path / f"{name}.png").write_bytes(painted("red" if name == "a" else "white"))
    (tmp_path / "n.png").write_bytes(png(LEFT))
    rows = [Row(tmp_path / "a.png", "a", "a", mask=mask) for mask in (None, tmp_path / "m.png", tmp_path / "n.png")]
    assert len({row.digest(row.content()) for row in rows}) == 3
