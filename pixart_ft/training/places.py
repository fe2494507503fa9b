"""Whether the folders that a training names are there, and apart. No torch: a wrong path is known in an instant."""

from collections.abc import Iterable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from pixart_ft.adapters.files import Adapter
from pixart_ft.config.optimizers import check_installed
from pixart_ft.config.sources import PictureSource
from pixart_ft.config.train import Tracker, TrainConfig
from pixart_ft.data.folders import share_pictures
from pixart_ft.data.sources import check_source, folder_of
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.hub import check_base, check_can_push
from pixart_ft.runs.results import Model


def check_training(
    config: TrainConfig, resume: str | None = None, init_from: str | None = None
) -> Adapter | Model | None:
    """Raise one UserError with every path of a training that leads nowhere, and the package that it lacks.

    Arguments as of `run_training`.

    Returns the adapter, or the model, that it starts from.
    """
    mistakes = Mistakes()
    source: Adapter | Model | None = None
    with mistakes.noted():
        place = resolve_base(config.model.base)
        if config.hub.repo is not None:
            is_folder = config.model.base != "demo" and Path(place).is_dir()
            check_base(config.hub.base, str(Path(place).absolute()) if is_folder else config.model.base, "hub.base")
    for key, pictures in config.data.every_source().items():
        with mistakes.noted():
            _check_source(key, pictures, config.model.base)
    _check_apart(config, mistakes)
    with mistakes.noted():
        RunFolder(config.run.folder).check_new(resume=resume is not None)
    with mistakes.noted():
        check_installed(config.optim.optimizer)
    with mistakes.noted():
        check_trackers(config.logging.trackers)
    if config.hub.repo is not None:
        with mistakes.noted():
            check_can_push(config.hub.repo, "hub.repo")
    if init_from is not None:
        with mistakes.noted():
            source = Model.read(init_from) if config.adapter.kind == "full" else Adapter.read(init_from)
        if config.adapter.init != "default":
            mistakes.add(
                f"adapter.init {config.adapter.init} begins from the base's weights, and --init-from from an "
                "adapter's; leave one of them out"
            )
    mistakes.raise_if_any()
    return source


def check_trackers(names: Iterable[Tracker]) -> None:
    """Raise UserError with the pip command for those that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        some, packages = ", ".join(missing), " ".join(missing)
        raise UserError(f"logging.trackers: {some} not installed: pip install {packages}, or leave it out")


def _check_source(key: str, source: PictureSource, base: str) -> None:
    """Raise UserError unless a source is there; of a prior it says how its pictures are drawn."""
    try:
        check_source(source, key)
    except UserError as error:
        if source.use != "prior" or not source.folder or Path(source.folder).exists():
            raise
        drawn = f"pixart-ft generate --model {base} --prompts-file CLASS.txt --images-per-prompt 10 --captions"
        raise UserError(
            f"{error}; the base draws what it must not forget, from a text file of captions, one a line:\n    {drawn} "
            f"--out {source.folder}"
        ) from None


def _check_apart(config: TrainConfig, mistakes: Mistakes) -> None:
    """Note where one folder's pictures would be taken for another's: they are read with all below them."""
    run = Path(config.run.folder)
    sources = config.data.every_source()
    folders = {key: folder for key, source in sources.items() if (folder := folder_of(source)) is not None}
    for key, folder in folders.items():
        if run.resolve().is_relative_to(folder.resolve()):
            mistakes.add(
                f"run.folder: {run} lies inside {key} {folder}, so the run's samples would be taken for pictures to "
                "learn from; choose a place outside"
            )
    held_out_last = sorted(folders.items(), key=lambda item: sources[item[0]].use == "held_out")
    for (key, one), (other_key, other) in combinations(held_out_last, 2):
        uses = {sources[key].use, sources[other_key].use}
        if len(uses) > 1 and share_pictures(one, other):
            why = ", so what is measured would be trained on" if "held_out" in uses else ""
            remedy = "or use data.held_out_fraction" if why else f"or leave {other_key} out"
            mistakes.add(f"{other_key}: {other} and {key} {one} share pictures{why}; keep them apart, {remedy}")
