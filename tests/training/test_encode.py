"""Encoding by all processes of a run. Oracle: the cache that one process makes; what stands in its shards."""

import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pixart_ft.cli import main
from pixart_ft.config.train import TrainConfig, load_config
from pixart_ft.data.cache import _share
from pixart_ft.data.store import INDEX, TensorStore
from pixart_ft.errors import UserError
from pixart_ft.model import loading, vae
from pixart_ft.model.base import Base
from pixart_ft.training.encode import Encoded, encode_once, read_squares
from pixart_ft.training.processes import Together
from pixart_ft.training.start import accelerator_for
from tests.helpers.launched import launch
from tests.helpers.runs import Options, command, short_run


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path) -> Options:
    run = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")
    return run | {"validation.prompts": ["A hill", "a hill", "something else"]}


@pytest.fixture
def config(options: Options) -> TrainConfig:
    return load_config({}, options)


@pytest.fixture(scope="module")
def encoded(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `options`; read only."""
    folder = tmp_path_factory.mktemp("encoded")
    run = short_run(tiny, pictures, folder / "run", folder / "cache")
    encode(load_config({}, run | {"validation.prompts": ["A hill", "a hill", "something else"]}))
    return folder / "cache"


def encode(config: TrainConfig, prior: int = 0) -> Encoded:
    accelerator = accelerator_for(config)
    (size,) = config.data.resolution or ()
    with Together(accelerator):
        return encode_once(config, Base.read(config.model.base), *read_squares(config, size), accelerator, prior=prior)


def entries(folder: Path) -> list[str]:
    """The keys in all shards, one that is twice there twice."""
    found: list[str] = []
    for path in folder.glob("*.safetensors"):
        if path.name != INDEX:
            with safe_open(path, "pt") as shard:
                found += shard.keys()
    return sorted(found)


def with_cache(config: TrainConfig, folder: Path) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": folder})})


def assert_same(one: Path, other: Path) -> None:
    """The same tensors up to the rounding of other batches."""
    keys = entries(one)
    assert len(keys) == len(set(keys)) and entries(other) == keys
    ours, theirs = TensorStore(one), TensorStore(other)
    for key in keys:
        torch.testing.assert_close(ours.get(key), theirs.get(key), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_shares_of_the_work_are_all_of_it(count: int) -> None:
    lengths = {str(number): (7 * number) % 12 for number in range(12)}
    shares = [_share(list(lengths), (place, count), cost=lambda key: lengths[key]) for place in range(count)]
    assert sorted((key for share in shares for key in share), key=int) == list(lengths)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    costs = [sum(lengths[key] for key in share) for share in shares]
    assert max(costs) - min(costs) <= 11  # the largest
    assert all(share == sorted(share, key=int) for share in shares)


def test_two_processes_encode_each_thing_once(config: TrainConfig, tmp_path: Path) -> None:
    whole = encode(config)
    folder = tmp_path / "two"

    def body(rank: int) -> None:
        found = encode(with_cache(config, folder))
        assert len(found.train) == len(whole.train)
        for number in range(len(found.train)):
            for ours, theirs in zip(found.train.latents([number]), whole.train.latents([number]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    launched = launch(body, tmp_path)
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    assert_same(tmp_path / "cache", folder)
    assert (
        len([path for path in folder.glob("*.safetensors") if path.name != INDEX]) == 4
    )  # each process one of each stage


def test_machines_with_folders_of_their_own_encode_all_there(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(rank: int) -> None:
        monkeypatch.setattr(platform, "node", lambda: f"machine{rank}")
        encode(with_cache(config, tmp_path / f"of-{rank}"))

    launched = launch(body, tmp_path)
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    assert_same(tmp_path / "of-0", tmp_path / "of-1")


def nan_of(*numbers: int) -> Callable[..., torch.Tensor]:
    """The VAE's moments, but of some pictures they are NaN."""
    seen = 0
    whole = vae.encode_moments

    def moments(*given: Any, **more: Any) -> torch.Tensor:
        nonlocal seen
        found = whole(*given, **more)
        found[[at for at in range(len(found)) if seen + at in numbers]] = torch.nan
        seen += len(found)
        return found

    return moments


def test_pictures_without_latents_are_left_out_or_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the next run finds that in the cache."""
    rows, held = (part.rows for part in read_squares(config, 64))
    monkeypatch.setattr("pixart_ft.data.cache.encode_moments", nan_of(1))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"NaN or infinity .*: 1\n    .*\n.*\n  --data.strict false leaves them out"
        ):
            encode(config.model_copy(update={"data": config.data.model_copy(update={"strict": True})}))
        monkeypatch.setattr(loading, "load_vae", None)
    with pytest.warns(UserWarning, match=f"left out:\n.*NaN or infinity.*: 1\n    {rows[1].where}"):
        found = encode(config)
    assert found.learned == [0, *range(2, len(rows))] and len(found.train) == len(rows) - 1
    assert [len(part.x0) for part in found.held_out] == [len(held)]
    assert found.train.latents(range(len(rows) - 1))[0].isfinite().all()


@pytest.mark.parametrize(
    ("lost", "prior", "use"),
    [(range(4), 4, "trained on"), (range(4, 8), 4, "of the prior"), (range(8, 12), 0, "measured")],
)
def test_a_use_that_loses_all_its_pictures_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, lost: range, prior: int, use: str
) -> None:
    monkeypatch.setattr("pixart_ft.data.cache.encode_moments", nan_of(*lost))
    with pytest.raises(UserError, match=f"no picture that is {use} can be used:") as caught:
        encode(config, prior)
    assert "--data.strict" not in str(caught.value) and "another --data.cache" in str(caught.value)


def test_the_command_encodes_for_a_training_and_reads_through(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")
    line = command(options)
    assert main(["cache", *line]) == 0
    said = capsys.readouterr().out
    assert re.search(r"cache: (\d+) encodings, \1 of them made now\n", said) and "12 pictures" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loading, "load_vae", None)
    monkeypatch.setattr(loading, "load_text_encoder", None)
    assert main(["cache", *line]) == 0 and "0 of them made now" in capsys.readouterr().out
    assert main(["cache", "--verify", *line]) == 0 and "all as they were written" in capsys.readouterr().out
    elsewhere = str(tmp_path / "mistyped")
    assert main(["cache", "--verify", *command(options | {"data.cache": elsewhere})]) == 2
    assert f"there is no folder {elsewhere}" in capsys.readouterr().err
    path = max((tmp_path / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["cache", "--verify", *line]) == 2
    assert (
        f"damaged files, removed (the next run encodes anew what was in them): 1\n    {path}" in capsys.readouterr().err
    )


def kinds(folder: Path) -> tuple[int, int]:
    """How many pictures and how many captions a cache holds."""
    store = TensorStore(folder)
    shapes = [store.get(key).ndim for key in entries(folder)]
    return shapes.count(4), shapes.count(2)


@pytest.mark.parametrize(
    ("changed", "pictures_anew", "captions_anew"),
    [
        ("nothing", 0, 0),
        ("a caption", 0, 1),
        ("vae", 12, 0),
        ("text_encoder", 0, 15),
        ("tokenizer", 0, 15),
        ("data.max_tokens", 0, 15),
        ("data.resolution", 12, 0),
        ("model.text_encoder_dtype", 0, 15),
        ("model.text_encoder_quantization", 0, 15),
        ("the preparation of text", 0, 15),
    ],
)
def test_what_does_not_match_is_encoded_anew_and_nothing_else(
    changed: str, pictures_anew: int, captions_anew: int, options: Options, encoded: Path, tmp_path: Path
) -> None:
    """No training can read encodings of something else: their keys are of all that they depend on."""
    given = options | {"data.cache": shutil.copytree(encoded, tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        if changed in ("vae", "text_encoder", "tokenizer"):
            given["model.base"] = shutil.copytree(options["model.base"], tmp_path / "base")
            path = next((tmp_path / "base" / changed).glob("*config.json"))
            path.write_text(path.read_text() + "\n")
        elif changed == "a caption":
            given["data.folder"] = shutil.copytree(options["data.folder"], tmp_path / "pictures")
            metadata = tmp_path / "pictures" / "metadata.jsonl"
            metadata.write_text(metadata.read_text().replace(" on ", " upon ", 1))
        elif changed == "the preparation of text":
            patch.setattr("pixart_ft.data.cache.TEXT_PREPARATION", "another")
        elif changed != "nothing":
            if changed == "model.text_encoder_quantization":
                pytest.importorskip("bitsandbytes")
            others = {"data.max_tokens": 77, "data.resolution": 48, "model.text_encoder_quantization": "nf4"}
            given[changed] = others.get(changed, "bfloat16")
        encode(load_config({}, given))
    (pictures, captions), before = kinds(tmp_path / "cache"), kinds(encoded)
    assert before == (12, 15) and (pictures - 12, captions - 15) == (pictures_anew, captions_anew)
