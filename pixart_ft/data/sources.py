"""A source of pictures, whatever its kind: whether it is there, what it holds, how often its pictures are shown."""

import glob
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pixart_ft.config.sources import PictureSource
from pixart_ft.data.folders import ENDINGS, check_folder, picture_folder, survey
from pixart_ft.data.rows import Account
from pixart_ft.errors import UserError

_MOST_PLACES = 10**7  # of an epoch, whose list is held
_AS_ASKED = 0.05  # a source's share of the draws is within this part of what its weight asks for


def folder_of(source: PictureSource) -> Path | None:
    """The folder that a source names, of pictures of its own or of the demo's; None for other kinds."""
    return picture_folder(source.folder, "held_out" if source.use == "held_out" else "train") if source.folder else None


def check_source(source: PictureSource, key: str) -> None:
    """Raise UserError, naming `key`, unless there is such a folder, or such files; a dataset is only met later."""
    if folder := folder_of(source):
        check_folder(folder, key)
    elif source.dataset and source.dataset.startswith((".", "/")) and not Path(source.dataset).is_dir():
        raise UserError(f"{key}: the folder {source.dataset} does not exist")
    elif source.kind in ENDINGS:
        _files(source, key)


def survey_source(source: PictureSource, key: str) -> Account:
    """What a source holds; nothing of use where masks were asked for and no picture has one.

    Raises UserError where nothing can be looked at, naming `key`.
    """
    check_source(source, key)
    account = _survey(source, key)
    if source.mask is None or not account.rows or any(row.mask is not None for row in account.rows):
        return account
    kind = f"masks asked for, and no picture of {key} has one"
    return replace(account, rows=[], wrong=account.wrong | {kind: [source.mask]})


def _survey(source: PictureSource, key: str) -> Account:
    if folder := folder_of(source):
        return survey(folder, source)
    from pixart_ft.data.tables import survey_dataset, survey_parquet  # these and what they need are seldom wanted
    from pixart_ft.data.tars import survey_tars

    if source.dataset:
        return survey_dataset(source)
    return (survey_parquet if source.parquet else survey_tars)(_files(source, key), source)


def _files(source: PictureSource, key: str) -> list[Path]:
    """The files that the patterns of a source name, each once, those of a pattern by name."""
    found: dict[Path, None] = {}
    for pattern in getattr(source, source.kind):
        inside = str(Path(pattern) / f"*{ENDINGS[source.kind]}") if Path(pattern).is_dir() else pattern
        files = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(inside))]
        if not files:
            braces = "; write * for the numbers in place of braces" if "{" in pattern else ""
            raise UserError(f"{key}.{source.kind}: there is no file {inside}{braces}")
        found.update(dict.fromkeys(files))
    return list(found)


def times_shown(sources: Mapping[str, PictureSource], counts: Mapping[str, int]) -> dict[str, int]:
    """How often an epoch shows the pictures of each source of one use, by `repeats`, or about by `weight`.

    counts   of the pictures of each

    Weights become the least whole numbers by which each source has its share of the draws within 5 %, so that of a
    source every picture is shown alike. Raises UserError for weights that would make an epoch of over 10 million.
    """
    given = {key: source.weight for key, source in sources.items() if counts[key]}
    weights = {key: weight for key, weight in given.items() if weight is not None}
    if not weights:
        return {key: source.repeats for key, source in sources.items()}
    rates = {key: weight / counts[key] for key, weight in weights.items()}
    least = min(rates.values())
    for scale in range(1, round(0.5 / _AS_ASKED) + 1):
        exact = {key: scale * rate / least for key, rate in rates.items()}
        if all(abs(round(rate) - rate) <= _AS_ASKED * rate for rate in exact.values()):
            break
    times = {key: round(rate) for key, rate in exact.items()}
    if (places := sum(counts[key] * number for key, number in times.items())) > _MOST_PLACES:
        raise UserError(
            f"data.sources: by these weights an epoch has {places:,} pictures, since one source has a small weight for "
            "its many pictures; give weights that differ less, or none"
        )
    return times | {key: 1 for key in sources if key not in times}
