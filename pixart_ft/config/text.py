"""Text as users write it: read from files as editors save them, refused where no encoding can hold it."""

import codecs
from pathlib import Path

from pixart_ft.errors import UserError

# UTF-32 first: its little-endian mark begins with that of UTF-16
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_text(path: Path, *, most: int | None = None) -> str:
    """The text of a file: UTF-8, or what its byte order mark says, as Notepad writes it.

    The lines end in "\\n", whatever they end in there; marks are left out, also those inside of joined files. Raises
    UserError naming the file and the line of bytes that are no such text, or for more than `most` bytes, and OSError as
    `open` does.
    """
    with path.open("rb") as file:  # no more is read than wanted: the file may be endless
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise UserError(f"{path} is larger than {most:,} bytes: it is not what it should be")
    return text_of(data, str(path))


def text_of(data: bytes, name: str) -> str:
    """The text in a file's bytes, see `read_text`; `name` is the file's, for messages."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    data, encoding = data[len(mark) :], _MARKS.get(mark, "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        found = data[error.start : error.end].hex(" ")
        raise UserError(f"{name} line {line}: the bytes {found} are no {encoding} text; save it as UTF-8") from None
    if "\0" in text:  # UTF-16 without a mark reads as UTF-8 with a zero beside each letter
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{name} line {line}: a zero byte, so it is no UTF-8 text; save it as UTF-8")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def is_text(text: str) -> bool:
    """Whether an encoding can hold it: not with half a surrogate pair, as of JSON or of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def visible(text: str) -> str:
    """The text with what no encoding can hold escaped: for messages."""
    return text.encode("utf-8", "backslashreplace").decode()


def numbered(count: int | str, noun: str, plural: str = "") -> str:
    """A count, or a number as it is written, with its noun: 1 picture, 2,000 pictures, 0.5 steps."""
    number = count if isinstance(count, str) else f"{count:,}"
    return f"{number} {noun if number == '1' else plural or noun + 's'}"


def no_text(where: str, text: str) -> str:
    """The report of text at `where` that `is_text` denies."""
    shown = visible(text)[:60]
    return f'{where} is "{shown}", which is no Unicode text (half a surrogate pair, or bytes that are not UTF-8)'
