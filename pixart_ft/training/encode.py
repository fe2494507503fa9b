"""The data of a run: rows from the folders, everything that T5 and the VAE are needed for encoded once."""

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pixart_ft.config.sources import Use
from pixart_ft.config.text import numbered
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.buckets import Sized, view_count, whole_fit
from pixart_ft.data.cache import (
    ALONE,
    WITHOUT_LATENTS,
    CachedPictures,
    Share,
    cache_captions,
    cache_pictures,
    component_id,
    without_latents,
)
from pixart_ft.data.live import LivePictures
from pixart_ft.data.rows import Account, Row, distinct, listed, split
from pixart_ft.data.seen import Seen, look_at, verified
from pixart_ft.data.sources import survey_source, times_shown
from pixart_ft.data.store import TensorStore
from pixart_ft.data.tags import in_orders
from pixart_ft.errors import Mistakes
from pixart_ft.evaluation.held_out import HeldOutSet
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.projection import Projection
from pixart_ft.model.vae import LatentScale
from pixart_ft.training.stopping import AllFailed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that train.mixed_precision, which is settled by now, computes in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a run.

    train, prior   each picture as often as an epoch shows it
    held, beyond   held out; beyond validation.pictures they are not measured
    sources        the pictures of each source that can be used, by its key
    accounts       of each source
    """

    train: list[Row]
    held: list[Row]
    beyond: list[Row]
    prior: list[Row]
    sources: dict[str, list[Row]]
    accounts: dict[str, Account]
    seen: dict[Row, Seen]

    @property
    def learned(self) -> list[Row]:
        """Those that are trained on, the prior's last."""
        return [*self.train, *self.prior]

    @property
    def digests(self) -> list[str]:
        """What names each picture: those of `learned`, then those of `held`."""
        return [self.seen[row].digest for row in (*self.learned, *self.held)]

    @property
    def uses(self) -> dict[str, dict[str, int]]:
        """Of each source, how many of its pictures are for what."""
        parts = {"trained on": self.train, "measured": self.held, "of the prior": self.prior}
        parts["held out beyond validation.pictures"] = self.beyond
        numbers = {use: set(map(id, part)) for use, part in parts.items()}
        counts = {
            key: {use: sum(id(row) in part for row in rows) for use, part in numbers.items()}
            for key, rows in self.sources.items()
        }
        return {key: of | {"left out": self.accounts[key].pictures - sum(of.values())} for key, of in counts.items()}

    def facts(self) -> list[str]:
        """What became of every picture in the sources, a line each."""
        lines, uses = [], self.uses
        for key, account in self.accounts.items():
            told = ", ".join(f"{count:,} {use}" for use, count in uses[key].items() if count)
            lacking = numbered(account.orphans, "caption or text file", "captions or text files")
            orphans = f"; {lacking} without a picture" if account.orphans else ""
            lines.append(f"{'in ' + key:<18} {numbered(account.pictures, 'picture')}: {told}{orphans}")
        pictures = distinct(self.train)
        if any(row.mask is not None for row in pictures):
            masked = sum(self.seen[row].shown is not None for row in pictures)
            lines.append(
                f"{'masks':<18} {masked:,} of {len(pictures):,} pictures are trained on where theirs are white"
            )
        texts = sum(len(row.captions) for row in pictures)
        if texts > len(pictures):
            per = texts / len(pictures)
            cost = f"{per:.3g} times the work of T5 and its place in data.cache"
            lines.append(
                f"{'captions':<18} {texts:,} of {numbered(len(pictures), 'picture')}, one in each draw: {cost}"
            )
        return lines


def read_pictures(config: TrainConfig, *, remember: bool = False, progress: bool = True) -> Pictures:
    """All pictures of a run, each read and decoded once; every problem is reported by `Account.usable`.

    remember   write into data.cache which were decoded, so that the next time they need not be
    """
    sources, mistakes = config.data.every_source(), Mistakes()
    if not any(source.use == "train" for source in sources.values()):
        mistakes.add("no source is trained on; give data.folder, or one of data.sources with use: train")
    accounts: dict[str, Account] = {}
    rows: dict[str, list[Row]] = {}
    seen: dict[Row, Seen] = {}
    for key, source in sources.items():
        with mistakes.noted():
            account = survey_source(source, key)
            found = look_at(account.rows, config.data.cache / "pictures.json", remember=remember, progress=progress)
            pairs = list(zip(account.rows, found, strict=True))
            seen.update((row, one) for row, one in pairs if isinstance(one, Seen))
            accounts[key] = account.without({row: one for row, one in pairs if isinstance(one, str)})
            rows[key] = accounts[key].usable(strict=config.data.strict)
    mistakes.raise_if_any()

    def of(use: Use) -> list[Row]:
        return [row for key, source in sources.items() if source.use == use for row in rows[key]]

    learned, held = of("train"), of("held_out")
    if not any(source.use == "held_out" for source in sources.values()):
        learned, held = split(learned, config.data.held_out_fraction, config.run.seed)
    if config.data.shuffle_tags:  # what is measured is measured as it is written
        turned = {id(row): in_orders(row, config.data.caption_variants, config.data.keep_tags) for row in learned}
        seen.update((turned[id(row)], seen[row]) for row in learned)
        learned = [turned[id(row)] for row in learned]
        rows = {key: [turned.get(id(row), row) for row in part] for key, part in rows.items()}

    def shown(use: Use, part: list[Row]) -> list[Row]:
        used = set(map(id, part))
        ours = {key: [row for row in rows[key] if id(row) in used] for key in rows if sources[key].use == use}
        times = times_shown({key: sources[key] for key in ours}, {key: len(one) for key, one in ours.items()})
        return [row for key, one in ours.items() for row in one * times[key]]

    most = config.validation.pictures
    return Pictures(
        train=shown("train", learned),
        held=held[:most],
        beyond=held[most:],
        prior=shown("prior", of("prior")),
        sources=rows,
        accounts=accounts,
        seen=seen,
    )


def read_squares(config: TrainConfig, side: int) -> tuple[Sized, Sized]:
    """Training and held-out pictures, see `read_pictures`, all of one size."""
    pictures = read_pictures(config)
    return Sized.square(pictures.train, side), Sized.square(pictures.held, side)


def warn_of_copies(learned: Sequence[Row], held: Sequence[Row], digests: Sequence[str]) -> None:
    """Warn of held-out pictures that are trained on too; `digests` of the one, then of the other."""
    trained = dict(zip(digests, learned, strict=False))
    held_out = zip(held, digests[len(learned) :], strict=True)
    copies = [f"{row.name} = {trained[digest].name}" for row, digest in held_out if digest in trained]
    if copies:
        warnings.warn(
            listed("held-out pictures that are trained on too, so they measure nothing", copies), stacklevel=2
        )


def vae_id(config: TrainConfig, base: Base) -> str:
    """Names the VAE by its content, see `component_id`."""
    return _component_id(config, base, "vae", dtype=torch.float32)


def text_encoder_id(config: TrainConfig, base: Base) -> str:
    """Names the tokenizer, T5, the dtype it runs in and the few bits it is held in, see `component_id`."""
    named = _component_id(config, base, "tokenizer", "text_encoder", dtype=text_dtype(config))
    how = config.model.text_encoder_quantization
    return named if how == "none" else f"{named} {how}"


def _component_id(config: TrainConfig, base: Base, *subfolders: str, dtype: torch.dtype) -> str:
    memo = config.data.cache / "files.json"
    whole = base.whole
    return component_id(whole.place, *subfolders, dtype=dtype, commit=whole.commit, memo=memo)


def text_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that T5 encodes in."""
    return DTYPES.get(config.model.text_encoder_dtype) or compute_dtype(config)


@dataclass(frozen=True)
class Encoded:
    """Everything that T5 and the VAE are needed for, made before the transformer is loaded.

    captions   of the pictures of `train` that have several, see `TrainingSet`
    """

    train: CachedPictures | LivePictures
    learned: list[int]  # which of the pictures to train on these are
    held_out: list[HeldOutSet]  # one for each size
    null_caption: Tensor  # as T5 gives it
    null_text: Tensor  # what stands for a caption that is left out, as the network takes it
    prompts: list[Tensor]
    scale: LatentScale
    captions: dict[int, tuple[Sequence[int], Sequence[float]]]


def encode_once(
    config: TrainConfig,
    base: Base,
    train: Sized,
    held: Sized,
    accelerator: Accelerator,
    digests: Sequence[str] | None = None,
    *,
    prior: int = 0,
) -> Encoded:
    """Fill the cache, each process a share of it, then read it on all; what it holds already is not encoded again.

    Pictures go first, since one that cannot be read should be known before T5 is even downloaded. `digests` are those
    of the pictures of `train`, then of `held`, where they are known; the last `prior` of `train` are the prior's. With
    data.live those of `train` are left for when they are drawn.
    """
    device, show, data = accelerator.device, accelerator.is_main_process, config.data
    cached, each = Sized([], []) if data.live else train, view_count(data)
    everything = [*cached.rows, *held.rows]
    views = [*cached.views(data), *([whole_fit(size, data.crop)] for size in held.sizes)]
    if digests is None:
        digests = [found.digest for found in verified([*train.rows, *held.rows])]
    of_learned, digests = digests[: len(train.rows)], digests[len(train.rows) - len(cached.rows) :]
    with accelerator.main_process_first():  # models are hashed and the index is written once
        store = TensorStore(config.data.cache)
        of_vae, of_text = vae_id(config, base), text_encoder_id(config, base)

    def text_encoder() -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
        return loading.load_text_encoder(
            base, dtype=text_dtype(config), quantization=config.model.text_encoder_quantization, device=device
        )

    def vae() -> AutoencoderKL:
        return loading.load_vae(base, dtype=torch.float32).to(device)

    def encode_pictures(share: Share) -> list[str]:
        return cache_pictures(
            store,
            everything,
            load_vae=vae,
            vae_id=of_vae,
            digests=digests,
            views=views,
            share=share,
            progress=show,
        )

    picture_keys = _divided(store, accelerator, encode_pictures)
    owners = [number for number, fits in enumerate(views) for _ in fits]  # of the keys
    cut = len(cached.rows)
    own = max(0, cut - prior)
    uses = {"trained on": range(own), "of the prior": range(own, cut), "measured": range(cut, len(everything))}
    kept = _with_latents(config, store, picture_keys, owners, everything, uses)
    learned, shown = [number for number in kept if number < cut], [everything[number] for number in kept]
    count, known = len(learned), len(shown)
    null = known + len(config.validation.prompts)
    texts = [row.caption for row in shown] + list(config.validation.prompts) + [""]
    texts += [caption for row in shown[:count] for caption in row.others]

    projection = None
    if data.project_captions:
        projection = Projection.load(base)
        projection.layer.to(device)

    def encode_captions(share: Share) -> list[str]:
        return cache_captions(
            store,
            texts,
            load_text_encoder=text_encoder,
            encoder_id=of_text,
            projection=projection,
            max_tokens=config.data.max_tokens,
            share=share,
            progress=show,
        )

    text_keys = _divided(store, accelerator, encode_captions)
    of_t5 = text_keys[null] if projection is None else text_keys.pop()
    if show:
        store.write_index()
    still = set(kept)
    latent_keys = [key for key, owner in zip(picture_keys, owners, strict=True) if owner in still]
    measured = CachedPictures(store, latent_keys[count * each :], text_keys[count:known])
    of_train: CachedPictures | LivePictures
    if data.live:
        learned = list(range(len(train.rows)))
        of_train = LivePictures(
            train.rows,
            of_learned,
            train.views(data),
            vae(),
            *text_encoder(),
            max_tokens=data.max_tokens,
            strict=data.strict,
        )
    else:
        texts_of = text_keys[:count] + text_keys[null + 1 :]
        of_train = CachedPictures(store, latent_keys[: count * each], texts_of, each)
    return Encoded(
        train=of_train,
        learned=learned,
        held_out=HeldOutSet.of_sizes(
            [base.latent_scale.scaled(measured.latents([number])[0])[0] for number in range(len(measured))],
            measured.texts(range(len(measured))),
            config.validation.timesteps,
            config.run.seed,
        ),
        null_caption=store.get(of_t5),
        null_text=store.get(text_keys[null]),
        prompts=[store.get(key) for key in text_keys[known:null]],
        scale=base.latent_scale,
        captions=several_captions([train.rows[number] for number in learned]),
    )


def several_captions(rows: Sequence[Row]) -> dict[int, tuple[Sequence[int], Sequence[float]]]:
    """Of the rows that have several captions, where the others come one after another behind the first of all."""
    found: dict[int, tuple[Sequence[int], Sequence[float]]] = {}
    end = len(rows)
    for number, row in enumerate(rows):
        if row.others:
            found[number] = ((number, *range(end, end + len(row.others))), row.shares)
            end += len(row.others)
    return found


def _divided(store: TensorStore, accelerator: Accelerator, encode: Callable[[Share], list[str]]) -> list[str]:
    """Let each process encode its share of what the store misses; returns the keys that `encode` gives.

    All processes share the work. A machine with a folder of its own does for itself what that lacks then, and at last
    a process for itself.
    """
    hosts, rank = gather_object([platform.node()]), accelerator.process_index  # all have opened the folder by now
    beside = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    for share in ((rank, len(hosts)), (beside.index(rank), len(beside)), ALONE):
        before = len(store.written)
        keys = encode(share)
        store.meet(gather_object(store.written[before:]))
        if not any(gather_object([bool(store.missing(keys))])):
            return keys
    raise AssertionError("what was encoded is not there")


def _with_latents(
    config: TrainConfig,
    store: TensorStore,
    keys: Sequence[str],
    owners: Sequence[int],
    rows: Sequence[Row],
    uses: Mapping[str, range],
) -> list[int]:
    """The numbers of the pictures all of whose views have latents; the others are named. `owners`: pictures of keys.

    Raises AllFailed for these if data.strict is true, or if they are all of a use.
    """
    lost = sorted({owners[number] for number in without_latents(store, keys)})
    if lost:
        named = listed(WITHOUT_LATENTS, [str(rows[number].where) for number in lost])
        anew = f"delete {store.folder} or give another --data.cache"
        named += f"\n  the cache keeps that: if the fault was a passing one, {anew}"
        if whole := [use for use, numbers in uses.items() if numbers and set(numbers) <= set(lost)]:
            raise AllFailed(f"no picture that is {' or '.join(whole)} can be used:\n{named}")
        if config.data.strict:
            raise AllFailed(f"some pictures cannot be used:\n{named}\n  --data.strict false leaves them out")
        warnings.warn(f"left out:\n{named}", stacklevel=3)
    return sorted(set(range(len(rows))).difference(lost))
