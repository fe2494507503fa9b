"""Every file that is read, damaged in every way: one message for the user, or recovery, and never a traceback.

Oracle: `UserError` (the command's exit code 2), or for a memory such as the cache the result of an undamaged one.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.files import Adapter
from pixart_ft.data.cache import TensorStore, component_id
from pixart_ft.data.folders import read_folder
from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.pictures.own import check_own
from pixart_ft.pictures.recipes import RECIPE_KEY, read_recipe
from pixart_ft.pictures.sheets import save_png
from pixart_ft.runs.folder import RunFolder
from tests.helpers.adapters import make_adapter

DEEP = b"[" * 100_000 + b"]" * 100_000
GARBAGE = bytes(range(256)) * 4


def damages(whole: bytes) -> dict[str, bytes | None]:
    """What may stand in a file's place; None is a folder."""
    return {
        "empty": b"",
        "list": b"[]",
        "object": b"{}",
        "number": b"7",
        "null": b"null",
        "deep": DEEP,
        "garbage": GARBAGE,
        "half": whole[: len(whole) // 2],
        "folder": None,
    }


def put(path: Path, content: bytes | None) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def survives(read: Callable[[], object], path: Path) -> list[str]:
    """The names of the damages to `path` that `read` does not mind; any other exception than UserError goes on."""
    whole = path.read_bytes()
    fine = []
    try:
        for name, content in damages(whole).items():
            put(path, content)
            with suppress(UserError):
                read()
                fine.append(name)
    finally:
        put(path, whole)
    read()  # and the whole one is read again
    return fine


def retyped(path: Path, read: Callable[[], object]) -> None:
    """Every key of a JSON file with a value of every other type."""
    text = path.read_text()
    whole = json.loads(text)
    try:
        for key in whole:
            value: object
            for value in (None, [], "text", -0.5, 10**30):
                path.write_text(json.dumps(whole | {key: value}))
                with suppress(UserError):
                    read()
    finally:
        path.write_text(text)


# A base

CONFIGURATIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)
LOADERS: dict[str, Callable[[str], object]] = {
    "transformer": lambda base: loading.load_transformer(Base.read(base), dtype=torch.float32),
    "vae": lambda base: loading.load_vae(Base.read(base), dtype=torch.float32),
    "text_encoder": lambda base: loading.load_text_encoder(Base.read(base), dtype=torch.float32),
    "tokenizer": lambda base: loading.load_text_encoder(Base.read(base), dtype=torch.float32),
}


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny, tmp_path_factory.mktemp("damage") / "base"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_base_whose_configuration_is_damaged(base: Path, name: str) -> None:
    def read() -> Base:
        return Base.read(base)

    fine = survives(read, base / name)
    assert fine == (["object"] if name.startswith("text_encoder") else [])  # nothing is asked of it here; T5 refuses it
    retyped(base / name, read)


def test_layers_that_no_network_has_are_refused_by_diffusers_in_our_words(base: Path) -> None:
    path = base / "transformer" / "config.json"
    whole = json.loads(path.read_text())
    wrong: dict[str, Any]
    refused: list[str] = []
    for wrong in ({"activation_fn": 7}, {"norm_type": []}, {"attention_head_dim": 3}, {"norm_eps": "text"}):
        path.write_text(json.dumps(whole | wrong))
        try:
            loading.skeleton(Base.read(base))
        except UserError:  # which of them diffusers minds is its own matter; no other error may come out
            refused += wrong
    path.write_text(json.dumps(whole))
    assert "activation_fn" in refused


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_base_whose_weights_or_words_are_damaged(base: Path, name: str) -> None:
    load = LOADERS[name.partition("/")[0]]
    assert survives(lambda: load(str(base)), base / name) == []


class Bomb:
    """Runs a command where it is unpickled as pickle likes."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/pytorch_model.bin",
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
    ],
)
def test_pickled_weights_run_nothing(base: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    part = name.partition("/")[0]
    for weights in (folder / part).glob("*.safetensors"):
        weights.unlink()
    for content in (pickle.dumps({"weight": Bomb(tmp_path / "ran")}), GARBAGE, b""):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot load {part} of"):
            LOADERS[part](str(folder))
    torch.save({"weight": Bomb(tmp_path / "ran")}, folder / name)
    with pytest.raises(UserError, match=f"cannot load {part} of"):
        LOADERS[part](str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_words_is_refused(base: Path, tmp_path: Path) -> None:
    """transformers would make one of its special words alone, and every text would be unknown."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model\.base: .*tokenizer holds neither tokenizer\.json nor spiece\.model"):
        LOADERS["tokenizer"](str(folder))


# An adapter


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One from before there were manifests, so that all that is read judges what it reads."""
    folder = make_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")
    (folder / "manifest.json").unlink()
    return folder


@pytest.mark.parametrize(
    "name", ["pixart_ft.json", "adapter_config.json", "adapter_model.safetensors", "null_caption.safetensors"]
)
def test_an_adapter_that_is_damaged(base: Path, adapter: Path, name: str) -> None:
    def read() -> None:
        transformer = loading.load_transformer(Base.read(base), dtype=torch.float32)
        load_adapter(transformer, Adapter.read(adapter))

    assert survives(read, adapter / name) == []


@pytest.mark.parametrize("name", ["pixart_ft.json", "adapter_config.json"])
def test_an_adapter_whose_words_are_of_other_types(adapter: Path, name: str) -> None:
    from pixart_ft.adapters.files import read_settings
    from pixart_ft.runs.metadata import read_metadata

    retyped(adapter / name, lambda: (read_metadata(adapter), read_settings(adapter)))
    whole = (adapter / "adapter_config.json").read_text()
    for wrong in (
        {"r": 3_000_000},
        {"target_modules": ["to_q", 7]},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.5},
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(json.loads(whole) | wrong))
        with pytest.raises(
            UserError, match=r"adapter: cannot read .*adapter_config\.json: .* is .*; copy the adapter again"
        ):
            read_settings(adapter)
    (adapter / "adapter_config.json").write_text(whole)


def test_a_file_of_tensors_without_the_null_caption(base: Path, adapter: Path) -> None:
    path = adapter / "null_caption.safetensors"
    whole = path.read_bytes()
    for tensors in ({"other": torch.zeros(1, 32)}, {"null_caption": torch.zeros(32)}):
        path.write_bytes(save(tensors))
        with pytest.raises(UserError, match=r"null_caption\.safetensors: it holds no null_caption"):
            load_adapter(loading.load_transformer(Base.read(base), dtype=torch.float32), Adapter.read(adapter))
    path.write_bytes(whole)


# What is only remembered: recomputed, with a warning where that takes long


@pytest.mark.filterwarnings("ignore:the cache file")
def test_a_cache_whose_shard_is_damaged(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.add({"key": torch.ones(3)})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for content in damages(whole).values():
        put(path, content)
        assert TensorStore(tmp_path).missing(["key"]) == ["key"]
    put(path, whole)
    assert not TensorStore(tmp_path).missing(["key"])


def test_a_shard_whose_name_is_right_and_whose_content_is_none(tmp_path: Path) -> None:
    import hashlib

    for content in (b"", b"[]", GARBAGE):
        path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged: removed, to be encoded again"):
            TensorStore(tmp_path)
        assert not path.exists()


def test_a_memo_of_hashes_that_is_damaged(base: Path, tmp_path: Path) -> None:
    memo = tmp_path / "files.json"

    def name() -> str:
        return component_id(base, "vae", dtype=torch.float32, memo=memo)

    right = name()
    whole = json.loads(memo.read_text())
    for content in damages(memo.read_bytes()).values():
        put(memo, content)
        assert name() == right
    put(memo, b"")
    for wrong in (5, [], "text", [1, 2], [None, None, None], {"a": 1}):
        memo.write_text(json.dumps(dict.fromkeys(whole, wrong)))
        assert name() == right
    some = next(iter(whole.values()))
    memo.write_text(json.dumps({path: [*some[:2], 12] for path in whole}))
    assert name() == right


@pytest.mark.filterwarnings("ignore:passed over a broken checkpoint")
def test_a_checkpoint_whose_manifest_is_damaged(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", resume=False)
    path = run.save(1, lambda aside: (aside / "a").write_text("a")) / "manifest.json"
    whole = path.read_bytes()
    for content in [*damages(whole).values(), b'{"a": 3}', b'{"a": [1]}', b'{"a": ["b", []]}']:
        put(path, content)
        assert run.newest() is None or content == b"{}"  # which says that there is nothing
    put(path, whole)
    assert run.newest() == path.parent


# Pictures and their captions


def test_a_picture_whose_recipe_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    for text in ("[]", "7", "null", "{", "", '"text"', DEEP.decode()):
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text(RECIPE_KEY, text, zip=len(text) > 1000)
        Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
        with pytest.raises(UserError, match=r"grid\.png holds no recipe"):
            read_recipe(path)
    save_png(Image.new("RGB", (8, 8)), path, {"pictures": []})
    for name, content in damages(path.read_bytes()).items():
        put(path, content)
        with pytest.raises(UserError, match=r"grid\.png holds no recipe"):
            read_recipe(path)
        with pytest.raises(
            UserError, match=r"grid\.png is there and is no sheet by pixart_ft\nthey are left as they are;"
        ):
            check_own([path], "pictures")
        assert name == "folder" or path.read_bytes() == content


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
@pytest.mark.filterwarnings("ignore:text files without")
def test_a_caption_file_that_is_damaged(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    whole = {
        "metadata.jsonl": b'{"file_name": "a.png", "text": "a"}\n',
        "metadata.csv": b"file_name,text\na.png,a\n",
        "a.txt": b"a picture",
    }[name]
    (tmp_path / name).write_bytes(whole)
    fine = survives(lambda: read_folder(tmp_path), tmp_path / name)
    assert fine == ([] if name != "a.txt" else ["list", "object", "number", "null", "deep", "half"])  # all are text
