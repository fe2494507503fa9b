"""Latents and text embeddings, encoded once and kept on disk under a key that names all they depend on.

Shapes: C latent channels, H W latent size, L tokens, D text width.
"""

import gc
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.data.datasets import Row, in_threads, verify_pictures
from pixart_ft.data.pixels import TRANSFORM, fitted
from pixart_ft.errors import UserError
from pixart_ft.files import explained, probe, sha256, sweep, write_bytes, write_text
from pixart_ft.model.text import TEXT_PREPARATION, encode_each, prepare_text, warn_of_losses
from pixart_ft.model.vae import encode_moments

CAPTIONS_AT_ONCE = 16  # encoded in one call
_SHARD_ITEMS = 256
_SHARD_BYTES = 64 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorStore:
    """Tensors by key in a folder of safetensors shards, each named by the SHA-256 of its bytes.

    A shard is written aside, fsynced and renamed, so an interrupted run leaves only whole shards; on
    opening, one whose bytes do not match its name is removed with a warning, and its keys are missing
    again. A tensor is read from its file each time, which keeps no file open and maps none: reading beyond the end of
    a mapped file that was cut short would kill the process. Several processes may read and write, since a key has only
    one possible value. What is left: a shard whose bytes are changed in place while a run reads it, at the same size,
    is found by the next run alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with explained(self.folder, "used", "data.cache"):
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"the cache folder {self.folder} is a file; remove it or choose another folder")
        self._shards: dict[str, _Entry] = {}
        sweep(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            if not (_SHA256.fullmatch(path.stem) and path.is_file()):
                continue  # somebody else's file: a cache may stand in a folder of other things
            if not self._opened(path):
                warnings.warn(f"the cache file {path} is damaged: removed, to be encoded again", stacklevel=2)
                with suppress(OSError):  # a read-only cache keeps it, and its keys are missing all the same
                    path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys not held, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._shards]

    def get(self, key: str) -> Tensor:
        """The tensor under a key, on the CPU; KeyError if it is missing.

        Raises UserError if its file is gone or was cut short.
        """
        entry = self._shards[key]
        begin, end = entry.extent
        with explained(entry.path, "read", "data.cache"):
            found, data = _read_part(entry.path, entry.start + begin, end - begin)
        if found != entry.size or len(data) != end - begin:
            what = "is gone" if found is None else f"has {found:,} bytes instead of {entry.size:,}"
            raise UserError(
                f"data.cache: {entry.path} {what}, while it is read; the next run encodes anew what was in it"
            )
        alone = json.dumps({key: entry.about | {"data_offsets": [0, len(data)]}}).encode()
        # a file of this tensor alone, since the library reads no part of bytes
        return safetensors.torch.load(len(alone).to_bytes(8, "little") + alone + data)[key]

    def check_writable(self) -> None:
        """Raise UserError unless shards can be added; one that lacks nothing may be read-only."""
        probe(self.folder, "data.cache")

    def add(self, items: Mapping[str, Tensor]) -> None:
        """Write one shard; when this returns it is on the disk."""
        data = safetensors.torch.save({key: tensor.contiguous().cpu() for key, tensor in items.items()})
        path = self.folder / f"{sha256(data)}.safetensors"
        write_bytes(path, data)
        self._open(path)

    def fill(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Store items as they are made, a shard at a time; what was made before an interruption is kept."""
        pending: dict[str, Tensor] = {}
        size = 0
        try:
            for key, tensor in items:
                pending[key] = tensor
                size += tensor.nbytes
                if len(pending) == _SHARD_ITEMS or size >= _SHARD_BYTES:
                    self.add(pending)
                    pending, size = {}, 0
        finally:
            if pending:
                self.add(pending)

    def _opened(self, path: Path) -> bool:
        """Open a shard, unless it is not what its name says, or nothing that this class wrote."""
        with explained(path, "read", "data.cache"):
            if sha256(path) != path.stem:
                return False
        try:
            self._open(path)
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _open(self, path: Path) -> None:
        """Note where each tensor of a shard lies. Raises almost anything for a file that is none."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        entries = {key: _Entry(path, size, 8 + length, about) for key, about in header.items()}
        if any(not 0 <= begin <= end <= size - 8 - length for begin, end in (e.extent for e in entries.values())):
            raise ValueError("its tensors lie outside of it")
        self._shards.update(entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies: its shard, the size that has, where its tensors start, and what its header says."""

    path: Path
    size: int
    start: int
    about: dict[str, Any]

    @property
    def extent(self) -> tuple[int, int]:
        begin, end = self.about["data_offsets"]
        return begin, end


def _read_part(path: Path, start: int, length: int) -> tuple[int | None, bytes]:
    """The size of a file, None if it is gone, and a part of it."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return os.fstat(file.fileno()).st_size, file.read(length)
    except FileNotFoundError:
        return None, b""


@dataclass(frozen=True)
class CachedPictures:
    """The training data as indices into a store: item i is latent_keys[i] with text_keys[i]."""

    store: TensorStore
    latent_keys: Sequence[str]
    text_keys: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.latent_keys) == len(self.text_keys)
        assert not self.store.missing([*self.latent_keys, *self.text_keys])

    def __len__(self) -> int:
        return len(self.latent_keys)

    def latents(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, each (N, C, H, W) float32, as the VAE gives them.

        `model.vae.LatentScale` makes the transformer's latents of them, so neither its scale nor its shift is in a key.
        """
        mean, std = torch.stack([self.store.get(self.latent_keys[index]) for index in indices]).unbind(1)
        return mean, std

    def texts(self, indices: Sequence[int]) -> list[Tensor]:
        """The caption embeddings, each (L_i, D) in the text encoder's dtype."""
        return [self.store.get(self.text_keys[index]) for index in indices]


def cache_captions(
    store: TensorStore,
    captions: Sequence[str],
    *,
    load_text_encoder: Callable[[], tuple[PreTrainedTokenizerBase, T5EncoderModel]],
    encoder_id: str,
    max_tokens: int = 300,
    batch_size: int = CAPTIONS_AT_ONCE,
    progress: bool = True,
) -> list[str]:
    """Encode the captions that the store misses; returns the key of each. "" is a caption too.

    load_text_encoder   gives tokenizer and encoder; called only if something is missing, and its result freed
    encoder_id          names tokenizer, encoder and dtype: see `component_id`
    """
    texts = [prepare_text(caption) for caption in captions]
    about = {"preparation": TEXT_PREPARATION, "encoder": encoder_id, "max_tokens": max_tokens}
    keys = [_key(about, text) for text in texts]
    text_of = dict(zip(keys, texts, strict=True))
    if missing := store.missing(keys):
        store.check_writable()
        tokenizer, text_encoder = load_text_encoder()
        warn_of_losses(tokenizer, texts, max_tokens)  # of all: one may become the tokens of another that is there
        wanted = [text_of[key] for key in missing]
        found = encode_each(text_encoder, tokenizer, wanted, max_tokens=max_tokens, batch_size=batch_size)
        pairs = ((missing[index], embedding) for index, embedding in found)
        store.fill(tqdm(pairs, "captions encoded", len(missing), disable=None if progress else True))
        del tokenizer, text_encoder, found, pairs
        _free_memory()
    return keys


def picture_digests(rows: Sequence[Row]) -> list[str]:
    """What names each picture: the SHA-256 of its file, and where it is not read in the usual way, how.

    Raises UserError for one that cannot be read.
    """
    found = in_threads(lambda row: row.digest(row.content()), rows)
    return list(tqdm(found, "pictures read", len(rows), delay=1, leave=False, disable=None))


def pictures_at_once(size: int) -> int:
    """How many of size x size pixels are encoded in one call: four, but no more pixels than four of 512 x 512 have."""
    return max(1, min(4, 4 * 512**2 // size**2))


def cache_pictures(
    store: TensorStore,
    rows: Sequence[Row],
    *,
    load_vae: Callable[[], AutoencoderKL],
    vae_id: str,
    size: int,
    digests: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Encode the pictures that the store misses, at size x size pixels; returns the key of each.

    load_vae   called only if something is missing and all of that can be read; its result is freed
    vae_id     names the VAE and its dtype: see `component_id`
    digests    of the rows, where they are known: see `picture_digests`
    batch_size pictures of one call; None: `pictures_at_once`

    Raises UserError listing the pictures that cannot be read, that changed since their digest was taken, or for which
    the VAE gives NaN or infinity.
    """
    about = {"transform": TRANSFORM, "size": size, "vae": vae_id}
    digests = picture_digests(rows) if digests is None else digests
    keys = [_key(about, digest) for digest in digests]
    row_of = dict(zip(keys, rows, strict=True))
    digest_of = dict(zip(keys, digests, strict=True))
    if missing := store.missing(keys):
        store.check_writable()
        verify_pictures([row_of[key] for key in missing], size, progress=progress)
        vae = load_vae()
        bad: list[Row] = []
        wanted = {key: (row_of[key], digest_of[key]) for key in missing}
        pairs = _encode_pictures(vae, wanted, size, batch_size or pictures_at_once(size), bad)
        store.fill(tqdm(pairs, "pictures encoded", len(missing), disable=None if progress else True))
        if bad:
            listed = "".join(f"\n    {row.where}" for row in bad[:10]) + ("\n    ..." if len(bad) > 10 else "")
            raise UserError(
                f"the VAE ({vae.dtype}) gave NaN or infinity for {len(bad)} of {len(missing)} pictures; "
                f"load it in float32 or bfloat16:{listed}"
            )
        del vae, pairs
        _free_memory()
    return keys


def _encode_pictures(
    vae: AutoencoderKL, wanted: Mapping[str, tuple[Row, str]], size: int, batch_size: int, bad: list[Row]
) -> Iterator[tuple[str, Tensor]]:
    """Key and (2, C, H, W), posterior mean and standard deviation; those that fail are added to `bad`.

    wanted  row and digest of each key
    """
    keys = list(wanted)
    with ThreadPoolExecutor(batch_size) as pool:
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            pixels = torch.stack(list(pool.map(lambda key: _pixels(*wanted[key], size), batch)))
            for key, moments in zip(batch, encode_moments(vae, pixels), strict=True):
                if moments.isfinite().all():
                    yield key, moments
                else:
                    bad.append(wanted[key][0])


def _pixels(row: Row, digest: str, size: int) -> Tensor:
    """A picture's pixels, of the very bytes that its digest is of: another program may write it meanwhile."""
    content = row.content()
    if row.digest(content) != digest:
        raise UserError(f"{row.where} was changed while the run began; leave the pictures as they are and start again")
    return fitted(row.opened(content).picture, size)


def component_id(
    base: str | Path,
    *subfolders: str,
    dtype: torch.dtype,
    commit: str | None = None,
    memo: Path | None = None,
) -> str:
    """A name for models and the dtype they run in that changes when they do, found without loading weights.

    A local folder is named by the SHA-256 of all files of the subfolders; a Hub id, whose files may not be
    here yet, by id and commit.

    memo   a JSON file that remembers each file's hash by path and `_stamp`, since hashing T5-XXL takes long
    """
    folder = Path(base)
    if not folder.is_dir():
        return f"{base}/{'+'.join(subfolders)}@{commit} {dtype}"
    known: dict[str, list[object]] = _read_memo(memo)
    before = dict(known)
    digest = hashlib.sha256()
    for subfolder in subfolders:
        if not (folder / subfolder).is_dir():
            raise UserError(f"the model folder {folder} has no subfolder {subfolder}")
        for path in sorted((folder / subfolder).rglob("*")):
            if path.is_file():
                line = f"{path.relative_to(folder).as_posix()} {_remembered(path, known)}\n"
                digest.update(line.encode(errors="backslashreplace"))  # a name may be no text
    if memo and known != before:
        with suppress(UserError):  # it is only a memory, and a full cache may be read-only
            write_text(memo, json.dumps(known, indent=1))
    return f"{'+'.join(subfolders)} {digest.hexdigest()[:32]} {dtype}"


def _remembered(path: Path, known: dict[str, list[object]]) -> object:
    name, stamp = str(path.resolve()), _stamp(path)  # before it is hashed: what comes later has another stamp
    if known.get(name, [])[:-1] != stamp:
        known[name] = [*stamp, _file_sha256(path)]
    return known[name][-1]


def _stamp(path: Path) -> list[object]:
    """What changes when a file does, without reading it.

    Size and time of change are no proof: fine-tunes of one model have one size, and `cp -p`, rsync and unpacking set
    the time of another file. Its inode changes with a file moved into its place, and the time at which the inode
    changed cannot be set (on Windows that is the file's birth, which what is written into it there leaves alone).
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_memo(memo: Path | None) -> dict[str, list[object]]:
    try:
        found = json.loads(memo.read_text(encoding="utf-8")) if memo else {}
    except (OSError, ValueError, RecursionError):  # absent or damaged: it is only a memory
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {
        name: entry
        for name, entry in entries
        if isinstance(entry, list) and entry and _SHA256.fullmatch(str(entry[-1]))
    }


def _key(about: Mapping[str, object], content: str) -> str:
    return sha256(json.dumps([dict(about), content], sort_keys=True).encode())


def _file_sha256(path: Path) -> str:
    with explained(path, "read"):
        return sha256(path)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
