"""The log of a run: one JSON record a line, appended as the run goes; a damaged line costs no other one."""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ft.files import explained, write_bytes


@dataclass(frozen=True)
class RunLog:
    """The log at `path`, which need not exist yet. A record has at least "step", the optimizer steps done."""

    path: Path

    def append(self, progress: Mapping[str, int], facts: Mapping[str, object]) -> None:
        """Write one record: where the run stands ("step", "samples"), the time, and the facts."""
        record = {**progress, "time": round(time.time(), 3), **facts}
        with explained(self.path), self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")

    def records(self) -> list[dict[str, Any]]:
        """Every record that can be read; warns of lines that cannot."""
        records = [record for _, record in self._lines()]
        if damaged := records.count(None):
            warnings.warn(f"{self.path}: damaged lines, left out: {damaged}", stacklevel=2)
        return [record for record in records if record is not None]

    def comparable(self) -> list[dict[str, Any]]:
        """The records, without the held-out losses from before the comparison began anew (a record "begins_anew")."""
        records = self.records()
        begin = max((number for number, record in enumerate(records) if "begins_anew" in record), default=0)
        return [record for number, record in enumerate(records) if number >= begin or "held_out" not in record]

    def cut(self, step: int) -> None:
        """Drop the records after `step`, which a resumed run writes again, and a last line cut short.

        Another damaged line stays where it is among the records kept: a person may mend it.
        """
        kept: list[bytes] = []
        keeping = step >= 0
        for line, record in self._lines():
            keeping = keeping if record is None else record["step"] <= step
            if keeping and line.endswith(b"\n"):
                kept.append(line)
        if self.path.is_file():
            write_bytes(self.path, b"".join(kept))

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Each line as it stands, and its record or None."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):  # cut short, or bytes that are no text
                    record = None
                whole = isinstance(record, dict) and isinstance(record.get("step"), int)
                yield line, record if whole else None
