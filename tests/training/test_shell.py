"""Lines to paste: run by a shell, they must reach this program. Oracle: the shell itself."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ft.training.shell import pasteable

ROOT = Path(__file__).parents[2]


def start(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one, with an interpreter in a virtual environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(sys, "executable", str(start(tmp_path / "env" / "bin" / "python")))
    return tmp_path


@pytest.mark.parametrize("typed", ["env/bin/pixart-ft", "./env/bin/pixart-ft", "my env/pixart-ft"])
def test_the_program_as_typed(typed: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(place / typed)
    monkeypatch.setattr(sys, "argv", [typed, "train"])
    assert shlex.split(pasteable("generate", "--lora", Path("my run"))) == [typed, "generate", "--lora", "my run"]


def test_the_bare_name_where_the_shell_finds_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = start(place / "env" / "bin" / "pixart-ft")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert pasteable("generate") == f"{program} generate"
    monkeypatch.setenv("PATH", str(program.parent))
    assert pasteable("generate") == "pixart-ft generate"
    start(place / "other" / "pixart-ft")  # another one comes first
    monkeypatch.setenv("PATH", f"{place / 'other'}:{program.parent}")
    assert pasteable("generate") == f"{program} generate"


def test_a_script_of_a_clone_without_installation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "pixart_ft").mkdir()
    for name in ("train", "generate"):
        start(place / "scripts" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert pasteable("generate") == "env/bin/python scripts/generate.py"


def test_from_a_notebook_or_another_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/elsewhere/launcher.py"])
    assert pasteable("generate") == "env/bin/python -m pixart_ft.cli generate"
    start(place / "env" / "bin" / "pixart-ft")
    assert pasteable("generate") == "env/bin/pixart-ft generate"


def test_the_line_runs_in_a_shell(tmp_path: Path) -> None:
    line = (
        """from pixart_ft.training.shell import pasteable; print(pasteable("generate", "--prompt", "it's", "--help"))"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    run = subprocess.run(printed, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("draw pictures")
