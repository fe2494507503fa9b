"""The shape of the house: imports go down the levels of this table, every dependency has a tested version.

Oracle: the table below, which is the design's. A module may import from lower levels alone, inside a package too.
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pixart_ft"

LEVELS = {
    "errors": -1,
    "text": 0,
    "lettering": 0,
    "intervals": -1,
    "adapter_switch": 0,
    "randomness": 0,
    "yaml_text": 0,
    "files": 1,
    "shell": 0,
    "key_types": 1,
    "samplers": 0,
    "recipes": 1,
    "pictures": 2,
    "own_pictures": 3,
    "stopping": 0,
    "run_log": 2,
    "run_lock": 2,
    "settings": 2,
    "config": 3,
    "diffusion": 0,
    "diffusion.names": -2,
    "diffusion.respacing": -1,
    "diffusion.schedules": 0,
    "diffusion.sigmas": 2,
    "diffusion.process": 1,
    "diffusion.weighting": 2,
    "diffusion.objectives": 2,
    "diffusion.solvers": 2,
    "diffusion.flow": 3,
    "diffusion.likelihood": 4,
    "schedulers": 6,
    "schedulers.base": 3,
    "schedulers.discrete": 4,
    "schedulers.sigma": 4,
    "schedulers.sde": 5,
    "schedulers.stock": 4,
    "data": 0,
    "data.captions": 1,
    "data.datasets": 2,
    "data.cache": 3,
    "attention": 1,
    "vae": 0,
    "weights": 1,
    "scheduler_config": 1,
    "model_faults": 0,
    "base_place": 0,
    "base": 2,
    "models": 3,
    "ema": 1,
    "denoiser": 2,
    "targets": 1,
    "adapter_files": 4,
    "places": 5,
    "adapters": 5,
    "nested": 0,
    "checkpoint": 3,
    "prepared": 3,
    "sampling": 7,
    "pipeline": 8,
    "pipeline_folder": 7,
    "drawing": 7,
    "draws": 5,
    "text_encoder": 4,
    "text_to_image": 8,
    "generate_config": 4,
    "comparison": 9,
    "learning_rate": 4,
    "log": 3,
    "objective": 5,
    "evaluation": 6,
    "generation": 10,
    "watching": 7,
    "keeping": 8,
    "trainer": 8,
    "training_data": 7,
    "training_objective": 8,
    "trained_on": 8,
    "before_after": 3,
    "report": 9,
    "training_start": 9,
    "training_run": 10,
    "cli": 11,
}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "matplotlib", "safetensors"}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file, the package's own __init__ as ""."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Every module that a file imports; a name taken from a package of ours counts as its module if it is one."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in names if name.removeprefix("pixart_ft.") in modules()}
            found |= ours or {node.module}
    return found


def ours(path: Path) -> set[str]:
    return {name.removeprefix("pixart_ft.") for name in imported(path) if name.startswith("pixart_ft.")}


@pytest.mark.parametrize("name", sorted(name for name in modules() if name))
def test_imports_go_down_the_levels(name: str) -> None:
    assert name in LEVELS, f"give {name} a level"
    for other in ours(modules()[name]):
        assert LEVELS[other] < LEVELS[name], f"{name} (level {LEVELS[name]}) imports {other} (level {LEVELS[other]})"


def test_table_names_no_module_that_is_gone() -> None:
    assert set(LEVELS) <= set(modules())


def test_diffusion_knows_no_hugging_face_library_and_no_configuration() -> None:
    for name, path in modules().items():
        if name.startswith("diffusion"):
            heavy = {module.partition(".")[0] for module in imported(path)}
            assert not heavy & {"diffusers", "transformers", "accelerate", "peft", "pydantic"}, name
            assert not ours(path) & {"config", "settings"}, name


def test_files_of_the_command_line_import_nothing_heavy() -> None:
    """Help must be instant: what `cli` imports at the top, and what that imports in turn, has no torch."""
    waiting, seen = ["cli"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        top = imported(modules()[name], top_level_only=True)
        assert not {module.partition(".")[0] for module in top} & HEAVY, f"{name} imports {top & HEAVY} at the top"
        inner = {module.removeprefix("pixart_ft.") for module in top if module.startswith("pixart_ft.")}
        waiting += [other for other in inner if other in modules() and other not in seen]
    assert {"cli", "config"} <= seen


def test_no_test_file_imports_another() -> None:
    """What tests share stands in modules of its own, named for what it is."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 50
    for path in files:
        taken = {name for name in imported(path) if name.startswith("tests.") and ".test_" in name}
        assert not taken, f"{path.name} imports {taken}"


def test_dependencies_have_a_tested_version() -> None:
    """Every dependency of pyproject.toml is pinned in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = {_name(requirement) for requirement in project["dependencies"]}
    assert len(wanted) > 5 and wanted <= pinned, f"no line in constraints.txt for {wanted - pinned}"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")
