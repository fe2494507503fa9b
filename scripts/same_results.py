"""Runs one fixed list of commands on two checkouts and compares what comes out, to the bit: the proof of a clean-up.

    python scripts/same_results.py REF_COMMIT [--expect NAME ...] [--only NAME ...] [--jobs 2] [--keep FOLDER]

REF_COMMIT is checked out beside the working tree for as long as this takes; both then do the same on this machine:

    train/RUN/...   short trainings of a tiny random base, and the shipped quickstart on four pictures: adapters,
                    averages, optimizer, log, samples, records
    generate/NAME   the embedded demo: every sampler once, a start picture, inversion, other schedules, an adapter, ...
    recipes         what those pictures say of themselves
    python/NAME     the same from Python, as the README and docs/samplers.md have it: pictures, and latents in float32
    golden/GROUP    every expected array of the golden files, by each checkout's own functions, in both precisions

Only the command line, documented names of the package, and what tests/*golden* modules define (`load_golden`,
`in_float32`, `VALUES`, `SCHEDULED`, `scheduled`) are used, so that files may move. The demo is each checkout's own.
--expect says aloud what a change does on purpose: the items named (or `generate/*`) may differ.
Exit code 0: all others are equal; 1: one is not, or nothing came out to compare; 2: the arguments are wrong.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import same_results_list
import yaml
from same_results_list import TRAIN, Content, names

ROOT = Path(__file__).resolve().parent.parent
LINES = 4  # of the differences of one item
TIMES = ("time", "speed")  # of a log's records

# What a training leaves, below its run folder.
TRAINED = {
    "adapter": ("final/adapter*/*.safetensors", "adapters/*/*.safetensors"),
    "average": ("checkpoints/*/ema.safetensors",),
    "optimizer": ("checkpoints/*/optimizer.safetensors",),
    "state": ("checkpoints/*/trained.safetensors", "checkpoints/*/progress.safetensors"),
    "log": ("log.jsonl",),
    "samples": ("samples/**/*.png",),
    "records": ("config.yaml", "final/adapter*/*.json", "checkpoints/*/run.json"),
}


def items(chosen: list[str]) -> dict[str, Callable[[Path], Content]]:
    """What is compared of the commands chosen, by name, and how it is read in the folder of one checkout's results."""
    found: dict[str, Callable[[Path], Content]] = {}
    for each in chosen:
        kind, _, name = each.partition("/")
        if kind == "train":
            parts = [part for part in TRAINED if part != "samples" or "--prompt" in TRAIN[name]]
            found |= {f"{each}/{part}": partial(contents, f"runs/{name}", TRAINED[part]) for part in parts}
        else:
            found[each] = partial(contents, each, ("*.png",)) if kind == "generate" else partial(arrays, each)
    drawn = any(each.startswith("generate/") for each in chosen)
    return found | ({"recipes": recipes} if drawn else {})


# ---------------------------------------------------------------------------------------------------- what came out


def contents(part: str, patterns: Sequence[str], out: Path) -> Content:
    """What the files of these patterns in `out/part` hold, by file and name in it; of PNG files the pixels."""
    paths = sorted({path for pattern in patterns for path in (out / part).glob(pattern)})
    found = {f"{path.relative_to(out / part)} {key}".strip(): value for path in paths for key, value in _read(path)}
    return {name: _anywhere(value, out) for name, value in found.items()}


def arrays(name: str, out: Path) -> Content:
    """The arrays that one entry of the list saved."""
    return contents("", (f"{name}.npz",), out)


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    match path.suffix:
        case ".png":
            from PIL import Image

            yield "", np.asarray(Image.open(path))
        case ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "np") as file:
                yield from _flat(file.metadata() or {}, "metadata")
                for key in file.keys():  # noqa: SIM118  # it is no mapping
                    yield key, file.get_tensor(key)
        case ".npz":
            yield from np.load(path).items()
        case ".jsonl":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                record = json.loads(line)
                yield from _flat({key: value for key, value in record.items() if key not in TIMES}, f"line {number}")
        case _:  # JSON is YAML too
            yield from _flat(yaml.safe_load(path.read_text()), "")


def recipes(out: Path) -> Content:
    """The text chunks of all PNG files, JSON taken apart."""
    from PIL import Image

    found: Content = {}
    for path in sorted(out.rglob("*.png")):
        for chunk, text in getattr(Image.open(path), "text", {}).items():
            name = f"{path.relative_to(out)} {chunk}"
            found |= dict(_flat(json.loads(text), name)) if text.startswith("{") else {name: text}
    return {name: _anywhere(value, out) for name, value in found.items()}


def _anywhere(value: Any, out: Path) -> Any:
    """A text without the folder in which it came out."""
    return value.replace(str(out), "OUT") if isinstance(value, str) else value


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each leaf of nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    else:
        yield name, value


def differences(before: Content, after: Content) -> list[str]:
    """A line for each name whose values are not the same, to the bit and the type; [] where all are."""
    found = [f"{name}: gone" for name in before.keys() - after.keys()]
    found += [f"{name}: new" for name in after.keys() - before.keys()]
    found += [
        f"{name}: {how}" for name in before.keys() & after.keys() if (how := _difference(before[name], after[name]))
    ]
    return sorted(found) if before or after else ["nothing came out on either side"]


def _difference(before: Any, after: Any) -> str:
    """How two values differ; "" if they do not."""
    if not (isinstance(before, np.ndarray) and isinstance(after, np.ndarray)):
        same = type(before) is type(after) and repr(before) == repr(after)  # NaN is NaN
        return "" if same else f"{_short(before)} -> {_short(after)}"
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"{before.dtype}{list(before.shape)} -> {after.dtype}{list(after.shape)}"
    if before.tobytes() == after.tobytes():
        return ""
    apart = ~((before == after) | (np.isnan(before) & np.isnan(after))) if before.dtype.kind == "f" else before != after
    with np.errstate(invalid="ignore"):
        off = np.abs(before.astype(np.float64) - after.astype(np.float64))[apart]
    return f"{apart.sum():,} of {apart.size:,} numbers, by up to {off.max(initial=0):.1e}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------------ the verdict


def named(patterns: list[str], known: Sequence[str]) -> list[str]:
    """Those of the names that a pattern fits, in order. Raises ValueError for a pattern that fits none."""
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]:
        raise ValueError(f"nothing is called {', '.join(unknown)}; there is {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def summary(found: Mapping[str, list[str]], on_purpose: Sequence[str]) -> tuple[list[str], bool]:
    """A line for each item, with some of its differences below it, and a last one; whether nothing else differs."""
    lines, good = [], True
    for name, differing in found.items():
        good &= not differing or name in on_purpose
        verdict = f"{len(differing)} differ" if differing else "equal"
        if name in on_purpose:
            verdict += ", as expected" if differing else ", although a difference was expected"
        lines.append(f"{name:32} {verdict}")
        lines += [f"    {line}" for line in differing[:LINES]]
        lines += [f"    ... and {len(differing) - LINES} more"] if len(differing) > LINES else []
    count = sum(not differing for differing in found.values())
    bad = sum(bool(differing) and name not in on_purpose for name, differing in found.items())
    return [*lines, f"{count} of {len(found)} items are equal; {bad} differ that should not"], good


# ------------------------------------------------------------------------------------------------------ the command


@contextmanager
def reference(commit: str, folder: Path) -> Iterator[Path]:
    """A commit checked out in `folder`, in a worktree that is gone afterwards."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def inside(checkout: Path, *arguments: object) -> None:
    """The list, in a process that imports the package of `checkout`."""
    kept = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, str(same_results_list.__file__), *map(str, arguments)]
    subprocess.run(line, env=os.environ | kept, cwd=checkout, check=True)


def main(arguments: list[str] | None = None) -> int:
    """Run both, compare, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--expect", nargs="+", default=[], metavar="NAME", help="items that may differ")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="run these alone, as train/su")
    parser.add_argument("--jobs", type=int, default=1, help="2: both checkouts at once")
    parser.add_argument("--keep", type=Path, help="a new folder for all results; else a temporary one")
    options = parser.parse_args(arguments)
    try:
        chosen = named(options.only, names())
        compared = items(chosen)
        on_purpose = named(options.expect, list(compared))
    except ValueError as error:
        parser.error(str(error))
    known = ["git", "rev-parse", "--quiet", "--verify", f"{options.commit}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        parser.error(f"{options.commit} is no commit of this repository")
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        place = (options.keep or Path(temporary) / "results").resolve()
        place.mkdir(parents=True)
        with reference(options.commit, Path(temporary) / "reference") as before:
            inside(ROOT, place / "shared")
            both = {"before": before, "after": ROOT}
            for name in both:
                (place / name).mkdir()
                (place / name / "shared").symlink_to("../shared")
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda name: inside(both[name], both[name], place / name, *chosen), both))
        found = {name: differences(of(place / "before"), of(place / "after")) for name, of in compared.items()}
    lines, good = summary(found, on_purpose)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
