"""The cache on disk: what is encoded again and what is not, damage, interruption, agreement with live models.

Oracles: encoding the same thing directly; loaders that raise when they should not be called.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

import pixart_ft.data.cache as cache
import pixart_ft.data.store
from pixart_ft.data.cache import (
    CachedPictures,
    TensorStore,
    cache_captions,
    cache_pictures,
    component_id,
    without_latents,
)
from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import Fit, fitted
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import verified
from pixart_ft.errors import UserError
from pixart_ft.model.text import encode_captions, null_caption
from tests.helpers.pictures import path_of, wide_profile


def refuse() -> NoReturn:
    raise AssertionError("a model was loaded though nothing was missing")


@pytest.fixture(scope="module")
def text_models(tiny: Path) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    encoder = T5EncoderModel.from_pretrained(str(tiny / "text_encoder"), dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(str(tiny / "tokenizer")), encoder


@pytest.fixture(scope="module")
def vae(tiny: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(str(tiny / "vae")).eval()


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """A picture folder of one's own to spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


def cached_pictures(
    store: Path | TensorStore,
    rows: list[Row],
    load: Callable[[], AutoencoderKL] = refuse,
    vae_id: str = "vae",
    size: int = 32,
    batch_size: int = 4,
) -> tuple[TensorStore, list[str]]:
    store = store if isinstance(store, TensorStore) else TensorStore(store)
    keys = cache_pictures(
        store,
        rows,
        load_vae=load,
        vae_id=vae_id,
        views=[[Fit((size, size))]] * len(rows),
        batch_size=batch_size,
        progress=False,
    )
    return store, keys


def latents_alone(vae: AutoencoderKL, row: Row, size: int | Fit = 32) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        posterior = vae.encode(fitted(row.opened().picture, size)[None]).latent_dist
    return posterior.mean[0], posterior.std[0]


# Pictures


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_cached_latents_are_the_live_ones(tmp_path: Path, pictures: Path, vae: AutoencoderKL, batch_size: int) -> None:
    rows = read_folder(pictures)
    _, keys = cached_pictures(tmp_path, rows, lambda: vae, batch_size=batch_size)
    data = CachedPictures(TensorStore(tmp_path), keys, keys)
    indices = [7, 0, 11, 7]
    mean, std = data.latents(indices)
    assert len(data) == 12 and mean.shape == std.shape == (4, 4, 4, 4) and mean.dtype == std.dtype == torch.float32
    for place, index in enumerate(indices):
        live_mean, live_std = latents_alone(vae, rows[index])
        torch.testing.assert_close(mean[place], live_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std[place], live_std, rtol=1e-5, atol=1e-5)


def test_views_of_other_sizes_are_encoded_in_one_go_each_as_it_is_alone(
    tmp_path: Path, pictures: Path, vae: AutoencoderKL
) -> None:
    rows, store = read_folder(pictures)[:2], TensorStore(tmp_path)
    views = [[Fit((32, 16), 0.2), Fit((32, 16), 0.2, mirrored=True)], [Fit((16, 32)), Fit((16, 32))]]
    keys = cache_pictures(store, rows, load_vae=lambda: vae, vae_id="vae", views=views, progress=False)
    assert len(keys) == 4 and len(set(keys)) == 3
    data = CachedPictures(store, keys, keys[::2], views=2)
    for index, row in enumerate(rows):
        for view, fit in enumerate(views[index]):
            mean, _ = data.latents([index], [view])
            torch.testing.assert_close(mean[0], latents_alone(vae, row, fit)[0], rtol=1e-5, atol=1e-5)


def test_a_second_run_loads_nothing_and_a_copy_counts_as_the_same(
    tmp_path: Path, folder: Path, vae: AutoencoderKL
) -> None:
    rows = read_folder(folder)
    _, keys = cached_pictures(tmp_path / "store", rows, lambda: vae)
    TensorStore(tmp_path / "store")  # writes the index
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    folder.rename(tmp_path / "renamed")
    moved = [Row(tmp_path / "renamed" / row.name, "another caption", "x") for row in rows[::-1]]
    assert cached_pictures(tmp_path / "store", moved)[1] == keys[::-1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == files


def test_an_edited_picture_alone_is_encoded_again(tmp_path: Path, folder: Path, vae: AutoencoderKL) -> None:
    rows = read_folder(folder)
    store, before = cached_pictures(tmp_path / "store", rows, lambda: vae)
    edited = Image.open(path_of(rows[3]))
    edited.putpixel((0, 0), (1, 2, 3))
    edited.save(path_of(rows[3]))
    held = sum(1 for key in before if key in store)
    store, after = cached_pictures(store, rows, lambda: vae)
    assert [a == b for a, b in zip(before, after, strict=True)] == [index != 3 for index in range(12)]
    assert held == 12 and len(store) == 13
    torch.testing.assert_close(store.get(after[3])[0], latents_alone(vae, rows[3])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"size": 48}, {"vae_id": "other"}])
def test_another_size_or_vae_is_another_encoding(
    tmp_path: Path, pictures: Path, vae: AutoencoderKL, change: dict[str, Any]
) -> None:
    rows = read_folder(pictures)
    store, before = cached_pictures(tmp_path, rows, lambda: vae)
    store, after = cached_pictures(store, rows, lambda: vae, **change)
    assert not set(before) & set(after)
    assert store.get(after[0]).shape[-1] == change.get("size", 32) // 8
    assert cached_pictures(tmp_path, rows)[1] == before
    assert cached_pictures(tmp_path, rows, **change)[1] == after


def test_another_transform_is_another_encoding(
    tmp_path: Path, pictures: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_folder(pictures)
    _, before = cached_pictures(tmp_path, rows, lambda: vae)
    monkeypatch.setattr(cache, "TRANSFORM", "another")
    assert not set(before) & set(cached_pictures(tmp_path, rows, lambda: vae)[1])


def test_killed_in_the_middle_the_next_run_completes_it(
    tmp_path: Path, pictures: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixart_ft.data.store, "_SHARD_ITEMS", 4)
    rows = read_folder(pictures)
    whole, keys = cached_pictures(tmp_path / "whole", rows, lambda: vae)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    first, second, third = sorted((tmp_path / "killed").iterdir())
    first.rename(first.with_name(f"{first.name}.123.part"))  # killed before the rename
    second.write_bytes(second.read_bytes()[:-100])  # a disk that lost the end
    with pytest.warns(UserWarning, match="damaged"):
        store, again = cached_pictures(tmp_path / "killed", rows, lambda: vae)
    assert again == keys and third.exists()
    assert all(torch.equal(store.get(key), whole.get(key)) for key in keys)
    assert cached_pictures(tmp_path / "killed", rows)[1] == keys


def test_unreadable_pictures_are_reported_before_a_model_is_loaded(tmp_path: Path, folder: Path) -> None:
    rows = read_folder(folder)
    for row in rows[:2]:
        path_of(row).write_bytes(row.content()[:-40])
    with pytest.raises(UserError) as caught:
        cached_pictures(tmp_path / "store", rows)
    assert all((str(row.where) in str(caught.value)) == (index < 2) for index, row in enumerate(rows))
    assert not (tmp_path / "store").exists()


def test_a_picture_swapped_after_it_was_hashed_is_not_kept_under_its_name(
    tmp_path: Path, folder: Path, vae: AutoencoderKL
) -> None:
    rows = read_folder(folder)
    digests = [found.digest for found in verified(rows)]

    def load() -> AutoencoderKL:  # by now all were hashed and verified
        Image.new("RGB", (64, 64), "pink").save(path_of(rows[5]))
        return vae

    store = TensorStore(tmp_path / "store")
    with pytest.raises(UserError, match=rf"{rows[5].where} was changed since the run began"):
        cache_pictures(store, rows, load_vae=load, vae_id="vae", views=[[Fit((32, 32))]] * len(rows), digests=digests)
    store, keys = cached_pictures(tmp_path / "store", rows, lambda: vae)
    assert all(
        torch.allclose(store.get(key)[0], latents_alone(vae, row)[0], atol=1e-5)
        for key, row in zip(keys, rows, strict=True)
    )


def test_a_picture_read_in_another_way_has_another_name_in_the_cache(tmp_path: Path, folder: Path) -> None:
    """What an earlier version encoded in wrong colours is encoded again, and nothing else is."""
    row = read_folder(folder)[0]
    plain = hashlib.sha256(row.content()).hexdigest()
    assert verified([row])[0].digest == plain
    with Image.open(path_of(row)) as opened:
        opened.convert("RGB").save(path_of(row), format="PNG", icc_profile=wide_profile())
    assert verified([row])[0].digest == hashlib.sha256(row.content()).hexdigest() + " to sRGB 1"


def test_pictures_that_give_nan_are_known_and_the_others_kept(tmp_path: Path, tiny: Path) -> None:
    """A VAE in float16 whose first layer overflows on pure black alone, and is then ignored."""
    fragile = AutoencoderKL.from_pretrained(str(tiny / "vae")).half().eval()
    with torch.no_grad():
        fragile.encoder.conv_in.weight[0] = -3333  # 27 taps of -1 make 89991, 9 make 29997; the limit is 65504
        fragile.encoder.down_blocks[0].downsamplers[0].conv.weight[:, 0] = 0
    rows = [Row(tmp_path / f"{colour}.png", "a colour", colour) for colour in ("red", "black", "grey", "blue")]
    for row in rows:
        Image.new("RGB", (32, 32), row.name).save(path_of(row))
    for load in (lambda: fragile, refuse):  # the cache remembers
        store, keys = cached_pictures(tmp_path / "store", rows, load, batch_size=3)
        assert without_latents(store, keys) == [1] and not store.missing(keys)
    assert all(store.get(key).isfinite().all() and len(store.get(key)) == 2 for key in (keys[0], *keys[2:]))


# Captions

CAPTIONS = ["A red circle", "a blue square on the pink picture", "", "a red circle "]


def test_cached_captions_are_the_live_ones(
    tmp_path: Path, text_models: tuple[PreTrainedTokenizerBase, T5EncoderModel]
) -> None:
    tokenizer, encoder = text_models
    store = TensorStore(tmp_path)
    options: dict[str, Any] = {"encoder_id": "t5", "progress": False}
    keys = cache_captions(store, CAPTIONS, load_text_encoder=lambda: text_models, **options)
    assert keys[0] == keys[3] and len(set(keys)) == 3
    found = CachedPictures(TensorStore(tmp_path), keys, keys).texts([1, 0, 2])
    live = encode_captions(encoder, tokenizer, CAPTIONS)
    for embedding, index in zip(found, [1, 0, 2], strict=True):
        torch.testing.assert_close(embedding, live[index], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], null_caption(encoder, tokenizer))
    assert cache_captions(TensorStore(tmp_path), CAPTIONS, load_text_encoder=refuse, **options) == keys


def test_only_what_changed_is_encoded_again(
    tmp_path: Path,
    text_models: tuple[PreTrainedTokenizerBase, T5EncoderModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TensorStore(tmp_path)

    def keys_of(captions: list[str], encoder_id: str = "t5", max_tokens: int = 300) -> list[str]:
        return cache_captions(
            store,
            captions,
            load_text_encoder=lambda: text_models,
            encoder_id=encoder_id,
            max_tokens=max_tokens,
            progress=False,
        )

    first = keys_of(CAPTIONS)
    edited = keys_of([CAPTIONS[0], "a blue square on the grey picture", ""])
    assert edited[0] == first[0] and edited[2] == first[2] and edited[1] not in first
    assert len(store) == 4
    assert not set(first) & set(keys_of(CAPTIONS, max_tokens=30))
    assert not set(first) & set(keys_of(CAPTIONS, encoder_id="other"))
    with pytest.warns(UserWarning, match="1 of 3 texts exceed max_tokens 5"):
        short = keys_of(CAPTIONS, max_tokens=5)
    assert len(store.get(short[1])) == 5
    monkeypatch.setattr(cache, "TEXT_PREPARATION", "another")
    assert not set(first) & set(keys_of(CAPTIONS))


def test_a_caption_that_becomes_one_that_is_there_is_named(
    tmp_path: Path, text_models: tuple[PreTrainedTokenizerBase, T5EncoderModel]
) -> None:
    def encode(captions: list[str]) -> None:
        cache_captions(
            TensorStore(tmp_path),
            captions,
            load_text_encoder=lambda: text_models,
            encoder_id="t5",
            progress=False,
        )

    with pytest.warns(UserWarning, match="1 of 2 texts have letters that the tokenizer does not know"):
        encode(["a red", "犬"])
    with pytest.warns(UserWarning, match="cannot tell them apart:\n  '犬' = '猫'$"):
        encode(["a red", "犬", "猫"])  # only 猫 is encoded


# Names of models


def test_a_local_model_is_named_by_its_files(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    memo = tmp_path / "memo.json"
    name = component_id(base, "vae", dtype=torch.float32, memo=memo)
    assert name == component_id(tiny, "vae", dtype=torch.float32)
    assert name == component_id(str(base), "vae", dtype=torch.float32, memo=memo)
    assert name != component_id(base, "vae", dtype=torch.bfloat16, memo=memo)
    both = component_id(base, "tokenizer", "text_encoder", dtype=torch.float32, memo=memo)
    assert both != component_id(base, "text_encoder", dtype=torch.float32, memo=memo)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = component_id(base, "vae", dtype=torch.float32, memo=memo)
    assert changed not in (name, both) and changed == component_id(base, "vae", dtype=torch.float32)
    memo.write_text("damaged")
    assert component_id(base, "vae", dtype=torch.float32, memo=memo) == changed
    with pytest.raises(UserError, match="has no subfolder unet"):
        component_id(base, "unet", dtype=torch.float32)


def test_another_file_of_the_same_size_and_time_is_another_model(tiny: Path, tmp_path: Path) -> None:
    """Moved into its place, or written into it, and its time set back, as `cp -p` and rsync do."""
    base, memo = Path(shutil.copytree(tiny, tmp_path / "base")), tmp_path / "memo.json"
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    content, names = bytearray(weights.read_bytes()), set()
    for place in (weights, weights, tmp_path / "another"):
        names.add(component_id(base, "vae", dtype=torch.float32, memo=memo))
        content[-1] ^= 1 << len(names)
        place.write_bytes(content)
        os.utime(place, ns=times)
        place.replace(weights)
    names.add(component_id(base, "vae", dtype=torch.float32, memo=memo))
    assert len(names) == 4


def test_the_memo_spares_reading_unchanged_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = tmp_path / "memo.json"
    name = component_id(tiny, "vae", dtype=torch.float32, memo=memo)
    monkeypatch.setattr(cache, "_file_sha256", refuse)
    assert component_id(tiny, "vae", dtype=torch.float32, memo=memo) == name


def test_a_hub_model_is_named_by_its_commit() -> None:
    names = {
        component_id("owner/name", "vae", dtype=dtype, commit=commit)
        for dtype in (torch.float32, torch.bfloat16)
        for commit in ("def", "abc")
    }
    assert len(names) == 4 and "owner/name/vae@abc torch.bfloat16" in names


def test_a_cache_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    """`data.cache` may name a folder that holds model weights."""
    (tmp_path / "my_lora.safetensors").write_bytes(b"precious")
    (tmp_path / "download.part").write_bytes(b"also")
    os.utime(tmp_path / "download.part", (0, 0))
    TensorStore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download.part", "my_lora.safetensors"]
