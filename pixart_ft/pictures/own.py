"""What a picture may be written over: nothing that another recipe made, or that is the user's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pixart_ft.errors import UserError
from pixart_ft.pictures.recipes import read_recipe


def not_there_yet(recipes: Mapping[Path, Mapping[str, object]]) -> list[Path]:
    """The paths at which nothing is yet. Raises UserError naming files that another recipe made."""
    missing, faults = [], []
    for path, recipe in recipes.items():
        if not path.exists():
            missing.append(path)
            continue
        try:
            there = read_recipe(path)
        except UserError as error:
            faults.append(str(error))
            continue
        changed = [key for key in (*recipe, *there) if recipe.get(key) != there.get(key)]
        if changed:
            shown = [_difference(key, there.get(key), recipe.get(key)) for key in dict.fromkeys(changed)]
            faults.append(f"{path} was made by another recipe: {', '.join(shown)}")
    _refuse(faults)
    return missing


def _difference(key: str, there: object, now: object) -> str:
    long = isinstance(there, dict) or isinstance(now, dict)
    return f"another {key}" if long else f"{key} {there!r} (now {now!r})"


def check_own(sheets: Sequence[Path], mark: str, option: str = "--out") -> None:
    """Raise UserError naming the files that are there and are no sheets of ours, whose recipes have the key `mark`.

    And those whose names say that they are no PNG.
    """
    if others := [path for path in sheets if path.suffix.lower() != ".png"]:
        raise UserError(f"{option}: {others[0]} will be a PNG; give a name that ends in .png")
    _refuse([f"{path} is there and is no sheet by pixart_ft" for path in sheets if not _is_own(path, mark)], option)


def _is_own(path: Path, mark: str) -> bool:
    try:
        return not path.exists() or mark in read_recipe(path)
    except UserError:
        return False


def _refuse(faults: Sequence[str], option: str = "--out") -> None:
    if faults:
        more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
        remedy = f"they are left as they are; choose another place ({option}) or delete these files"
        raise UserError("\n".join([*faults[:5], *more, remedy]))
