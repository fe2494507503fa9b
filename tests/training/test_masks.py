"""Training by masks. Oracles: the same run without them; live encoding."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pixart_ft.data.folders import read_folder
from pixart_ft.training.batches import Batch, TrainingSet, draw_batch
from pixart_ft.training.encode import encode_once
from pixart_ft.training.start import accelerator_for, look
from tests.helpers.runs import Options, configured, losses, short_run, train


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path) -> Options:
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")
    del options["data.folder"]
    return options | {"validation.prompts": [], "data.held_out_fraction": 0.0, "adapter.dropout": 0.0}


def with_alpha(pictures: Path, folder: Path, opaque: int) -> dict[str, Any]:
    """Pictures of which the left part is opaque, so many pixels; black everywhere else."""
    folder.mkdir()
    for row in read_folder(pictures)[:6]:
        picture = row.opened().picture
        alpha = Image.new("L", picture.size)
        alpha.paste(255, (0, 0, opaque, picture.height))
        picture.putalpha(alpha)
        picture.save(folder / row.name)
        (folder / row.name).with_suffix(".txt").write_text(row.caption)
    return {"folder": str(folder)}


def test_a_mask_that_leaves_all_changes_nothing_and_another_does(
    options: Options, pictures: Path, tmp_path: Path
) -> None:
    """To rounding, 1e-5 of a loss."""
    whole, half = with_alpha(pictures, tmp_path / "whole", 10_000), with_alpha(pictures, tmp_path / "half", 32)

    def run(name: str, source: dict[str, Any]) -> list[float]:
        return [step["loss"] for step in losses(train(options, data__sources=[source], run__folder=tmp_path / name))]

    plain = run("plain", whole)
    assert run("all", whole | {"mask": "alpha"}) == pytest.approx(plain, rel=1e-5)
    masked = run("left", half | {"mask": "alpha"})
    assert masked != pytest.approx(run("unmasked", half), rel=1e-3) and all(loss > 0 for loss in masked)


def test_areas_are_cached_as_they_are_live_beside_pictures_without(
    options: Options, pictures: Path, tmp_path: Path
) -> None:
    masked = with_alpha(pictures, tmp_path / "masked", 20) | {"mask": "alpha"}
    options |= {"data.sources": [masked, with_alpha(pictures, tmp_path / "plain", 20)], "data.flip": True}
    batches: list[Batch] = []
    for live in (False, True):
        config = configured(options, data__live=live)
        start = look(config, None)
        facts = start.facts(config, "cpu", 1)
        assert any(line.startswith("masks") and "6 of 12 pictures" in line for line in facts)
        encoded = encode_once(config, start.base, start.learned, start.held, accelerator_for(config))
        data = TrainingSet(encoded.train, encoded.scale, encoded.null_caption, masked=True)
        batches.append(draw_batch(data, range(24), start.laws, global_batch=4, num_steps=1000))
    cached, at_hand = (batch.area for batch in batches)
    assert cached is not None and at_hand is not None and torch.equal(cached, at_hand)
    columns = cached[:, 0, 0]  # of 8 pixels: the left 20 of 64 are 2.5 of 8
    kinds = {tuple(round(float(part), 1) for part in one) for one in columns}
    left = (1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert kinds == {(1.0,) * 8, left, left[::-1]}


def test_masks_that_leave_all_are_not_counted(options: Options, pictures: Path, tmp_path: Path) -> None:
    """Alpha is asked for, and no picture is transparent anywhere."""
    source = with_alpha(pictures, tmp_path / "whole", 10_000) | {"mask": "alpha"}
    config = configured(options, data__sources=[source])
    (told,) = [line for line in look(config, None).facts(config, "cpu", 1) if line.startswith("masks")]
    assert told == "masks              0 of 6 pictures are trained on where theirs are white"


def test_a_mask_that_the_crop_leaves_nothing_of_is_told(options: Options, tmp_path: Path) -> None:
    """Also of pictures that were seen before; a crop that shows a part of it will do."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for name, left in (("a", 0), ("b", 60)):
        picture = Image.new("RGBA", (128, 32))
        picture.paste("red", (left, 0, left + 20, 32))
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    options |= {"data.sources": [{"folder": str(folder), "mask": "alpha"}], "train.batch_size": 1}

    def told(remember: bool = False, **more: Any) -> list[str]:
        config = configured(options, **more)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            start = look(config, None, accelerator_for(config) if remember else None)
            start.warn(start.overview(config.data), config)
        return [str(one.message) for one in found if "teach nothing" in str(one.message)]

    for remember in (True, False):
        (only,) = told(remember)
        assert ": 1\n" in only and "a.png" in only
    assert told(data__aspect="buckets") == told(data__crop="random") == []
