"""Training from every kind of source. Oracle: the run from the folder that the pictures came from, bit for bit."""

import json
from pathlib import Path

import datasets
import pytest

from pixart_ft.data.folders import read_folder
from pixart_ft.data.rows import Row
from pixart_ft.training.encode import several_captions
from tests.helpers.packed import SHAPES, as_folder
from tests.helpers.runs import Options, assert_same_end, losses, short_run, train


@pytest.fixture(scope="module")
def options(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A run that draws nothing, of which each test says the pictures."""
    folder = tmp_path_factory.mktemp("sources")
    asked = short_run(tiny, pictures, folder / "run", folder / "cache") | {
        "validation.prompts": [],
        "train.batch_size": 2,
    }
    return {key: value for key, value in asked.items() if key not in ("data.folder", "data.held_out_fraction")}


@pytest.fixture(scope="module")
def plain(options: Options, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from a folder."""
    place = as_folder(read_folder(pictures)[:5], tmp_path_factory.mktemp("plain") / "pictures")
    return train(options, data__folder=place["folder"])


def shards(options: Options) -> set[str]:
    """What was encoded, by the names of its files."""
    return {path.name for path in Path(options["data.cache"]).glob("*.safetensors") if len(path.stem) == 64}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_source_trains_as_the_folder(
    shape: str, options: Options, plain: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of datasets")
    kept = shards(options)
    source = SHAPES[shape](read_folder(pictures)[:5], tmp_path / "pictures")
    assert_same_end(train(options, data__sources=[source], run__folder=tmp_path / "run"), plain)
    assert shards(options) == kept  # nothing was encoded anew


def test_repeats_and_captions_reach_the_draws(options: Options, pictures: Path, tmp_path: Path) -> None:
    """Twice the same folder is an epoch of each twice; a caption that no draw shows changes nothing, one that all show
    does."""
    rows = read_folder(pictures)[:2]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(row.content())
    lines = [{"file_name": f"{n}.png", "text": row.caption, "other": "a house"} for n, row in enumerate(rows)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    twice, both = {"folder": str(tmp_path), "repeats": 2}, {"folder": str(tmp_path), "caption": ["text", "other"]}

    def run(name: str, *sources: Options) -> list[dict[str, float]]:
        return losses(
            train(options, data__sources=list(sources), run__folder=tmp_path.parent / f"{tmp_path.name} {name}")
        )

    plain = {"folder": str(tmp_path)}
    assert run("twice", twice) == run("listed twice", plain, plain)
    once = run("once", plain)
    assert run("seldom", both | {"caption_weights": [1000.0, 0.001]}) == once
    assert (
        run("other", both | {"caption_weights": [0.001, 1000.0]}) == run("alone", plain | {"caption": "other"}) != once
    )


def test_every_caption_reaches_the_draws_of_its_own_picture() -> None:
    """Texts are a, d, e and then b, c, f."""
    thirds, halves = (0.5, 0.25, 0.25), (0.5, 0.5)
    rows = [
        Row(Path("1"), "a", "1", ("b", "c"), thirds),
        Row(Path("2"), "d", "2"),
        Row(Path("3"), "e", "3", ("f",), halves),
    ]
    assert several_captions(rows) == {0: ((0, 3, 4), thirds), 2: ((2, 5), halves)}
