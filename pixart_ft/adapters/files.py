"""What a saved adapter consists of, and where a path leads to one. No torch: a wrong path is known at once.

An adapter is a folder: adapter_model.safetensors and adapter_config.json, which plain peft reads, pixart_ft.json (what
it was trained on and how) and null_caption.safetensors (the embedding that stands for no caption).
"""

import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self

from pixart_ft.config.train import LARGEST_RANK, Init, Weights
from pixart_ft.diffusion.intervals import WHOLE, Interval, covers, end_faults, or_whole, shown
from pixart_ft.diffusion.names import PredictionType, TimeConditioning, VarianceState
from pixart_ft.errors import UserError
from pixart_ft.files import read_object
from pixart_ft.runs.folder import RunFolder

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# Where a finished run keeps its adapters: the one to use, and the last weights if that one is an average.
FINAL_ADAPTERS = {"ema": "final/adapter", "raw": "final/adapter_raw"}

METADATA, WEIGHTS, CONFIG = "pixart_ft.json", "adapter_model.safetensors", "adapter_config.json"
NULL_CAPTION = "null_caption.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """W becomes W + (alpha / rank) B A in every Linear or Conv2d whose name is, or ends in, one of `targets`.

    A is (rank, inputs), B is (outputs, rank); `dropout` is the share of the inputs of A zeroed in training.
    rslora   sqrt(rank) in place of rank
    dora     each row of the sum then has a length that is trained too
    init     A and B at the start, which is taken away again: nothing, or of W its largest singular vectors (pissa) or
             its first rows by QR (olora). What is saved is plain, of twice the rank
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "default"


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter was trained on and how; the content of pixart_ft.json.

    base               as given in model.base
    base_fingerprint   `loading.fingerprint` of that base
    prediction_type    what the network predicts
    schedule           the noise schedule it was trained with, in the words of a diffusers scheduler config
    variance           the state of the learned variance after this training
    rank, alpha        of the LoRA
    max_tokens         longest caption, in tokens
    text_preparation   how captions were prepared before the tokenizer
    weights            whether these are the averaged or the last weights
    samples_seen       pictures drawn in training, repeats included
    step               optimizer steps done; None: made before this was kept
    revision           of a Hub base, if one was asked for
    time_conditioning  what the network is told of another schedule's noise: its index, or where the base met that SNR
    interval           the network's timesteps that it was trained at, and acts at unless told otherwise
    """

    base: str
    base_fingerprint: str
    prediction_type: "PredictionType"
    schedule: Mapping[str, object]
    variance: VarianceState
    rank: int
    alpha: float
    max_tokens: int
    text_preparation: str
    weights: Weights
    samples_seen: int
    revision: str | None = None
    time_conditioning: "TimeConditioning" = "index"
    step: int | None = None
    interval: Interval = WHOLE

    @property
    def last_timestep(self) -> int:
        """The one of the most noise, of the process it was trained on."""
        steps = self.schedule.get("num_train_timesteps")
        return (steps if isinstance(steps, int) else 1000) - 1


MetadataOf = Callable[[Path], AdapterMetadata]  # of an adapter folder


@dataclass(frozen=True)
class Adapter:
    """A saved adapter as it describes itself; `adapters` loads its weights.

    name       as it was given: an adapter folder, a run folder, or RUN@STEP
    folder     the adapter folder that this means
    metadata   what it was trained on and how
    settings   of its LoRA
    interval   the network's timesteps that it is to act at, both ends included
    """

    name: str
    folder: Path
    metadata: AdapterMetadata
    settings: LoraSettings
    interval: Interval = WHOLE

    @classmethod
    def read(cls, path: str | Path, *, weights: Weights = "ema", interval: Interval | None = None) -> Self:
        """The adapter behind `path`: an adapter folder, the final one of a run folder, or what RUN@STEP kept then.

        `weights` chooses between a run's averaged and last weights; a run without an average has only the last ones,
        and a step of a run with one only the average. `interval`: where it is to act; None: where it was trained.
        Raises UserError if there is no such adapter or interval, or its files are damaged or of another version; warns
        of an interval that goes beyond the training's.
        """
        metadata_of = cache(read_metadata)  # where it is may depend on what is found there
        folder = _find(path, weights, metadata_of)
        metadata = metadata_of(folder)
        return cls(str(path), folder, metadata, read_settings(folder), acting_interval(metadata, interval))


def _find(path: str | Path, weights: Weights, metadata_of: MetadataOf) -> Path:
    if not str(path).strip():
        raise UserError("adapter: its folder is an empty text; give an adapter folder or a run folder")
    path = Path(path).expanduser()
    if (path / METADATA).is_file():
        return path
    if path.exists():
        return _final(path, weights, metadata_of)
    run, at, step = str(path).rpartition("@")
    if at and step.isdecimal() and Path(run).is_dir():
        return _at_step(Path(run), int(step), weights, metadata_of)
    _refuse_inside_of_run(path)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.with_name(near[0])}?" if near else "give an adapter folder or a run folder"
    raise UserError(f"adapter: there is no {path}; {hint}")


def kept_on_the_way(run: Path) -> str:
    """The adapters of a run's steps, for messages."""
    steps = RunFolder(run).adapter_steps()
    return f"kept on the way: {', '.join(f'{run}@{step}' for step in steps)}" if steps else "none was kept on the way"


def _final(path: Path, weights: Weights, metadata_of: MetadataOf) -> Path:
    main, raw = (path / place for place in FINAL_ADAPTERS.values())
    if (main / METADATA).is_file():
        if weights == "raw" and (raw / METADATA).is_file():
            return raw
        if weights == "raw" and metadata_of(main).weights == "ema":
            raise UserError(f"adapter: the run {path} kept only its averaged weights; use --weights ema")
        return main
    _refuse_inside_of_run(path)
    if RunFolder(path).is_run:
        raise UserError(
            f"adapter: the run {path} has no final adapter yet: finish it with --resume auto, or take one of "
            f"its steps ({kept_on_the_way(path)})"
        )
    if (path / CONFIG).is_file():
        raise UserError(f"adapter: {path} has no {METADATA}, so it was not made here and its base is unknown")
    raise UserError(f"adapter: {path} is neither an adapter folder nor a run folder (with {FINAL_ADAPTERS['ema']})")


def _at_step(run: Path, step: int, weights: Weights, metadata_of: MetadataOf) -> Path:
    kept, main = RunFolder(run).adapter_at(step), run / FINAL_ADAPTERS["ema"]
    if (main / METADATA).is_file() and metadata_of(main).step == step:
        return _final(run, weights, metadata_of)
    if not (kept / METADATA).is_file():
        raise UserError(f"adapter: the run {run} has no adapter of step {step} ({kept_on_the_way(run)})")
    if weights == "raw" and metadata_of(kept).weights == "ema":
        raise UserError(f"adapter: of step {step} the run {run} kept only the averaged weights; use --weights ema")
    return kept


def _refuse_inside_of_run(path: Path) -> None:
    """A checkpoint, or another folder of a run, has no adapter: say which folders have."""
    for run in path.parents:
        if RunFolder(run).is_run:
            raise UserError(
                f"adapter: {path} lies inside the run {run} and is no adapter (a checkpoint is for --resume); give "
                f"{run}, or one of its steps ({kept_on_the_way(run)})"
            )


def read_metadata(folder: Path) -> AdapterMetadata:
    """The content of an adapter folder's pixart_ft.json; UserError if it is damaged or of another version."""
    path = folder / METADATA
    content = read_object(path, "adapter", "copy the adapter again")
    known = {field.name for field in fields(AdapterMetadata)}
    required = {field.name for field in fields(AdapterMetadata) if field.default is MISSING}
    strange = (content.keys() - known) | (required - content.keys())
    if strange:
        raise UserError(f"adapter: {path} is of another version of pixart_ft (fields {some(strange)}); train again")
    _check_types(path, content, _METADATA_TYPES)
    return AdapterMetadata(**content | {"interval": tuple(content.get("interval") or WHOLE)})


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


def read_settings(folder: Path) -> LoraSettings:
    """Of a LoRA, from an adapter folder's adapter_config.json."""
    path = folder / CONFIG
    content = read_object(path, "adapter", "copy the adapter again")
    _check_types(path, content, _CONFIG_TYPES)
    return LoraSettings(
        rank=content["r"],
        alpha=content["lora_alpha"],
        targets=tuple(content["target_modules"]),
        dropout=content["lora_dropout"],
        rslora=bool(content.get("use_rslora")),
        dora=bool(content.get("use_dora")),
    )


def _check_types(path: Path, content: Mapping[str, object], types: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise UserError naming each of the keys whose value cannot be; one that may be absent has been looked for."""
    wrong = [
        f"{key} is {json.dumps(content.get(key))[:60]}"
        for key, is_right in types.items()
        if not is_right(content.get(key))
    ]
    if wrong:
        raise UserError(f"adapter: cannot read {path}: {', '.join(wrong)}; copy the adapter again")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


def _is_interval(value: object) -> bool:
    ends = value if isinstance(value, list) and len(value) == 2 else [2, 1]
    return all(_is_number(end, 0, 1e6) for end in ends) and ends[0] <= ends[1]


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


_METADATA_TYPES: dict[str, Callable[[Any], bool]] = {
    "base": _is_text,
    "base_fingerprint": _is_text,
    "prediction_type": ("epsilon", "v_prediction", "sample", "posterior_mean").__contains__,
    "schedule": lambda value: isinstance(value, dict),
    "variance": ("trained", "stale", "none").__contains__,
    "rank": lambda value: _is_count(value, 1),
    "alpha": lambda value: _is_number(value, 0, 1e6),
    "max_tokens": lambda value: _is_count(value, 1),
    "text_preparation": _is_text,
    "weights": ("ema", "raw").__contains__,
    "samples_seen": _is_count,
    "step": lambda value: value is None or _is_count(value),
    "revision": lambda value: value is None or _is_text(value),
    "time_conditioning": (None, "index", "snr_matched").__contains__,
    "interval": lambda value: value is None or _is_interval(value),
}
_CONFIG_TYPES: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: _is_count(value, 1) and value <= LARGEST_RANK,
    "lora_alpha": lambda value: _is_number(value, 0, 1e6),
    "target_modules": _is_names,
    "lora_dropout": lambda value: _is_number(value, 0, 0.999),
    "use_rslora": (None, False, True).__contains__,
    "use_dora": (None, False, True).__contains__,
}


def some(names: Any) -> str:
    """The first three names, for messages."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
