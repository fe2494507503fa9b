"""Which folder or Hub id the name of a base means. No torch: a wrong name is known in an instant."""

from pathlib import Path

from pixart_ft.config.train import Weights
from pixart_ft.errors import UserError
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.hub import HubModel
from pixart_ft.runs.metadata import METADATA, read_metadata
from pixart_ft.runs.results import at_step, final, find

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"


def resolve_base(name: str, weights: Weights = "ema") -> str:
    """The folder or Hub id behind `model.base`: "demo", an existing diffusers folder, or "owner/name[@revision]".

    A run that trained the whole network, and RUN@STEP, mean the model there; `weights` as of `find`. Raises UserError
    for anything else. A Hub id is taken at its word; reading from it asks the Hub.
    """
    path = Path(name).expanduser()
    if name != "demo" and (_is_run(path) or at_step(path) is not None):
        return str(find(path, "model", weights, read_metadata))
    remedy = 'set model.base to "demo", a folder in diffusers layout, or a Hub id such as "owner/name"'
    folder = DEMO_FOLDER if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            if (folder / METADATA).is_file():
                raise UserError(
                    f"model.base: {folder} is an adapter; give it as the adapter (--lora), or as --init-from"
                )
            raise UserError(f"model.base: {folder} has no model_index.json, so it is no diffusers model; {remedy}")
        return str(folder)
    if name == "demo":
        raise UserError(f"model.base: this installation lacks the demo ({folder}); reinstall pixart_ft")
    if HubModel.named(name) is None:
        raise UserError(f"model.base: there is no folder {name!r}; {remedy}")
    return name


def _is_run(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        return False
    return RunFolder(folder).is_run or any((folder / final(what)["ema"]).is_dir() for what in ("adapter", "model"))
