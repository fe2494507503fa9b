"""A base's configurations are read once, whatever is done with it. Oracle: Python's own audit of opened files."""

from collections import Counter
from pathlib import Path

from pixart_ft.cli import main
from tests.reads import reads_below
from tests.runs import command, short_run

CONFIGURATIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)


def by(who: str, counted: Counter[tuple[str, str]]) -> dict[str, int]:
    """How often `who` read each file."""
    return {file: count for (file, reader), count in counted.items() if reader == who}


def check_once(counted: Counter[tuple[str, str]]) -> None:
    """We read each configuration once; diffusers reads a part's once more for each time that it loads the part."""
    assert by("pixart_ft read_object", counted) == dict.fromkeys(CONFIGURATIONS, 1)
    theirs = {file for (file, reader) in counted if not reader.startswith("pixart_ft")}
    assert {file for file in theirs if not file.startswith("tokenizer/")} <= {
        "transformer/config.json",
        "vae/config.json",
    }


def test_a_generation_reads_each_configuration_once(tiny: Path, tmp_path: Path) -> None:
    asked = ["--model", str(tiny), "--prompt", "a circle", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]
    with reads_below(tiny) as counted:
        assert main(["generate", *asked]) == 0
    check_once(counted)
    assert all(count == 1 for (file, _), count in counted.items() if not file.startswith("tokenizer/"))


def test_a_training_reads_each_configuration_once(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    options = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")
    options |= {"train.steps": 1, "train.checkpoint_every": 0, "validation.every": 0, "optim.warmup_steps": 0}
    with reads_below(tiny) as counted:
        assert main(["train", *command(options)]) == 0
    check_once(counted)
    assert max(by("pixart_ft sha256", counted).values()) == 1  # for the cache, which names a model by its files
