"""Tar files as WebDataset has them: the members found once, a picture read from its place, nothing unpacked."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixart_ft.config.sources import ALPHA, PictureSource
from pixart_ft.config.text import is_text, text_of, visible
from pixart_ft.data.pixels import picture_types, refused_types
from pixart_ft.data.rows import CAPTION_COLUMNS, Account, Report, Row, named_columns, point_at_columns, said_by
from pixart_ft.errors import UserError
from pixart_ft.files import stamp

_USUAL = ("txt", *CAPTION_COLUMNS)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar file: where its bytes lie."""

    tar: Path
    offset: int
    size: int
    name: str

    def read_bytes(self) -> bytes:
        """Its bytes. Raises UserError if the tar file ends before."""
        with self.tar.open("rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise UserError(f"{self}: the tar file was cut short while it is read")
        return content

    def stamp(self) -> list[int]:
        """That of the tar file, and the place in it."""
        return [*stamp(self.tar), self.offset, self.size]

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


def survey_tars(tars: Sequence[Path], asked: PictureSource) -> Account:
    """The captioned pictures of tar files, in their order, and every picture and caption that cannot be used.

    Members that share a name up to its first dot are a picture and what is said of it: in a .txt, in fields of a
    .json, or in what `asked.caption` names, either fields or the ends of names. Of these ends capitals do not matter.
    """
    ends = {key: end.lower() for key in ("image", "mask") if (end := getattr(asked, key))}
    asked, report = asked.model_copy(update=ends), Report()
    rows: list[Row] = []
    pictures = orphans = 0
    seen: dict[str, None] = {}
    for tar in tars:
        for name, members in _samples(tar, report).items():
            types = picture_types() | refused_types()
            shown = [end for end in members if f".{end.rpartition('.')[2]}" in types and end != asked.mask]
            cells = _cells(members, asked, report)
            seen.update(dict.fromkeys([*cells, *members]))
            said = said_by(cells, asked, _USUAL)
            where = f"{tar.name}: {visible(name)}"
            if not shown:
                orphans += bool(said)
                continue
            pictures += 1
            chosen = [end for end in shown if asked.image in (None, end)]
            if len(chosen) != 1:
                report.add(
                    "names with no picture or several (say how its name ends by image)", f"{where}: {', '.join(shown)}"
                )
            elif f".{chosen[0].rpartition('.')[2]}" in refused_types():
                report.add(
                    "pictures of a type that is not read (convert to PNG, or take them out)", str(members[chosen[0]])
                )
            elif said is None or not all(map(is_text, (name, *said))):
                report.add("captions that are no text", where)
            elif not said:
                report.add("pictures without a caption (a .txt or .json of their name)", where)
            else:
                picture = members[chosen[0]]
                mask = picture if asked.mask == ALPHA else members.get(asked.mask or "")
                rows.append(Row.of(picture, said, f"{tar.name}/{picture.name}", asked.background, mask))
    if pictures:
        point_at_columns("the tar files", list(seen), named_columns(asked, _USUAL), report)
    else:
        report.add("tar files without a picture", ", ".join(map(str, tars[:3])))
    first = f"{tars[0]}" + (f" and {len(tars) - 1} more" if len(tars) > 1 else "")
    return Account(f"the tar file {first}", rows, pictures, orphans, report.found)


def _samples(tar: Path, report: Report) -> dict[str, dict[str, Member]]:
    """The members that are not hidden, by their names up to the first dot, and by the rest in small letters."""
    found: dict[str, dict[str, Member]] = {}
    try:
        end = tar.stat().st_size
        with tarfile.open(tar, "r:") as opened:
            for info in opened:
                folder, slash, file = info.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if not info.isreg() or not stem or not ending:
                    continue
                member = Member(tar, info.offset_data, info.size, info.name)
                sample = found.setdefault(folder + slash + stem, {})
                if info.offset_data + info.size > end:
                    report.add("members that the end of their tar file cuts short", str(member))
                elif ending.lower() in sample:
                    report.add("members of a name that came before", str(member))
                else:
                    sample[ending.lower()] = member
                opened.members = []  # type: ignore[attr-defined]  # else it keeps all that it has seen
    except (tarfile.TarError, OSError) as error:
        packed = "; a compressed one must be unpacked to .tar" if tar.suffix.lower() != ".tar" else ""
        report.add("tar files that are broken, or no tar file", f"{tar}: {error}{packed}")
    return found


def _cells(members: dict[str, Member], asked: PictureSource, report: Report) -> dict[str, object]:
    """What is said of a picture: the text of members by the ends of their names, and the fields of its .json."""
    cells: dict[str, object] = {}
    columns = {column.lower(): column for column in asked.caption or _USUAL}
    for end, member in members.items():
        if end not in ("json", *columns):
            continue
        try:
            text = text_of(member.read_bytes(), str(member))
            cells |= json.loads(text) if end == "json" else {columns[end]: text}
        except UserError as error:
            report.add("captions that cannot be read", str(error))
        except (ValueError, TypeError, RecursionError) as error:  # no JSON, or not keys and values
            report.add("captions that cannot be read", f"{member}: {error}")
    return cells
