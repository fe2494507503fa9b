"""Tensors by key on the disk: safetensors shards, and an index of them in arrays, without an object for each tensor."""

import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256 as hasher
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
from torch import Tensor
from tqdm import tqdm

from pixart_ft.errors import UserError
from pixart_ft.files import explained, probe, sha256, sweep, write_bytes

INDEX = "pixart_ft-index.safetensors"
_SHARD = re.compile(r"[0-9a-f]{64}\.safetensors")
_SHARD_ITEMS = 256
_SHARD_BYTES = 64 * 2**20
_SHARD_SECONDS = 60  # after which what was made is written, however little: a crash loses no more
_SUMS = "crc32"  # in a shard's metadata: the checksums of its tensors in the order of their keys, eight hex digits each
_NO_SHARD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

_KEY = np.dtype([("high", "<u8"), ("low", "<u8")])  # the first 128 bits of a key's SHA-256
_PLACE = np.dtype([("offset", "<u8"), ("shard", "<u4"), ("kind", "<u4"), ("sum", "<u4")])
_ENTRY = np.dtype([*_KEY.descr, *_PLACE.descr])
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Shards:
    """What the numbers in a place mean: shards by name and size, kinds of tensors by dtype, shape and bytes."""

    folder: Path
    files: list[tuple[str, int]] = field(default_factory=list)
    kinds: dict[tuple[str, tuple[int, ...], int], int] = field(default_factory=dict)

    def read(self, place: Any, kinds: Sequence[tuple[str, tuple[int, ...], int]]) -> Tensor:
        """The tensor at a place. Raises UserError, and removes its shard, where that is not what was written."""
        name, size = self.files[place["shard"]]
        dtype, shape, length = kinds[place["kind"]]
        path = self.folder / name
        with explained(path, "read", "data.cache"):
            found, data = _read_part(path, int(place["offset"]), length)
        wrong, by_hand = "", ""
        if found != size or len(data) != length:
            wrong = "is gone" if found is None else f"has {found:,} bytes instead of {size:,}"
        elif _sum(dtype, shape, data) != place["sum"]:
            wrong = "is damaged, and removed"
            if not _removed(path):
                wrong, by_hand = "is damaged, and cannot be removed", "delete it by hand: "
        if wrong:
            anew = f"{by_hand}the next run encodes anew what was in it"
            raise UserError(f"data.cache: {path} {wrong}, while it is read; {anew}")
        # a file of this tensor alone, since the library reads no part of bytes
        alone = json.dumps({"": {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}}).encode()
        return safetensors.torch.load(len(alone).to_bytes(8, "little") + alone + data)[""]


class Held:
    """Tensors of a store by number, each read from its file when it is asked for: 20 bytes of memory for each."""

    def __init__(self, shards: _Shards, places: Array) -> None:
        self._shards, self._kinds, self._places = shards, list(shards.kinds), places

    def __len__(self) -> int:
        return len(self._places)

    def sizes(self) -> Array:
        """The bytes of each, (N,) int64."""
        return np.array([size for _, _, size in self._kinds], np.int64)[self._places["kind"]]

    def __getitem__(self, number: int) -> Tensor:
        """The tensor, on the CPU. Raises UserError if its file is gone or damaged."""
        return self._shards.read(self._places[number], self._kinds)


class TensorStore:
    """Tensors by key in a folder of safetensors shards, each named by the SHA-256 of its bytes.

    A shard is written aside, fsynced and renamed, so an interrupted run leaves only whole shards. Its header has a
    checksum of each tensor, tried when that is read; a shard that is found damaged is removed, and its keys are missing
    when the folder is opened again. A tensor is read from its file each time, which keeps no file open and maps none:
    reading beyond the end of a mapped file that was cut short would kill the process.

    Opening reads the file `INDEX`, which remembers all headers, and the header of each shard that it lacks; then that
    file is written anew. Several processes may read and write, since a key has only one possible value.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with explained(self.folder, "used", "data.cache"):
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"the cache folder {self.folder} is a file; remove it or choose another folder")
        self.written: list[str] = []  # the shards of this process, in order
        self._damaged: list[Path] = []  # found so when they were met
        self._shards, self._met = _Shards(self.folder), set[str]()
        self._table, self._new = np.empty(0, _ENTRY), list[Array]()  # by key, and what is to be sorted into it
        sweep(self.folder)
        sizes = dict(self._files())
        self._index_lacks = self._read_index(sizes)
        self.meet(sizes)
        self.write_index()

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    def __len__(self) -> int:
        return len(self._merged())

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys not held, each once, in the order given."""
        keys = list(dict.fromkeys(keys))
        return [keys[number] for number in np.flatnonzero(self._find(keys) < 0)]

    def held(self, keys: Sequence[str]) -> Held:
        """The tensors under these keys, by number; KeyError unless all are there."""
        found = self._find(keys)
        if (found < 0).any():
            raise KeyError(keys[int(found.argmin())])
        places = np.empty(len(found), _PLACE)
        for name in _PLACE.names or ():
            places[name] = self._merged()[name][found]
        return Held(self._shards, places)

    def get(self, key: str) -> Tensor:
        """The tensor under a key, on the CPU; KeyError if it is missing, UserError as `Held` raises it."""
        return self.held([key])[0]

    def check_writable(self) -> None:
        """Raise UserError unless shards can be added; one that lacks nothing may be read-only."""
        probe(self.folder, "data.cache")

    def add(self, items: Mapping[str, Tensor]) -> None:
        """Write one shard; when this returns it is on the disk."""
        data = memoryview(safetensors.torch.save({key: tensor.contiguous().cpu() for key, tensor in items.items()}))
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        sums = _sums(header, data[start:])
        whole = json.dumps({"__metadata__": {_SUMS: "".join(f"{number:08x}" for number in sums)}, **header}).encode()
        whole += b" " * (-len(whole) % 8)  # the tensors are aligned
        content = len(whole).to_bytes(8, "little") + whole + data[start:]
        self.written.append(f"{sha256(content)}.safetensors")
        write_bytes(self.folder / self.written[-1], content)
        self.meet(self.written[-1:])

    def fill(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Store items as they are made, a shard at a time; what was made before an interruption is kept.

        A shard is written while the items of the next are made.
        """
        pending: dict[str, Tensor] = {}
        size, begun, written = 0, monotonic(), Future[None]()
        written.set_result(None)
        with ThreadPoolExecutor(1) as writer:
            try:
                for key, tensor in items:
                    pending[key] = tensor
                    size += tensor.nbytes
                    if len(pending) == _SHARD_ITEMS or size >= _SHARD_BYTES or monotonic() - begun > _SHARD_SECONDS:
                        written.result()
                        written = writer.submit(self.add, pending)
                        pending, size, begun = {}, 0, monotonic()
            finally:
                written.result()
                if pending:
                    self.add(pending)

    def meet(self, names: Iterable[str]) -> None:
        """Take in shards that are in the folder by now; a damaged one is removed with a warning."""
        for name in names:
            path = self.folder / name
            if name in self._met:
                continue
            with explained(path, "read", "data.cache"):
                try:
                    self._take(path)
                except FileNotFoundError:  # of another folder, or removed by another process
                    pass
                except _NO_SHARD:
                    self._damaged.append(path)  # a read-only cache keeps it, and its keys are missing all the same
                    done = "removed" if _removed(path) else "not removed (delete it by hand)"
                    warnings.warn(f"the cache file {path} is damaged: {done}, to be encoded again", stacklevel=3)

    def verify(self) -> list[Path]:
        """Read every shard in full; the damaged ones are removed if they can be, and returned with those met before."""
        damaged = list(self._damaged)
        for path in tqdm([self.folder / name for name in sorted(self._met)], "shards read", disable=None):
            with explained(path, "read", "data.cache"), suppress(FileNotFoundError):
                if sha256(path) != path.stem:
                    damaged.append(path)
                    _removed(path)
        return damaged

    def write_index(self) -> None:
        """Remember the headers of all shards for the next time, unless that is done."""
        if not (self._index_lacks or self._new):
            return
        about = np.frombuffer(json.dumps([self._shards.files, list(self._shards.kinds)]).encode(), np.uint8)
        arrays: dict[str, Array] = {"about": about, "table": self._merged().view(np.uint8)}
        arrays["check"] = np.array([_sum_of(arrays)], np.uint32)
        with suppress(UserError):  # it is only a memory, and a full cache may be read-only
            write_bytes(self.folder / INDEX, safetensors.numpy.save(arrays))
        self._index_lacks = False

    def _files(self) -> Iterator[tuple[str, int]]:
        """The shards in the folder with their sizes; others' files may stand there too."""
        with explained(self.folder, "read", "data.cache"), suppress(FileNotFoundError):
            for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
                with suppress(FileNotFoundError):
                    if _SHARD.fullmatch(entry.name) and entry.is_file():
                        yield entry.name, entry.stat().st_size

    def _read_index(self, sizes: Mapping[str, int]) -> bool:
        """Take from the index what it says of these shards; returns whether it is to be written anew."""
        try:
            found = safetensors.numpy.load((self.folder / INDEX).read_bytes())
            if _sum_of(found) != found["check"][0]:
                return True
        except OSError:
            return False
        except (safetensors.SafetensorError, *_NO_SHARD):
            return True
        files, kinds = json.loads(found["about"].tobytes())
        stands = np.array([sizes.get(name) == size for name, size in files], bool)
        entries = found["table"].view(_ENTRY)
        entries = entries[stands[entries["shard"]]]
        entries["shard"] = (stands.cumsum() - 1)[entries["shard"]]
        self._table = entries
        self._shards.files.extend((name, size) for (name, size), there in zip(files, stands, strict=True) if there)
        self._shards.kinds.update({(dtype, tuple(shape), n): at for at, (dtype, shape, n) in enumerate(kinds)})
        self._met = {name for name, _ in self._shards.files}
        return not stands.all()

    def _take(self, path: Path) -> None:
        """Note where each tensor of a shard lies. Raises one of `_NO_SHARD` for a file that is none."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start - 8, size)))
            told = header.pop("__metadata__", {}).get(_SUMS)
            if told is None:  # an earlier version wrote it
                data = file.read()
                if sha256(path) != path.stem:
                    raise ValueError("its bytes are not those that it is named by")
                sums = _sums(header, memoryview(data))
            else:
                sums = [int(told[8 * at : 8 * at + 8], 16) for at in range(len(header))]
        keys = sorted(header)
        ends = [header[key]["data_offsets"] for key in keys]
        if (
            any(not 0 <= begin <= end for begin, end in ends)
            or max([end for _, end in ends], default=0) != size - start
        ):
            raise ValueError("its tensors lie outside of it")
        entries = np.empty(len(header), _ENTRY)
        entries[list(_KEY.names or ())] = _digests(keys)
        entries["offset"] = [start + begin for begin, _ in ends]
        entries["shard"], entries["sum"] = len(self._shards.files), sums
        kinds = self._shards.kinds
        entries["kind"] = [kinds.setdefault(_kind(header[key]), len(kinds)) for key in keys]
        self._shards.files.append((path.name, size))
        self._met.add(path.name)
        self._new.append(entries)

    def _merged(self) -> Array:
        """All entries by key, each once."""
        if self._new:
            table = np.concatenate([self._table, *self._new])
            table = table[np.lexsort((table["low"], table["high"]))]
            is_first = np.ones(len(table), bool)
            is_first[1:] = (np.diff(table["high"]) != 0) | (np.diff(table["low"]) != 0)
            self._table, self._new, self._index_lacks = table[is_first], [], True
        return self._table

    def _find(self, keys: Sequence[str]) -> Array:
        """The place of each key in `_merged`, (N,) int64, -1 for one that is missing."""
        table, wanted = self._merged(), _digests(keys)
        places, found = np.searchsorted(table["high"], wanted["high"]), np.full(len(keys), -1)
        left = np.arange(len(keys))
        while len(left):  # once, unless keys are alike in their first 64 bits
            left = left[places[left] < len(table)]
            left = left[table["high"][places[left]] == wanted["high"][left]]
            is_it = table["low"][places[left]] == wanted["low"][left]
            found[left[is_it]] = places[left[is_it]]
            left = left[~is_it]
            places[left] += 1
        return found


def _digests(keys: Iterable[str]) -> Array:
    return np.frombuffer(b"".join(hasher(key.encode()).digest()[:16] for key in keys), _KEY)


def _kind(about: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int]:
    """Of what its shard's header says of a tensor: dtype, shape and bytes."""
    begin, end = about["data_offsets"]
    return about["dtype"], tuple(about["shape"]), end - begin


def _sums(header: Mapping[str, Any], data: memoryview) -> list[int]:
    """The checksums of a shard's tensors, which are `data`, in the order of their keys."""
    found = []
    for key in sorted(header):
        dtype, shape, _ = _kind(header[key])
        found.append(_sum(dtype, shape, data[slice(*header[key]["data_offsets"])]))
    return found


def _sum(dtype: str, shape: Sequence[int], data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(json.dumps([dtype, *shape]).encode()))


def _sum_of(index: Mapping[str, Array]) -> int:
    """The checksum of an index."""
    return zlib.crc32(index["table"].data, zlib.crc32(index["about"].data))


def _removed(path: Path) -> bool:
    """Remove a damaged file; whether it is gone, which it is not from a cache that cannot be written."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def _read_part(path: Path, start: int, length: int) -> tuple[int | None, bytes]:
    """The size of a file, None if it is gone, and a part of it."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return os.fstat(file.fileno()).st_size, file.read(length)
    except FileNotFoundError:
        return None, b""
