"""Where a name leads to what a run trained: a folder, the last of a run, what RUN@STEP kept, a Hub id. No torch.

A run leaves an adapter, final/adapter and adapters/step-000030, or a whole model, final/model and models/step-000030.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pixart_ft.config.train import Weights
from pixart_ft.errors import UserError
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.hub import HubModel
from pixart_ft.runs.metadata import METADATA, AdapterMetadata, MetadataOf, read_metadata

What = Literal["adapter", "model"]

# What messages call the key, and the option that it is given by.
_KEYS: dict[What, str] = {"adapter": "adapter", "model": "model.base"}
_GIVEN: dict[What, str] = {"adapter": "as the adapter (--lora)", "model": "as the model (--model, model.base)"}


def final(what: What) -> dict[Weights, str]:
    """Where a finished run keeps its result: the one to use, and the last weights if that one is an average."""
    return {"ema": f"final/{what}", "raw": f"final/{what}_raw"}


@dataclass(frozen=True)
class Model:
    """A whole model that a run left, as it describes itself; the fields are those of `Adapter`."""

    name: str
    folder: Path
    metadata: AdapterMetadata

    @property
    def files(self) -> list[Path]:
        """Its weights, in shards or not."""
        return sorted((self.folder / "transformer").glob("*.safetensors"))

    @classmethod
    def read(cls, path: str | Path, *, weights: Weights = "ema") -> Self:
        """The model behind a folder, a run, RUN@STEP or a Hub id; UserError if there is none, or it is no run's."""
        folder = find(path, "model", weights, read_metadata)
        metadata = read_metadata(folder)
        if metadata.kind != "full":
            raise UserError(f"{_KEYS['model']}: {folder} is an adapter; give it {_GIVEN['adapter']}")
        return cls(str(path), folder, metadata)


def find(path: str | Path, what: What, weights: Weights, metadata_of: MetadataOf) -> Path:
    """The folder behind a folder of it, a run's, RUN@STEP, or a Hub id, whose files are then brought here.

    `weights` chooses between a run's averaged and last weights; a run without an average has only the last ones, and a
    step of a run with one only the average. A name in a folder that is here is no Hub id. Raises UserError, with the
    nearest name, where there is none.
    """
    if not str(path).strip():
        raise UserError(f"{_KEYS[what]}: its folder is an empty text; give {_a(what)} folder or a run folder")
    path = Path(path).expanduser()
    if (path / METADATA).is_file():
        return path
    if path.exists():
        return _final(path, what, weights, metadata_of)
    if (at := at_step(path)) is not None:
        return _at_step(*at, what, weights, metadata_of)
    _refuse_inside_of_run(path, what)
    if (here := brought_here(path, what)) != path:
        return find(here, what, weights, metadata_of)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.with_name(near[0])}?" if near else f"give {_a(what)} folder or a run folder"
    raise UserError(f"{_KEYS[what]}: there is no {path}; {hint}")


def brought_here(path: Path, what: What) -> Path:
    """Of a Hub id its folder here, into which its files are brought first; any other path as it is."""
    model = None if path.exists() or at_step(path) else HubModel.named(path)
    if model is None or Path(model.id).parent.is_dir():
        return path
    return model.fetch(_KEYS[what], top=what == "adapter")


def what_of(path: Path) -> What:
    """Whether a folder, a run, RUN@STEP or a Hub id is, or left, a whole model; what is none counts as an adapter."""
    path = brought_here(path, "adapter")
    run, _ = at_step(path) or (path, 0)
    if (run / METADATA).is_file():
        return "model" if read_metadata(run).kind == "full" else "adapter"
    return "model" if (run / final("model")["ema"]).is_dir() or RunFolder(run).kept_steps("model") else "adapter"


def at_step(path: Path) -> tuple[Path, int] | None:
    """The run and the step of RUN@STEP; None for anything else."""
    run, at, step = str(path).rpartition("@")
    return (Path(run), int(step)) if at and step.isdecimal() and Path(run).is_dir() else None


def _a(what: What) -> str:
    return {"adapter": "an adapter", "model": "a model"}[what]


def _kept_on_the_way(run: Path, what: What) -> str:
    """What a run kept at its steps, for messages."""
    steps = RunFolder(run).kept_steps(what)
    return f"kept on the way: {', '.join(f'{run}@{step}' for step in steps)}" if steps else "none was kept on the way"


def _final(path: Path, what: What, weights: Weights, metadata_of: MetadataOf) -> Path:
    main, raw = (path / place for place in final(what).values())
    if (main / METADATA).is_file():
        if weights == "raw" and (raw / METADATA).is_file():
            return raw
        if weights == "raw" and metadata_of(main).weights == "ema":
            raise UserError(f"{_KEYS[what]}: the run {path} kept only its averaged weights; use --weights ema")
        return main
    _refuse_inside_of_run(path, what)
    _refuse_the_other(path, what)
    if RunFolder(path).is_run:
        raise UserError(
            f"{_KEYS[what]}: the run {path} has no final {what} yet: finish it with --resume auto, or take one of "
            f"its steps ({_kept_on_the_way(path, what)})"
        )
    if (path / "adapter_config.json").is_file() or (what == "adapter" and any(path.glob("*.safetensors"))):
        raise UserError(f"adapter: {path} has no {METADATA}, so it was not made here and its base is unknown")
    raise UserError(f"{_KEYS[what]}: {path} is neither {_a(what)} folder nor a run folder (with {final(what)['ema']})")


def _at_step(run: Path, step: int, what: What, weights: Weights, metadata_of: MetadataOf) -> Path:
    kept, main = RunFolder(run).kept_at(what, step), run / final(what)["ema"]
    if (main / METADATA).is_file() and metadata_of(main).step == step:
        return _final(run, what, weights, metadata_of)
    if not (kept / METADATA).is_file():
        _refuse_the_other(run, what)
        kept_ones = _kept_on_the_way(run, what)
        raise UserError(f"{_KEYS[what]}: the run {run} has no {what} of step {step} ({kept_ones})")
    if weights == "raw" and metadata_of(kept).weights == "ema":
        raise UserError(
            f"{_KEYS[what]}: of step {step} the run {run} kept only the averaged weights; use --weights ema"
        )
    return kept


def _refuse_the_other(run: Path, what: What) -> None:
    """A run that left a model has no adapter, and the other way round: say how to give what it has."""
    other: What = "model" if what == "adapter" else "adapter"
    if (run / final(other)["ema"] / METADATA).is_file() or RunFolder(run).kept_steps(other):
        raise UserError(f"{_KEYS[what]}: the run {run} trained {_a(other)}, not {_a(what)}; give it {_GIVEN[other]}")


def _refuse_inside_of_run(path: Path, what: What) -> None:
    """A checkpoint, or another folder of a run, is no result: say which folders are."""
    for run in path.parents:
        if RunFolder(run).is_run:
            raise UserError(
                f"{_KEYS[what]}: {path} lies inside the run {run} and is no {what} (a checkpoint is for --resume); "
                f"give {run}, or one of its steps ({_kept_on_the_way(run, what)})"
            )
