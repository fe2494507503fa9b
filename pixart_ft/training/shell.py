"""What can be pasted into a shell: this program, as it was started, with other words after it."""

import shlex
import sys
from pathlib import Path
from shutil import which

NAME = "pixart-ft"


def pasteable(command: str, *words: object) -> str:
    """The line that runs a command of this program with these words, from the folder that it runs in now."""
    return shlex.join([*_program(command), *map(str, words)])


def _program(command: str) -> list[str]:
    """As typed, where that was `pixart-ft`; in a clone, the command's script; else what lies beside the interpreter."""
    typed, beside = Path(sys.argv[0]), Path(sys.executable).with_name(NAME)
    if typed.name == NAME:
        found = which(NAME)
        return [NAME if found and Path(found).samefile(typed) else sys.argv[0], command]
    script = typed.with_name(f"{command}.py")
    if typed.parent.name == "scripts" and script.is_file() and (typed.parent.parent / "pixart_ft").is_dir():
        return [_near(Path(sys.executable)), str(script)]
    start = [_near(beside)] if beside.is_file() else [_near(Path(sys.executable)), "-m", "pixart_ft.cli"]
    return [*start, command]


def _near(path: Path) -> str:
    """Relative where it is below the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
