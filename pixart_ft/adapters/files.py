"""What a saved adapter consists of, and where a path leads to one. No torch: a wrong path is known at once.

An adapter is a folder: adapter_model.safetensors and adapter_config.json, which plain peft reads, pixart_ft.json (what
it was trained on and how), null_caption.safetensors (the embedding that stands for no caption), and manifest.json with
the size and SHA-256 of these.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field

from pixart_ft.config.train import LARGEST_RANK, Init, Scale, Weights
from pixart_ft.diffusion.intervals import WHOLE, Interval, covers, end_faults, or_whole, shown
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.runs.manifest import MANIFEST, check_whole
from pixart_ft.runs.metadata import METADATA, STRICT, AdapterMetadata, Rank, Text, checked, read_metadata, some
from pixart_ft.runs.results import brought_here, find

UNKNOWN_BASE = "0" * 16  # the fingerprint of the base of another program's adapter, which none has
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraSettings:
    """W becomes W + (alpha / rank) B A in every Linear or Conv2d whose name is, or ends in, one of `targets`.

    A is (rank, inputs), B is (outputs, rank); `dropout` is the share of the inputs of A zeroed in training.
    rslora   sqrt(rank) in place of rank
    dora     each row of the sum then has a length that is trained too
    init     A and B at the start, which is taken away again: nothing, or of W its largest singular vectors (pissa) or
             its first rows by QR (olora). What is saved is plain, of twice the rank
    options  what else of peft's LoraConfig a saved one says: ranks and alphas of single layers, a bias of B, ...

    A text in place of `targets` is a regular expression for the whole name.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str = DEFAULT_TARGETS
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "default"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftSettings:
    """Any other adapter of peft: its type as peft names it, the layers, and what else its configuration says."""

    peft_type: str
    targets: tuple[str, ...] | str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ForeignPlace:
    """Where an adapter of another program lies: `adopting` takes it in, for a base.

    name      as it was given
    file      of its weights
    config    the adapter_config.json beside it, if there is one
    interval  where it is to act; None: everywhere
    """

    name: str
    file: Path
    config: Path | None
    interval: Interval | None = None

    @classmethod
    def at(cls, path: str | Path, interval: Interval | None = None) -> Self | None:
        """A file of weights, or a folder, or a Hub id, with one and nothing of ours; None for anything else.

        Raises UserError where there are several, and for a Hub id that cannot be had.
        """
        if not str(path).strip():
            return None
        place = brought_here(Path(path).expanduser(), "adapter")
        if place.is_dir() and not any((place / own).exists() for own in _OURS):
            files = next((found for suffix in _SUFFIXES if (found := sorted(place.glob(f"*{suffix}")))), [])
            if len(files) > 1:
                raise UserError(
                    f"adapter: {path} holds {len(files)} files of weights ({some(file.name for file in files)}) and "
                    f"nothing of this package; give one of them"
                )
            place = files[0] if files else place
        if not (place.is_file() and place.suffix in _SUFFIXES):
            return None
        config = place.with_name(CONFIG)
        return cls(str(path), place, config if config.is_file() else None, interval)


_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_OURS = (METADATA, MANIFEST, "model_index.json", "final", "checkpoints")


@dataclass(frozen=True, eq=False)
class Taken:
    """What another program's file holds, by peft's names, and the alpha that was told of it since it says none."""

    file: Path
    weights: Mapping[str, Any]
    lora_alpha: float | None


@dataclass(frozen=True)
class Adapter:
    """A saved adapter as it describes itself; `adapters` loads its weights.

    name       as it was given: an adapter folder, a run folder, RUN@STEP, or a Hub id
    folder     the adapter folder that this means
    metadata   what it was trained on and how
    settings   of its LoRA, or of what else of peft's it is
    interval   the network's timesteps that it is to act at, both ends included
    taken      of another program's: its weights; its metadata are then what is assumed
    """

    name: str
    folder: Path
    metadata: AdapterMetadata
    settings: LoraSettings | PeftSettings
    interval: Interval = WHOLE
    taken: Taken | None = None

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return [self.folder / WEIGHTS if self.taken is None else self.taken.file]

    @classmethod
    def read(cls, path: str | Path, *, weights: Weights = "ema", interval: Interval | None = None) -> Self:
        """The adapter behind `path`: its folder, the final one of a run's, what RUN@STEP kept then, or one of the Hub.

        `weights` as of `find`. `interval`: where it is to act; None: where it was trained.
        Raises UserError if there is no such adapter or interval, or its files are damaged or of another version; warns
        of an interval that goes beyond the training's.
        """
        metadata_of = cache(read_metadata)  # where it is may depend on what is found there
        folder = find(path, "adapter", weights, metadata_of)
        metadata = metadata_of(folder)
        if metadata.kind == "full":
            raise UserError(f"adapter: {folder} is a whole model; give it as the model (--model, model.base)")
        check_whole(folder, "adapter")
        settings = read_settings(folder)
        _check_agreement(folder, metadata, settings)
        return cls(str(path), folder, metadata, settings, acting_interval(metadata, interval))


def find_adapter(path: str | Path, weights: Weights, interval: Interval | None) -> Adapter | ForeignPlace:
    """The adapter behind a path, or where one of another program lies; arguments and errors as of `Adapter.read`."""
    return ForeignPlace.at(path, interval) or Adapter.read(path, weights=weights, interval=interval)


def acting_interval(metadata: AdapterMetadata, asked: Interval | None) -> Interval:
    """The timesteps at which an adapter is to act: those asked for, else those that it was trained at.

    Raises UserError for an interval that there is not; warns of one that goes beyond the training's.
    """
    last = metadata.last_timestep
    trained_at = or_whole(metadata.interval, last)
    if asked is None:
        return trained_at
    if faults := end_faults("lora_interval", asked, last):
        raise UserError(faults[0])
    if not covers(trained_at, asked):
        warnings.warn(
            f"lora_interval {shown(asked)} goes beyond {shown(trained_at)}, the timesteps that this adapter was "
            "trained at: it never learnt what to do there",
            stacklevel=1,
        )
    return or_whole(asked, last)


def read_settings(folder: Path) -> LoraSettings | PeftSettings:
    """What an adapter folder's adapter_config.json says; UserError for what cannot be, or cannot be done here."""
    path = folder / CONFIG
    content = read_object(path, "adapter", "copy the adapter again")
    given = {key: value for key, value in content.items() if value is not None and key not in _NOT_OF_ITS_TYPE}
    if content.get("peft_type") != "LORA":
        head = checked(_AnyFile, path, {key: content[key] for key in _HEAD if key in content})
        options = {key: value for key, value in content.items() if key not in (*_NOT_OF_ITS_TYPE, *_HEAD[:2])}
        return PeftSettings(head.peft_type, head.target_modules, options)
    known = {one.name for one in fields(_LoraFile)}
    others = {key: value for key, value in given.items() if key not in known}
    if strange := [f"{key} is {str(value)[:60]}" for key, value in others.items() if not _is_idle(key, value)]:
        raise UserError(
            f"adapter: {path}: {', '.join(strange)}: peft draws otherwise for it, and this package cannot; load it "
            "with peft, merge it there, and give the merged model"
        )
    lora = checked(_LoraFile, path, {key: given[key] for key in known if key in given})
    return LoraSettings(
        rank=lora.r,
        alpha=lora.lora_alpha,
        targets=lora.target_modules,
        dropout=lora.lora_dropout,
        rslora=lora.use_rslora,
        dora=lora.use_dora,
        options={
            key: value
            for key in _OPTIONS
            if (value := given.get(key, {})) is not False and value not in ([], {})  # 0 is the number of a layer
        },
    )


def _check_agreement(folder: Path, metadata: AdapterMetadata, settings: LoraSettings | PeftSettings) -> None:
    """Raise UserError where the two files of a folder say different things of one adapter."""
    pairs: dict[str, tuple[object, object]] = {"kind": (metadata.kind, "peft")}
    if isinstance(settings, LoraSettings):
        pairs = {
            "kind": (metadata.kind, "lora"),
            "rank": (metadata.rank, settings.rank),
            "alpha": (metadata.alpha, settings.alpha),
        }
    if apart := [f"{what} {one} and {other}" for what, (one, other) in pairs.items() if one != other]:
        raise UserError(
            f"adapter: {METADATA} and {CONFIG} in {folder} contradict each other ({', '.join(apart)}); copy the "
            "adapter again"
        )


# What the configurations of all types of peft have and that says nothing of what is drawn.
_NOT_OF_ITS_TYPE = (
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "revision",
    "task_type",
    "peft_version",
)
_HEAD = ("peft_type", "target_modules", "r")
# Of a LoRA's: what it began as, where that left the base as it was; settings of what is refused when it is on.
_IDLE = {"peft_type", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_OPTIONS = ("rank_pattern", "alpha_pattern", "lora_bias", "exclude_modules", "layers_to_transform", "layers_pattern")

_Names = Annotated[tuple[Text, ...], Field(min_length=1)] | Text


@dataclass(frozen=True)
class _AnyFile:
    """adapter_config.json of what is no LoRA; the rest is for peft to judge."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    peft_type: Text
    target_modules: _Names
    r: Annotated[int, Field(ge=0, le=LARGEST_RANK)] | None = None


@dataclass(frozen=True)
class _LoraFile:
    """adapter_config.json of a LoRA, as peft writes it: what of it changes what is drawn."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    r: Rank
    lora_alpha: Scale
    target_modules: _Names
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[Text, Rank] = field(default_factory=dict)
    alpha_pattern: dict[Text, Scale] = field(default_factory=dict)
    exclude_modules: _Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names | None = None


def _is_idle(key: str, value: object) -> bool:
    """Whether a key of a LoRA's configuration, which nothing here asks for, says nothing either."""
    if key == "init_lora_weights":
        return value in _BEGINNINGS
    return key in _IDLE or value in (False, "none", [], {})
