"""The versions that are promised are versions that were tried."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
UNTRIED = {
    "bitsandbytes",
    "xformers",
    "prodigyopt",
    "schedulefree",
    "wandb",
    "trackio",
}  # nothing is promised of their versions


def requirements() -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    return {canonicalize_name(found.name): found for found in map(Requirement, texts)}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_lower_bound_is_the_lowest_version_tried() -> None:
    parts = [(name, part) for name, requirement in requirements().items() for part in requirement.specifier]
    bounds = {name: part.version for name, part in parts if part.operator == ">="}
    assert bounds == pins("constraints-lowest.txt")
    assert requirements().keys() - bounds.keys() == UNTRIED


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_versions_tried_are_versions_allowed(file: str) -> None:
    tried = pins(file)
    for name, requirement in requirements().items():
        assert name in UNTRIED or tried[name] in requirement.specifier, requirement


@pytest.mark.parametrize("target", ["quickstart", "test-lowest"])
def test_an_old_python_is_refused_before_anything_is_made(tmp_path: Path, target: str) -> None:
    old = tmp_path / "python3.10"
    code = "import sys; sys.version_info = (3, 10, 13); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    old.chmod(0o755)
    folders = [f"VENV={tmp_path / 'venv'}", f"LOWEST={tmp_path / 'lowest'}"]
    made = subprocess.run(
        ["make", "-s", f"PYTHON={old}", *folders, target], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    needed = PROJECT["requires-python"].removeprefix(">=")
    said = f"make needs Python {needed} or newer, and {old} is 3.10.13: give another, as in  make PYTHON=python3.12 "
    assert made.returncode != 0 and made.stderr.splitlines()[0] == said + target
    assert [path.name for path in tmp_path.iterdir()] == ["python3.10"]
