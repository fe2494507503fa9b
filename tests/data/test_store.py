"""Shards on the disk and their index: what is stored comes back, or is missing, or is refused; never anything else.

Oracles: the tensors themselves; safetensors' own reader; every single damage to a file.
"""

import os
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pixart_ft.data import store as module
from pixart_ft.data.store import INDEX, TensorStore
from pixart_ft.errors import UserError


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"key{index}": torch.randn(index + 1, 3, generator=draw) for index in range(7)}


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != INDEX)


def test_what_is_stored_comes_back_after_reopening(tmp_path: Path) -> None:
    items = tensors() | {"half": torch.ones(2, dtype=torch.bfloat16), "view": torch.arange(6.0).view(2, 3).T}
    items |= {"number": torch.tensor(3), "empty": torch.empty(0, 2)}
    store = TensorStore(tmp_path / "new" / "store")
    assert not (tmp_path / "new").exists()
    store.add(items)
    for opened in (store, TensorStore(store.folder), TensorStore(store.folder)):  # without an index, and with one
        assert opened.missing(["key1", "none", "half", "none"]) == ["none"] and len(opened) == len(items)
        held = opened.held(list(items))
        for value, key in enumerate(items):
            for found in (opened.get(key), held[value]):
                assert key in opened and found.dtype == items[key].dtype and torch.equal(found, items[key])
    with pytest.raises(KeyError, match="none"):
        store.get("none")
    (path,) = shards(store.folder)
    assert safetensors.torch.load_file(path).keys() == items.keys()


def test_writing_into_a_tensor_does_not_change_the_store(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.add({"a": torch.ones(3)})
    store.get("a").zero_()
    assert store.get("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_an_interruption_keeps_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    monkeypatch.setattr(module, "_SHARD_ITEMS", 2)

    def until_interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors().items())[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorStore(tmp_path).fill(until_interrupted())
    assert TensorStore(tmp_path).missing(tensors()) == list(tensors())[stop:]
    assert len(shards(tmp_path)) == (stop + 1) // 2


@pytest.mark.parametrize(("limit", "value"), [("_SHARD_BYTES", 1000), ("_SHARD_SECONDS", -1)])
def test_shards_are_of_bounded_size_and_written_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(module, limit, value)
    TensorStore(tmp_path).fill((f"key{index}", torch.full((100,), float(index))) for index in range(9))
    assert len(shards(tmp_path)) == (3 if limit == "_SHARD_BYTES" else 9)  # 3 x 400 bytes pass the limit
    assert TensorStore(tmp_path).get("key8")[0] == 8


def test_a_file_in_the_way_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*cache is a file"):
        TensorStore(tmp_path / "cache")


@pytest.mark.parametrize("length", [0, 100, -1])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_shard_that_is_cut_short_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, asked_before: bool
) -> None:
    """Also where it is cut after it was asked for its size: from a mapped file, reading on would kill the process."""
    store = TensorStore(tmp_path)
    store.add({"key": torch.ones(4096)})
    (path,) = shards(tmp_path)
    true = path.stat()
    os.truncate(path, length % true.st_size)
    if asked_before:
        monkeypatch.setattr(os, "fstat", lambda _: true)
    with pytest.raises(UserError, match=r"data\.cache: .* bytes instead of [\d,]+, while it is read"):
        store.get("key")


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    for number in range(20):
        store.add({str(number): torch.full((3,), float(number))})
    before = len(os.listdir("/proc/self/fd"))
    assert [store.get(str(number))[0].item() for number in range(20)] == list(range(20))
    assert len(os.listdir("/proc/self/fd")) == before


# Damage


def flip_the_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.filterwarnings("ignore:the cache file")
@pytest.mark.parametrize("remembered", [True, False])
def test_one_flipped_byte_never_gives_another_tensor(tmp_path: Path, remembered: bool) -> None:
    """Wherever it is: in tensors, names, shapes or checksums. What is not as it was is refused or missing, and then is
    stored again."""
    items = dict(list(tensors().items())[:3])
    TensorStore(tmp_path).add(items)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    TensorStore(tmp_path)
    index = (tmp_path / INDEX).read_bytes()
    lost = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (tmp_path / INDEX).write_bytes(index) if remembered else (tmp_path / INDEX).unlink(missing_ok=True)
        store = TensorStore(tmp_path)
        for key, value in items.items():
            if key in store:
                try:
                    assert torch.equal(store.get(key), value)
                except UserError as error:
                    assert str(path) in str(error)
        again = TensorStore(tmp_path)
        lost += bool(again.missing(items))
        assert path.exists() or again.missing(items) == list(items)
    start = 8 + int.from_bytes(whole[:8], "little")
    in_tensors = len(range(0, len(whole), 5)) - len(range(0, start, 5))
    assert lost == in_tensors if remembered else lost > len(whole) // 6


def test_what_is_found_damaged_is_stored_again(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.add({"good": torch.ones(3)})
    (good,) = shards(tmp_path)
    store.add(tensors())
    (bad,) = set(shards(tmp_path)) - {good}
    flip_the_last_byte(bad)
    opened = TensorStore(tmp_path)  # hashes nothing
    assert not opened.missing(["good", *tensors()]) and torch.equal(opened.get("good"), torch.ones(3))
    with pytest.raises(UserError, match=rf"data\.cache: {bad} is damaged, and removed, while .*the next run encodes"):
        [opened.get(key) for key in tensors()]
    opened = TensorStore(tmp_path)
    assert "good" in opened and opened.missing(tensors()) == list(tensors())
    opened.add(tensors())
    assert all(torch.equal(TensorStore(tmp_path).get(key), value) for key, value in tensors().items())


def test_verify_reads_everything_and_names_what_is_damaged(tmp_path: Path) -> None:
    for key, value in tensors().items():
        TensorStore(tmp_path).add({key: value})
    assert TensorStore(tmp_path).verify() == []
    first, _, third, *_ = shards(tmp_path)
    flip_the_last_byte(first)
    third.write_bytes(third.read_bytes().replace(b"crc32", b"crc33"))
    assert TensorStore(tmp_path).verify() == [first, third]
    assert len(TensorStore(tmp_path).missing(tensors())) == 2


@pytest.mark.filterwarnings("ignore:the cache file")
def test_verify_names_also_what_was_found_when_it_was_opened(tmp_path: Path) -> None:
    TensorStore(tmp_path).add(tensors())
    (path,) = shards(tmp_path)
    os.truncate(path, 100)
    assert TensorStore(tmp_path).verify() == [path] and not path.exists()


def test_what_cannot_be_removed_is_not_called_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorStore(tmp_path).add({"key": torch.ones(3)})
    (path,) = shards(tmp_path)
    flip_the_last_byte(path)
    store = TensorStore(tmp_path)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=f"{path} is damaged, and cannot be removed, .* delete it by hand"):
        store.get("key")
    os.truncate(path, 100)
    with pytest.warns(UserWarning, match=rf"{path} is damaged: not removed \(delete it by hand\)"):
        TensorStore(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_shards_of_an_earlier_version_are_read(tmp_path: Path, damaged: bool) -> None:
    content = safetensors.torch.save(tensors())
    path = tmp_path / f"{sha256(content).hexdigest()}.safetensors"
    path.write_bytes(content)
    if damaged:
        flip_the_last_byte(path)
        with pytest.warns(UserWarning, match=f"{path} is damaged"):
            store = TensorStore(tmp_path)
        assert store.missing(tensors()) == list(tensors()) and not path.exists()
    else:
        assert all(torch.equal(TensorStore(tmp_path).get(key), value) for key, value in tensors().items())


# The index


def filled(folder: Path, count: int) -> TensorStore:
    store = TensorStore(folder)
    store.fill((str(number), torch.tensor([number])) for number in range(count))
    return store


def test_a_second_opening_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 600)
    first = TensorStore(tmp_path)
    before = (tmp_path / INDEX).stat().st_mtime_ns
    monkeypatch.setattr(TensorStore, "_take", None)
    second = TensorStore(tmp_path)
    assert (tmp_path / INDEX).stat().st_mtime_ns == before
    for store in (first, second):
        assert [store.get(str(number)).item() for number in (0, 300, 599)] == [0, 300, 599]


def test_the_index_follows_what_comes_and_goes(tmp_path: Path) -> None:
    filled(tmp_path, 600)
    first, _ = TensorStore(tmp_path)._shards.files[0]  # as the index, written now, has them
    (tmp_path / first).unlink()
    lost = TensorStore(tmp_path).missing(map(str, range(600)))
    assert len(lost) in (256, 88)
    TensorStore(tmp_path).add({key: torch.tensor([int(key)]) for key in lost} | {"more": torch.tensor([-1])})
    for store in (TensorStore(tmp_path), TensorStore(tmp_path)):
        assert [store.get(str(number)).item() for number in range(600)] == list(range(600)) and "more" in store


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    TensorStore(tmp_path)
    path = tmp_path / INDEX
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for content in [b"", b"[]", whole[:-9], *flipped]:
        path.write_bytes(content)
        store = TensorStore(tmp_path)
        assert [store.get(str(number)).item() for number in range(3)] == [0, 1, 2]
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 3)

    def refuse(path: Path, data: bytes) -> None:
        raise UserError(f"{path} cannot be written")

    monkeypatch.setattr(module, "write_bytes", refuse)
    assert TensorStore(tmp_path).get("2").item() == 2 and not (tmp_path / INDEX).exists()


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module._digests

    def alike(keys: list[str]) -> module.Array:
        found = whole(keys).copy()
        found["high"] = 7
        return found

    monkeypatch.setattr(module, "_digests", alike)
    store = filled(tmp_path, 40)
    assert [store.get(str(number)).item() for number in range(40)] == list(range(40))
    assert store.missing(["41", "3", "x"]) == ["41", "x"]


def test_the_memory_of_a_tensor_is_twenty_bytes(tmp_path: Path) -> None:
    """And 36 while the folder is looked through: two million tensors take 72 MB, and then 40."""
    count = 4096
    filled(tmp_path, count)
    keys = [str(number) for number in range(count)]
    TensorStore(tmp_path).missing(keys)
    tracemalloc.start()
    try:
        store = TensorStore(tmp_path)
        opened = tracemalloc.get_traced_memory()[0]
        held = store.held(keys)
        del store
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert opened < 36 * count + 20_000 and left < 20 * count + 20_000
    assert held[77].item() == 77 and np.array_equal([held[i].item() for i in (0, 4095)], [0, 4095])
