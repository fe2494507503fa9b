"""Latents and text embeddings, encoded once and kept on disk under a key that names all they depend on.

Shapes: C latent channels, H W latent size, L tokens, D text width.
"""

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.data.pixels import TRANSFORM, Fit, Size, cut, fitted
from pixart_ft.data.rows import Row
from pixart_ft.data.seen import in_threads, verified
from pixart_ft.data.store import Array, TensorStore
from pixart_ft.errors import UserError
from pixart_ft.files import explained, sha256, stamp, write_text
from pixart_ft.model.projection import Projection
from pixart_ft.model.text import TEXT_PREPARATION, encode_each, prepare_text, warn_of_losses
from pixart_ft.model.vae import encode_moments

WITHOUT_LATENTS = "pictures for which the VAE gives NaN or infinity (move them out, or mend it)"
CAPTIONS_AT_ONCE = 16  # encoded in one call
Share = tuple[int, int]  # (place, count): of what is missing, a process encodes its part among so many
ALONE: Share = (0, 1)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CachedPictures:
    """The training data as indices into a store: item i is text_keys[i] with one of its latents; all are held.

    latent_keys   of each item as many, its views, one after the other
    text_keys     those beyond the items are further captions
    """

    lost: AbstractSet[int] = frozenset()  # those found to have no latents: here they were left out before

    def __init__(
        self, store: TensorStore, latent_keys: Sequence[str], text_keys: Sequence[str], views: int = 1
    ) -> None:
        self.views = views
        assert len(latent_keys) % views == 0 and len(latent_keys) // views <= len(text_keys)
        self._latents, self._texts = store.held(latent_keys), store.held(text_keys)

    def __len__(self) -> int:
        return len(self._latents) // self.views

    def sizes(self) -> tuple[Array, Array]:
        """The bytes of all latents and of all texts, (N,) int64 each."""
        return self._latents.sizes(), self._texts.sizes()

    def latents(self, indices: Sequence[int], views: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, each (N, C, H, W) float32, as the VAE gives them; the first view's.

        `model.vae.LatentScale` makes the transformer's latents of them, so neither its scale nor its shift is in a key.
        """
        found = self._moments(indices, views or [0] * len(indices))
        return torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found])

    def areas(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """What masks leave of them, (N, C, H, W) float32: 1 where there is none."""
        found = self._moments(indices, views)
        return torch.stack([one[2] if len(one) > 2 else torch.ones_like(one[0]) for one in found])

    def _moments(self, indices: Sequence[int], views: Sequence[int]) -> list[Tensor]:
        return [self._latents[index * self.views + view] for index, view in zip(indices, views, strict=True)]

    def texts(self, indices: Sequence[int]) -> list[Tensor]:
        """The caption embeddings, each (L_i, D) in the text encoder's dtype."""
        return [self._texts[index] for index in indices]


def cache_captions(
    store: TensorStore,
    captions: Sequence[str],
    *,
    load_text_encoder: Callable[[], tuple[PreTrainedTokenizerBase, T5EncoderModel]],
    encoder_id: str,
    projection: Projection | None = None,
    max_tokens: int = 300,
    batch_size: int = CAPTIONS_AT_ONCE,
    share: Share = ALONE,
    progress: bool = True,
) -> list[str]:
    """Encode the captions that the store misses, or a share of them; returns the key of each. "" is a caption too.

    With a projection captions are kept as that gives them; a last key is that of "" as T5 gives it.

    load_text_encoder   gives tokenizer and encoder; called only if something is missing, and its result freed
    encoder_id          names tokenizer, encoder and dtype: see `component_id`
    """
    texts = [prepare_text(caption) for caption in captions]
    about = {"preparation": TEXT_PREPARATION, "encoder": encoder_id, "max_tokens": max_tokens}
    through = about if projection is None else about | {"projection": projection.mark}
    keys = [_key(through, text) for text in texts]
    text_of = dict(zip(keys, texts, strict=True))
    if projection is not None:
        keys.append(plain := _key(about, ""))
        text_of[plain] = ""
    if missing := _share(store.missing(keys), share, cost=lambda key: len(text_of[key])):
        store.check_writable()
        tokenizer, text_encoder = load_text_encoder()
        if share[0] == 0:  # of all texts: one may become the tokens of another that is there
            warn_of_losses(tokenizer, texts, max_tokens)
        wanted = [text_of[key] for key in missing]
        found = encode_each(text_encoder, tokenizer, wanted, max_tokens=max_tokens, batch_size=batch_size)
        pairs = (
            (key, embedding if projection is None or key == plain else projection.of(embedding))
            for key, embedding in ((missing[index], embedding) for index, embedding in found)
        )
        store.fill(tqdm(pairs, "captions encoded", len(missing), disable=None if progress else True))
        del tokenizer, text_encoder, found, pairs
        _free_memory()
    return keys


def pictures_at_once(size: Size) -> int:
    """How many of a size are encoded in one call: four, but no more pixels than four of 512 x 512 have."""
    width, height = size
    return max(1, min(4, 4 * 512**2 // (width * height)))


def cache_pictures(
    store: TensorStore,
    rows: Sequence[Row],
    *,
    load_vae: Callable[[], AutoencoderKL],
    vae_id: str,
    views: Sequence[Sequence[Fit]],
    digests: Sequence[str] | None = None,
    batch_size: int | None = None,
    share: Share = ALONE,
    progress: bool = True,
) -> list[str]:
    """Encode the views that the store misses, or a share of them; returns their keys, those of a picture together.

    load_vae   called only if something is missing, and its result freed
    vae_id     names the VAE and its dtype: see `component_id`
    views      how each picture is fitted, of all as often
    digests    of the rows, where all were read and decoded before: see `look_at`; else they are here
    batch_size pictures of one call; None: `pictures_at_once`

    A view for which the VAE gives NaN or infinity is kept as an empty tensor, see `without_latents`. Raises
    UserError listing the pictures that cannot be read, or that changed since their digest was taken.
    """
    about = {"transform": TRANSFORM, "vae": vae_id}
    digests = [found.digest for found in verified(rows, progress=progress)] if digests is None else digests
    pictures = zip(rows, digests, views, strict=True)
    each = [(row, digest, fit) for row, digest, fits in pictures for fit in fits]
    keys = [_key({**about, "size": fit.name}, digest) for _, digest, fit in each]
    of_key = dict(zip(keys, each, strict=True))
    if missing := _share(store.missing(keys), share):
        store.check_writable()
        vae = load_vae()
        missing.sort(key=lambda key: of_key[key][2].size)  # as it is, where all are of one size
        pairs = _encode_pictures(vae, {key: of_key[key] for key in missing}, batch_size)
        store.fill(tqdm(pairs, "pictures encoded", len(missing), disable=None if progress else True))
        del vae, pairs
        _free_memory()
    return keys


def without_latents(store: TensorStore, keys: Sequence[str]) -> list[int]:
    """The numbers of the pictures for which the VAE gave NaN or infinity, of those with these keys."""
    return [int(number) for number in np.flatnonzero(store.held(keys).sizes() == 0)]


def _share(missing: list[str], share: Share, cost: Callable[[str], int] = lambda _: 1) -> list[str]:
    """This process's part, in the order given: all parts together are all, and cost about the same."""
    place, count = share
    mine = set(sorted(missing, key=cost)[place::count])
    return [key for key in missing if key in mine]


def _encode_pictures(
    vae: AutoencoderKL, wanted: Mapping[str, tuple[Row, str, Fit]], batch_size: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Key and (2 or 3, C, H, W): posterior mean and standard deviation, or nothing where that is not finite; and what
    the mask leaves, where there is one.

    wanted  row, digest and fit of each key; those of one size follow each other
    """
    most = max(batch_size or pictures_at_once(fit.size) for _, _, fit in wanted.values())
    pixels = in_threads(lambda key: pixels_of(*wanted[key]), list(wanted), ahead=2 * most)  # while others are encoded
    for size, of_size in groupby(wanted, key=lambda key: wanted[key][2].size):
        while batch := list(islice(of_size, batch_size or pictures_at_once(size))):
            found = encode_moments(vae, torch.stack(list(islice(pixels, len(batch)))))
            for key, moments in zip(batch, found, strict=True):
                row, _, fit = wanted[key]
                area = [] if row.mask is None else [area_of(row, fit, moments[0])[None]]
                yield key, torch.cat([moments, *area]) if moments.isfinite().all() else moments.new_empty(0)


def area_of(row: Row, fit: Fit, like: Tensor) -> Tensor:
    """What a picture's mask leaves of each of its latents (C, H, W), from 0 to 1. Raises UserError."""
    mask, (_, height, width) = row.shown(), like.shape
    assert mask is not None
    shown = torch.from_numpy(np.array(cut(mask, fit))).to(torch.float32) / 255
    return adaptive_avg_pool2d(shown[None], (height, width)).to(like).expand_as(like)


def pixels_of(row: Row, digest: str, fit: Fit) -> Tensor:
    """A picture's pixels, of the very bytes that its digest is of: another program may write it meanwhile.

    Raises UserError for a picture or mask that is another now, or that cannot be read.
    """
    content = row.content()
    if row.digest(content) != digest:
        raise UserError(f"{row.where} was changed since the run began; leave the pictures as they are and start again")
    return fitted(row.opened(content).picture, fit)


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

    memo   a JSON file that remembers each file's hash by path and `stamp`, since hashing T5-XXL takes long
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
    name, now = str(path.resolve()), stamp(path)  # before it is hashed: what comes later has another stamp
    if known.get(name, [])[:-1] != now:
        known[name] = [*now, _file_sha256(path)]
    return known[name][-1]


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
