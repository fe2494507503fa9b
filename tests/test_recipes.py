"""Every recipe of configs/ can begin, and the README's table has it. Oracle: the files that are there."""

import re
from pathlib import Path
from typing import Any

import pytest

from pixart_ft.config.reading import shipped_configs
from pixart_ft.config.train import PlanConfig, load_config
from pixart_ft.config.yaml_text import parse
from pixart_ft.training.start import dry_run
from tests.helpers.real_size import real_size

ROOT = Path(__file__).parents[1]
RECIPES = shipped_configs()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The real thing, all but the weights, by the side of its pictures."""
    return {side: real_size(tmp_path_factory.mktemp(f"xl{side}"), side) for side in (512, 1024)}


@pytest.mark.filterwarnings("ignore:pictures below")
@pytest.mark.filterwarnings("ignore:of 1000 noise levels")
@pytest.mark.filterwarnings("ignore:the base predicts")
@pytest.mark.parametrize("name", RECIPES)
def test_each_can_begin(name: str, bases: dict[int, Path], pictures: Path, tmp_path: Path) -> None:
    said: Any = parse(RECIPES[name].read_text())
    places: dict[str, Any] = {"run.folder": str(tmp_path / "run"), "data.cache": str(tmp_path / "cache")}
    if (base := said["model"]["base"]) != "demo":
        places |= {"model.base": str(bases[1024 if "1024" in base else 512]), "data.folder": str(pictures)}
    if "quantization" in said["model"]:
        pytest.importorskip("bitsandbytes")
    if said["data"].get("prior_weight") is not None:
        places["data.prior"] = "demo"
    assert any(line.startswith("trained") for line in dry_run(load_config(name, places)))


def test_each_has_a_card_and_a_row() -> None:
    """The card says what for, how it is begun, and what memory is predicted; the README names those that are there."""
    assert len(RECIPES) == 10
    for name, path in RECIPES.items():
        card = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        for word in ("for", "run", "memory", "limits"):
            assert re.search(rf"^#   {word} +\S", card, flags=re.M), f"{name}: say {word} at its head"
        assert "predicted" in card and f"--config {name}" in card
    rows = re.findall(r"\[`(\w+)`\]\(configs/\1\.yaml\)", (ROOT / "README.md").read_text())
    assert sorted(rows) == sorted(RECIPES)


def test_a_plan_takes_what_a_training_does() -> None:
    given = {"train.steps": 3, "data.folder": "demo"}
    assert load_config({}, given).model_dump() == PlanConfig(**load_config({}, given).model_dump()).model_dump()
