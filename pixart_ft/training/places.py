"""Whether the folders that a training names are there, and apart. No torch: a wrong path is known in an instant."""

from pathlib import Path

from pixart_ft.adapters.files import Adapter
from pixart_ft.config.optimizers import check_installed
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.datasets import check_folder, picture_folder
from pixart_ft.errors import Mistakes, UserError
from pixart_ft.model.place import resolve_base
from pixart_ft.runs.folder import RunFolder


def check_training(config: TrainConfig, resume: str | None = None, init_from: str | None = None) -> Adapter | None:
    """Raise one UserError with every path of a training that leads nowhere, and the package that it lacks.

    Arguments as of `run_training`.

    Returns the adapter that it starts from.
    """
    mistakes, adapter = Mistakes(), None
    with mistakes.noted():
        resolve_base(config.model.base)
    for name, part in ((config.data.folder, "train"), (config.data.held_out, "held_out")):
        if name is not None:
            with mistakes.noted():
                check_folder(picture_folder(name, part))
    with mistakes.noted():
        _check_apart(config)
    with mistakes.noted():
        RunFolder(config.run.folder).check_new(resume=resume is not None)
    with mistakes.noted():
        check_installed(config.optim.optimizer)
    if init_from is not None:
        with mistakes.noted():
            adapter = Adapter.read(init_from)
    mistakes.raise_if_any()
    return adapter


def _check_apart(config: TrainConfig) -> None:
    """Raise UserError where one folder's pictures would be taken for another's: they are read with all below them."""
    folder = picture_folder(config.data.folder, "train")
    run = Path(config.run.folder)
    if run.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"run.folder: {run} lies inside data.folder {folder}, so the run's samples would be taken for pictures to "
            "learn from; choose a place outside"
        )
    if config.data.held_out is not None:
        held_out = picture_folder(config.data.held_out, "held_out")
        one, other = folder.resolve(), held_out.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(
                f"data.held_out: {held_out} and data.folder {folder} share pictures, so what is measured would be "
                "trained on; keep them apart, or use data.held_out_fraction"
            )
