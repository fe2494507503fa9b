"""What a saved adapter consists of, and where a path leads to one. No torch: a wrong path is known at once.

An adapter is a folder: adapter_model.safetensors and adapter_config.json, which plain peft reads, pixart_ft.json (what
it was trained on and how) and null_caption.safetensors (the embedding that stands for no caption).
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pixart_ft.checkpoint import RunFolder
from pixart_ft.errors import UserError

if TYPE_CHECKING:
    from pixart_ft.diffusion.process import PredictionType
    from pixart_ft.diffusion.schedules import TimeConditioning
    from pixart_ft.models import VarianceState

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# Where a finished run keeps its adapters: the one to use, and the last weights if that one is an average.
FINAL_ADAPTERS = {"ema": "final/adapter", "raw": "final/adapter_raw"}

METADATA, WEIGHTS, CONFIG = "pixart_ft.json", "adapter_model.safetensors", "adapter_config.json"
NULL_CAPTION = "null_caption.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """W becomes W + (alpha / rank) B A in every Linear or Conv2d whose name is, or ends in, one of `targets`.

    A is (rank, inputs), B is (outputs, rank); `dropout` is the share of the inputs of A zeroed in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = 0.0


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter was trained on and how; the content of pixart_ft.json.

    base               as given in model.base
    base_fingerprint   `models.fingerprint` of that base
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
    """

    base: str
    base_fingerprint: str
    prediction_type: "PredictionType"
    schedule: Mapping[str, object]
    variance: "VarianceState"
    rank: int
    alpha: float
    max_tokens: int
    text_preparation: str
    weights: Literal["ema", "raw"]
    samples_seen: int
    revision: str | None = None
    time_conditioning: "TimeConditioning" = "index"
    step: int | None = None


def find_adapter(path: str | Path, *, weights: Literal["ema", "raw"] = "ema") -> Path:
    """The adapter folder behind `path`: itself, the final one of a run folder, or the one that RUN@STEP kept then.

    `weights` chooses between a run's averaged and last weights; a run without an average has only the last ones, and
    a step of a run with one only the average. Raises UserError if there is no such adapter.
    """
    if not str(path).strip():
        raise UserError("adapter: its folder is an empty text; give an adapter folder or a run folder")
    path = Path(path).expanduser()
    if (path / METADATA).is_file():
        return path
    if path.exists():
        return _final(path, weights)
    run, at, step = str(path).rpartition("@")
    if at and step.isdecimal() and Path(run).is_dir():
        return _at_step(Path(run), int(step), weights)
    _refuse_inside_of_run(path)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.with_name(near[0])}?" if near else "give an adapter folder or a run folder"
    raise UserError(f"adapter: there is no {path}; {hint}")


def kept_on_the_way(run: Path) -> str:
    """The adapters of a run's steps, for messages."""
    steps = RunFolder(run).adapter_steps()
    return f"kept on the way: {', '.join(f'{run}@{step}' for step in steps)}" if steps else "none was kept on the way"


def _final(path: Path, weights: Literal["ema", "raw"]) -> Path:
    main, raw = (path / place for place in FINAL_ADAPTERS.values())
    if (main / METADATA).is_file():
        if weights == "raw" and (raw / METADATA).is_file():
            return raw
        if weights == "raw" and read_metadata(main).weights == "ema":
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


def _at_step(run: Path, step: int, weights: Literal["ema", "raw"]) -> Path:
    kept, main = RunFolder(run).adapter_at(step), run / FINAL_ADAPTERS["ema"]
    if (main / METADATA).is_file() and read_metadata(main).step == step:
        return _final(run, weights)
    if not (kept / METADATA).is_file():
        raise UserError(f"adapter: the run {run} has no adapter of step {step} ({kept_on_the_way(run)})")
    if weights == "raw" and read_metadata(kept).weights == "ema":
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"adapter: cannot read {path} ({error}); copy the adapter again") from error
    known = {field.name for field in fields(AdapterMetadata)}
    required = {field.name for field in fields(AdapterMetadata) if field.default is MISSING}
    strange = (content.keys() - known) | (required - content.keys())
    if strange:
        raise UserError(f"adapter: {path} is of another version of pixart_ft (fields {some(strange)}); train again")
    return AdapterMetadata(**content)


def read_settings(folder: Path) -> LoraSettings:
    """Rank, alpha, targets and dropout from an adapter folder's adapter_config.json."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return LoraSettings(
            rank=content["r"],
            alpha=content["lora_alpha"],
            targets=tuple(content["target_modules"]),
            dropout=content["lora_dropout"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"adapter: cannot read {path} ({error}); copy the adapter again") from error


def some(names: Any) -> str:
    """The first three names, for messages."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
