"""Which folder or Hub id the name of a base means. No torch: a wrong name is known in an instant."""

import re
from pathlib import Path

from pixart_ft.errors import UserError

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"


def resolve_base(name: str) -> str:
    """The folder or Hub id behind `model.base`: "demo", an existing diffusers folder, or "owner/name".

    Raises UserError for anything else. A Hub id is taken at its word; reading from it asks the Hub.
    """
    remedy = 'set model.base to "demo", a folder in diffusers layout, or a Hub id such as "owner/name"'
    folder = DEMO_FOLDER if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"model.base: {folder} has no model_index.json, so it is no diffusers model; {remedy}")
        return str(folder)
    if name == "demo":
        raise UserError(f"model.base: this installation lacks the demo ({folder}); reinstall pixart_ft")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"model.base: there is no folder {name!r}; {remedy}")
    return name
