"""The folder of one training run and the checkpoints in it.

runs/NAME/
    config.yaml             the resolved configuration
    log.jsonl               one line per logged step
    contact_sheet.png       some of its pictures as the VAE sees them, with their captions
    checkpoints/step-000030 everything needed to continue; written aside, checked by a manifest
    samples/step-000030     pictures of the fixed prompts
    adapters/step-000030    the averaged weights then, as an adapter; or models/, of a run that trains the whole network
    final/                  the result
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pixart_ft.errors import UserError
from pixart_ft.files import explained, probe, remove_folder, sha256, sweep, write_folder
from pixart_ft.runs.lock import LOCK_NAME
from pixart_ft.runs.log import RunLog
from pixart_ft.runs.manifest import MANIFEST, fault_of, write_manifest

TRAINED_ON = "run.json"  # in a checkpoint: what the run is trained on


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives. Making this object touches nothing; `create` makes the folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, named by optimizer step."""
        return self.path / "checkpoints"

    @property
    def contact_sheet(self) -> Path:
        """The sheet of its pictures."""
        return self.path / "contact_sheet.png"

    @property
    def samples(self) -> Path:
        """The folder of the sample pictures."""
        return self.path / "samples"

    def samples_at(self, step: int) -> Path:
        """The folder of the pictures drawn after `step` optimizer steps."""
        return self.samples / step_name(step)

    def kept_at(self, what: str, step: int) -> Path:
        """The folder of the adapter, or the model, kept after `step` optimizer steps."""
        return self.path / f"{what}s" / step_name(step)

    def kept_steps(self, what: str) -> list[int]:
        """The steps of those kept on the way, first to last."""
        return sorted(step for step, _ in _numbered(self.path / f"{what}s"))

    def drop_kept(self, what: str, gone: Callable[[int], bool]) -> None:
        """Remove those kept on the way at the steps for which `gone` is true."""
        for step in filter(gone, self.kept_steps(what)):
            remove_folder(self.kept_at(what, step))

    def cut(self, step: int) -> None:
        """Drop what was logged, drawn and kept after `step`: a resumed run does that again, perhaps otherwise."""
        self.log.cut(step)
        for place in (self.samples, self.path / "adapters", self.path / "models"):
            for later, folder in _numbered(place):
                if later > step:
                    remove_folder(folder)
                    folder.with_suffix(".png").unlink(missing_ok=True)  # the sheet of the samples

    @property
    def is_run(self) -> bool:
        """Whether a run lives here, begun or finished."""
        return self.checkpoints.is_dir() and self.config_file.is_file()

    @property
    def final(self) -> Path:
        """The folder of the result; present once the run has ended."""
        return self.path / "final"

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def log(self) -> RunLog:
        """What was logged, one record per line of log.jsonl."""
        return RunLog(self.path / "log.jsonl")

    @classmethod
    def create(cls, path: Path, *, resume: bool) -> Self:
        """Make the folder, as the last act before training; UserError as in `check_new`."""
        run = cls(path)
        run.check_new(resume=resume)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.samples.mkdir(exist_ok=True)
        for place in (run.path, run.checkpoints, run.samples, *run.samples.iterdir(), run.final):
            sweep(place)
        return run

    def check_new(self, *, resume: bool) -> None:
        """Raise UserError if the folder holds a run and this is not its continuation. Touches nothing."""
        with explained(self.path, "used", "run.folder"):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"run.folder: {self.path} is a file; choose another run.name")
            if not resume and self.path.is_dir() and any(inside.name != LOCK_NAME for inside in self.path.iterdir()):
                raise UserError(
                    f"run.folder: {self.path} exists already; choose another run.name, continue it with "
                    "--resume auto, or delete it"
                )

    def probe(self) -> None:
        """Raise UserError unless all that a run writes can be written; leaves everything as it was."""
        for place in (self.path, self.checkpoints, self.samples, self.final, self.path / "tensorboard"):
            probe(place, "run.folder")

    def save(self, step: int, write: Callable[[Path], object], *, keep: int = 2) -> Path:
        """Save the state after `step` optimizer steps: `write` fills a folder, which appears whole or not.

        Then only the newest `keep` checkpoints stay. Ones of later steps go too: they belong to a course that
        the run left when it was resumed from before them. The one just written always stays. Raises UserError
        when the disk is full; earlier checkpoints are then as they were.
        """
        assert keep >= 1
        folder = self.checkpoints / step_name(step)

        def write_and_describe(aside: Path) -> None:
            write(aside)
            write_manifest(aside)

        write_folder(folder, write_and_describe)
        earlier = [old for old_step, old in self._by_step() if old_step < step and fault_of(old, hashed="") is None]
        kept = {folder, *earlier[: keep - 1]}
        for _, old in self._by_step():
            if old not in kept:
                remove_folder(old)
        return folder

    def saved_steps(self) -> list[int]:
        """The optimizer steps that have a checkpoint, latest first."""
        return [step for step, _ in self._by_step()]

    def newest(self) -> Path | None:
        """The latest whole checkpoint, or None; broken ones are passed over with a warning."""
        for _, folder in self._by_step():
            fault = fault_of(folder)
            if fault is None:
                return folder
            warnings.warn(f"passed over a broken checkpoint: {fault}", stacklevel=2)
        return None

    def resolve_resume(self, resume: str) -> Path | None:
        """The checkpoint `--resume` means: "auto" is the newest whole one (None: begin), else that folder.

        Raises UserError if the path is no whole checkpoint of this run.
        """
        if not resume.strip():
            raise UserError(f"--resume is empty; give auto or {self.checkpoints}/step-XXXXXX")
        if resume == "auto":
            newest = self.newest()
            if newest is None and self.final.exists():
                raise UserError(
                    f"--resume auto: {self.path} has a result and no whole checkpoint to continue it from; choose "
                    "another run.name, or delete the folder to begin again"
                )
            return newest
        folder = Path(resume)
        if folder.resolve().parent != self.checkpoints.resolve() or step_of(folder) is None:
            known = ", ".join(path.name for _, path in self._by_step()) or "none"
            raise UserError(
                f"--resume {resume}: not a checkpoint of the run {self.path} (it has: {known}); give auto or "
                f"{self.checkpoints}/step-XXXXXX. To start another run from these weights use --init-from"
            )
        if not folder.is_dir():
            raise UserError(f"--resume {resume}: there is no such folder; give auto for the newest checkpoint")
        fault = fault_of(folder)
        if fault is not None:
            raise UserError(f"--resume {resume}: the checkpoint is broken: {fault}; give auto for the newest whole one")
        return folder

    def _by_step(self) -> list[tuple[int, Path]]:
        """Every checkpoint folder, whole or not, newest first."""
        return sorted(_numbered(self.checkpoints), reverse=True)


def step_name(step: int) -> str:
    """What is named by an optimizer step."""
    return f"step-{step:06d}"


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """What is named by a step in a folder, with the step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [(step, path) for path in paths if (step := step_of(path)) is not None]


def step_of(path: Path) -> int | None:
    """The optimizer step in the name of a checkpoint's folder, None if it is none."""
    match = re.fullmatch(r"step-(\d{6,})", path.name)
    return int(match[1]) if match else None


def content_of(checkpoint: Path) -> str:
    """Names a whole checkpoint by all that it holds."""
    return sha256(checkpoint / MANIFEST)
