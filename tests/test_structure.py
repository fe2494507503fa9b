"""The shape of the house: imports go down the rooms of this table, every dependency has a tested version.

Oracle: the table below, which is the design's and docs/architecture.md's.
"""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pixart_ft"

# Rooms from the ground up, and in each the order of its files. A module imports from earlier rooms, and from earlier
# files of its own; the package's own names and the command line are the doors, which import from everywhere.
HOUSE = {
    "": "errors files randomness",
    "diffusion": "names intervals respacing schedules process sigmas weighting objectives solvers flow readings "
    "likelihood",
    "config": "text yaml_text key_types reading options samplers optimizers hub sources rules train generate "
    "evaluate export push",
    "pictures": "lettering recipes own sheets process_plot",
    "schedulers": "stored base discrete sigma sde stock",
    "runs": "manifest lock log folder metadata hub results",
    "sharing": "card push",
    "model": "place faults weights vae text captions attention repeated engine adapter_switch network shared_calls "
    "base quantized loading projection saving original convert text_encoder",
    "adapters": "files targets attach weights acting dialects adopting pipelines full export",
    "data": "pixels rows folders tags seen tables tars sources buckets store cache live",
    "sampling": "places settings loop pipeline_folder pipeline text_to_image comparison command",
    "evaluation": "places objective held_out metrics features measure statistics tables words plots page drawing "
    "contestants likeness command",
    "training": "places shell stopping processes nested ahead ema sharding importance step_numbers "
    "pace screen trackers records learning_rate optimizers guard in_backward moving batches encode overview speed "
    "objective kinds trained_on before_after watching keeping trainer report start run caching memory doctor",
}
DOORS = ("", "cli")
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "matplotlib",
    "safetensors",
    "datasets",
    "pyarrow",
}


@cache
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
    return {name.removeprefix("pixart_ft.") for name in imported(path) if name.split(".")[0] == "pixart_ft"}


def order() -> list[str]:
    """All modules of the house from the ground up, a room's own names after its files."""
    found = []
    for room, files in HOUSE.items():
        found += [f"{room}.{file}".lstrip(".") for file in files.split()] + ([room] if room else [])
    return found


@pytest.mark.parametrize("name", sorted(set(modules()) - set(DOORS)))
def test_imports_go_down(name: str) -> None:
    places = {module: place for place, module in enumerate(order())}
    assert name in places, f"give {name} a place in its room"
    for other in ours(modules()[name]):
        assert other in places, f"{name} imports a door: {other}"
        assert places[other] < places[name], f"{name} imports {other}, which stands above it"


def test_the_house_names_no_module_that_is_gone() -> None:
    assert set(order()) == set(modules()) - set(DOORS)
    assert len(HOUSE) <= 16


def test_the_page_about_the_house_shows_these_rooms_in_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\| `(\w+)/` \|", page, flags=re.M) == [room for room in HOUSE if room]


def test_diffusion_knows_no_hugging_face_library_and_no_configuration() -> None:
    for name, path in modules().items():
        if name.startswith("diffusion"):
            heavy = {module.partition(".")[0] for module in imported(path)}
            assert not heavy & {"diffusers", "transformers", "accelerate", "peft", "pydantic"}, name
            assert not ours(path) & {"config", "settings"}, name


def test_files_of_the_command_line_import_nothing_heavy() -> None:
    """Help and a wrong path are told in an instant: what these import at the top, and that in turn, has no torch."""
    waiting, seen = ["cli", "training.places", "sampling.places", "evaluation.places"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        top = imported(modules()[name], top_level_only=True)
        assert not {module.partition(".")[0] for module in top} & HEAVY, f"{name} imports {top & HEAVY} at the top"
        inner = {module.removeprefix("pixart_ft.") for module in top if module.startswith("pixart_ft.")}
        waiting += [other for other in inner if other in modules() and other not in seen]
    assert {"config.train", "adapters.files", "data.folders"} <= seen


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
