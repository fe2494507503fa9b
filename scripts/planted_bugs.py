"""Plants every bug of tests/planted_bugs/*.yaml in a copy of the working tree, one at a time, and expects a red test.

    python scripts/planted_bugs.py                       all of them
    python scripts/planted_bugs.py sampling ema_decay    an area (a file's name) or single bugs
    python scripts/planted_bugs.py --list

An entry has a `name`, a `file`, the text to `find` (once in that file), what to `replace` it by, and the `tests` of the
fast suite that must then fail. Red is a test that ran and failed: a bug that no longer compiles, a missing name, or a
fixture that broke before the test began proves nothing. First all the tests are run on the copy as it is.
Exit code 0: every bug was seen; 1: one was not; 2: the list itself is wrong, or a test is red without any bug.
"""

import argparse
import ast
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FOLDER = Path("tests") / "planted_bugs"
SECONDS = 120  # a bug may make a test hang
# Errors that any misspelt replacement gives.
NO_PROOF = {"SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError"}
# Importing these takes longer than most tests: a server imports them once, and every run is forked from it.
HEAVY = [
    "pytest",
    "torch",
    "accelerate",
    "peft",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "matplotlib.pyplot",
    "scipy.integrate",
    "pydantic",
]


@dataclass(frozen=True)
class Bug:
    """One entry of the list; `area` is the name of the file it stands in."""

    area: str
    name: str
    file: str
    find: str
    replace: str
    tests: list[str]

    def planted(self, root: Path) -> str:
        """The file's text with the bug in it. Raises ValueError unless `find` occurs exactly once."""
        path = root / self.file
        count = path.read_text(encoding="utf-8").count(self.find) if path.is_file() else 0
        if count != 1:
            raise ValueError(f"{self.area}/{self.name}: 'find' occurs {count} times in {self.file}, expected 1")
        return path.read_text(encoding="utf-8").replace(self.find, self.replace)


@dataclass(frozen=True)
class Outcome:
    """What pytest said: its exit code, the first test that failed (or ""), and the type of its error."""

    code: int
    failed: str = ""
    error: str = ""

    @property
    def verdict(self) -> str:
        """ "red", or why this proves nothing."""
        if self.code == 0:
            return "GREEN: no test saw it"
        if self.code != 1 or not self.failed:
            return f"NO PROOF: no test ran and failed (pytest's exit code {self.code})"
        return f"NO PROOF: {self.error} in {self.failed}" if self.error in NO_PROOF else "red"


def read_bugs(root: Path = ROOT) -> list[Bug]:
    """All entries, by area."""
    bugs = []
    for path in sorted((root / FOLDER).glob("*.yaml")):
        bugs += [Bug(area=path.stem, **entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []]
    return bugs


def faults(bug: Bug, root: Path = ROOT) -> list[str]:
    """What is wrong with an entry, as a clean-up may leave it: nothing to find, no such test, no Python."""
    where, found = f"{bug.area}/{bug.name}", []
    try:
        text = bug.planted(root)
        if bug.file.endswith(".py"):
            ast.parse(text)
    except ValueError as error:
        found.append(str(error))
    except SyntaxError as error:
        found.append(f"{where}: with the bug, {bug.file} is no Python: {error.msg}")
    if bug.find == bug.replace:
        found.append(f"{where}: 'replace' is what was found")
    for test in bug.tests:
        path, _, name = test.partition("::")
        source = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
        if not source or (name and f"def {name.partition('[')[0].split('::')[-1]}(" not in source):
            found.append(f"{where}: there is no test {test}")
    return found if bug.tests else [*found, f"{where}: names no test"]


def copy_tree(to: Path) -> Path:
    """The files that git tracks or would add, as they are now, in a new folder `to`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


class _Watch:
    """A pytest plugin that keeps the first test that ran and failed; a fixture that breaks does not count."""

    def __init__(self) -> None:
        self.failed = self.error = ""

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        wanted = call.when == "call" and call.excinfo is not None and not self.failed
        if wanted and call.excinfo.typename not in ("Skipped", "XFailed"):
            self.failed, self.error = item.nodeid, call.excinfo.typename


def _run_here(answer: Connection, place: Path, tests: list[str], compiled: bool) -> None:
    """In a process of its own: pytest in the copy, which must be the package that is imported."""
    with (place.parent / f"{place.name}.txt").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place)
    sys.path.insert(0, str(place))
    if not compiled:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    import pytest

    import pixart_ft

    assert Path(str(pixart_ft.__file__)).is_relative_to(place), "the installed package came before the copy"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", f"--timeout={SECONDS}"]
    watch = _Watch()
    code = pytest.main([*options, f"--basetemp={place}-tmp", *tests], plugins=[watch])
    answer.send(Outcome(int(code), watch.failed, watch.error))


def run_tests(place: Path, tests: list[str], *, compiled: bool = False) -> Outcome:
    """pytest on these tests of the copy `place`, in a process of its own.

    compiled: leave the compiled files there for later runs; not those of a bug, which the next one may be taken for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(theirs, place, tests, compiled))
    process.start()
    theirs.close()
    try:
        outcome: Outcome = ours.recv()
    except EOFError:
        outcome = Outcome(-1)
    process.join()
    return outcome


def try_bug(bug: Bug, place: Path) -> Outcome:
    """Plant, run its tests, undo."""
    path, before = place / bug.file, (place / bug.file).read_text(encoding="utf-8")
    path.write_text(bug.planted(place), encoding="utf-8")
    try:
        return run_tests(place, bug.tests)
    finally:
        path.write_text(before, encoding="utf-8")


def chosen(bugs: list[Bug], words: list[str]) -> list[Bug]:
    """The bugs whose area or name is among the words, all without any. Raises ValueError for a word that is neither."""
    unknown = set(words) - {bug.area for bug in bugs} - {bug.name for bug in bugs}
    if unknown:
        raise ValueError(f"no area and no bug is called {', '.join(sorted(unknown))}; --list names them")
    return [bug for bug in bugs if not words or bug.area in words or bug.name in words]


def report(bugs: Iterable[Bug], trial: Callable[[Bug], tuple[Outcome, float]], jobs: int) -> tuple[int, int]:
    """Try them all, a line each; returns how many were red, of how many."""
    red = total = 0
    bugs = list(bugs)
    with ThreadPoolExecutor(jobs) as pool:
        for bug, (outcome, seconds) in zip(bugs, pool.map(trial, bugs), strict=True):
            seen = outcome.verdict == "red"
            red, total = red + seen, total + 1
            what = f"{bug.area}/{bug.name}"
            print(f"{what:60} {outcome.failed if seen else outcome.verdict}  ({seconds:.1f} s)", flush=True)
    return red, total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="areas or bugs; all of them without")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once, each in a copy of its own")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    try:
        bugs = chosen(read_bugs(), options.names)
        wrong = [fault for bug in bugs for fault in faults(bug)]
    except (ValueError, TypeError, yaml.YAMLError) as error:
        wrong = [str(error)]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{bug.area}/{bug.name}" for bug in bugs))
        return 0

    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before the server imports what reads them
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        places: queue.SimpleQueue[Path] = queue.SimpleQueue()

        def trial(bug: Bug) -> tuple[Outcome, float]:
            place, begin = places.get(), time.monotonic()
            try:
                return try_bug(bug, place), time.monotonic() - begin
            finally:
                places.put(place)

        whole = copy_tree(Path(folder) / "whole")
        unbroken = run_tests(whole, sorted({test for bug in bugs for test in bug.tests}), compiled=True)
        if unbroken.code != 0:
            print(whole.with_suffix(".txt").read_text(), file=sys.stderr)
            print("without any bug, these tests must be green", file=sys.stderr)
            return 2
        for job in range(options.jobs):
            places.put(Path(shutil.copytree(whole, Path(folder) / f"copy-{job}")))
        red, total = report(bugs, trial, options.jobs)
    print(f"{red} of {total} planted bugs were seen")
    return 0 if red == total else 1


if __name__ == "__main__":
    sys.exit(main())
