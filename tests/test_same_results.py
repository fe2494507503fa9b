"""The comparison of two checkouts. Oracle: folders and values that differ by what the test put there."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from same_results import contents, differences, items, named, recipes, summary
from same_results_list import GENERATE, GOLDEN, golden_names, names

from pixart_ft.config.samplers import EVERY_SAMPLER


def test_the_last_bit_a_type_and_a_missing_name_are_differences() -> None:
    one = np.array([1.0, np.nan, 2.0], np.float32)
    assert differences({"a": one, "b": None, "c": np.nan}, {"a": one.copy(), "b": None, "c": np.nan}) == []
    other = np.array([np.nextafter(np.float32(1), np.float32(2)), np.nan, 2.0], np.float32)
    assert differences({"a": one}, {"a": other}) == ["a: 1 of 3 numbers, by up to 1.2e-07"]
    assert differences({"a": np.zeros(2)}, {"a": -np.zeros(2)}) == ["a: 0 of 2 numbers, by up to 0.0e+00"]
    assert differences({"a": one}, {"a": one.astype(np.float64)}) == ["a: float32[3] -> float64[3]"]
    assert differences({"a": 1, "b": 2}, {"a": 1.0, "c": 2}) == ["a: 1 -> 1.0", "b: gone", "c: new"]
    assert differences({}, {}) == ["nothing came out on either side"]


def test_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    for name, value, time in (("before", 1.0, 5.0), ("after", 2.0, 6.0)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"step": 1, "time": time, "train": {"loss": value}}) + "\n")
        (folder / "config.yaml").write_text(f"train:\n  steps: 3\n  rate: {value}\n")
        save_file({"w": np.full(4, value)}, folder / "w.safetensors", {"time": "kept"})
        text = PngImagePlugin.PngInfo()
        text.add_text("recipe", json.dumps({"lora": f"{folder.parent}/a", "versions": {"x": value}}))
        Image.new("L", (2, 2), int(value)).save(folder / "a.png", pnginfo=text)

    def compared(pattern: str) -> list[str]:
        return differences(*(contents("run", [pattern], tmp_path / name) for name in ("before", "after")))

    assert compared("*.jsonl") == ["log.jsonl line 1 train loss: 1.0 -> 2.0"]
    assert compared("*.yaml") == ["config.yaml train rate: 1.0 -> 2.0"]
    assert compared("*.safetensors") == ["w.safetensors w: 4 of 4 numbers, by up to 1.0e+00"]
    assert compared("*.png") == ["a.png: 4 of 4 numbers, by up to 1.0e+00"]
    told = differences(recipes(tmp_path / "before"), recipes(tmp_path / "after"))
    assert told == ["run/a.png recipe versions x: 1.0 -> 2.0"]


def test_only_what_is_named_may_differ_and_all_is_told() -> None:
    found: dict[str, list[str]] = {"a/1": [], "a/2": ["x: gone"], "b": []}
    lines, good = summary(found, [])
    assert not good and lines[-1] == "2 of 3 items are equal; 1 differ that should not"
    lines, good = summary(found, named(["a/*"], list(found)))
    assert good and [line.split(maxsplit=1)[1] for line in lines if line.startswith("a/")] == [
        "equal, although a difference was expected",
        "1 differ, as expected",
    ]
    assert "    x: gone" in lines
    with pytest.raises(ValueError, match="quack"):
        named(["quack"], list(found))


def test_every_sampler_and_every_golden_group_is_on_the_list() -> None:
    samplers = {"ddim"}  # the default
    for line in GENERATE.values():
        words = shlex.split(line)
        samplers |= {words[place + 1] for place, word in enumerate(words) if word == "--sampler"}
    assert samplers == set(EVERY_SAMPLER)
    found = golden_names(Path(__file__).parent.parent)
    assert set(GOLDEN) == found["load_golden"]().groups == set(found["VALUES"])
    assert set(found["SCHEDULED"]) < set(GOLDEN) and {"in_float32", "scheduled"} < set(found)
    assert {"generate/ddim", "train/hybrid/samples", "golden/traj", "recipes"} <= set(items(names()))
    assert list(items(["golden/traj"])) == ["golden/traj"]
