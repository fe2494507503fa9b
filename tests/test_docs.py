"""What the guides say is what the code says. Oracle: the table of sampler facts."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pixart_ft import cli
from pixart_ft.config.samplers import EVERY_SAMPLER, SAMPLERS, STOCK_SAMPLERS
from tests.helpers.adapters import make_adapter

ROOT = Path(__file__).parent.parent
CITED = re.compile(r"[A-Z]\w+ (?:et al\.|& [A-Z]\w+) \(?(?:19|20)\d\d[a-z]?")


def sampler_table() -> str:
    """The Markdown table of docs/samplers.md."""
    lines = ["| sampler | | calls | order | noise | options | from |", "|---" * 7 + "|"]
    for facts in SAMPLERS.values():
        order = "" if facts.order is None else str(facts.order)
        options = ", ".join(facts.options)
        noise = "yes" if facts.stochastic else "no"
        what = f"{facts.title}: {facts.summary}"
        lines.append(
            f"| `{facts.name}` | {what} | {facts.calls_per_step} | {order} | {noise} | {options} | {facts.source} |"
        )
    return "\n".join(lines)


def stock_table() -> str:
    """The table of diffusers' own there."""
    lines = ["| sampler | | calls | noise | class | spacings |", "|---" * 6 + "|"]
    for facts in STOCK_SAMPLERS.values():
        noise, what = "yes" if facts.stochastic else "no", f"{facts.title}: {facts.summary}"
        spacings = ", ".join(facts.spacings)
        lines.append(f"| `{facts.name}` | {what} | {facts.calls_per_step} | {noise} | {facts.kind} | {spacings} |")
    return "\n".join(lines)


def test_the_guide_has_the_tables_of_facts() -> None:
    for table in (sampler_table(), stock_table()):
        assert table in (ROOT / "docs" / "samplers.md").read_text(), f"put this there:\n{table}"


def test_every_source_that_is_cited_is_in_the_references() -> None:
    """By name and year; Su and Kuppa are known by their names alone."""
    known = (ROOT / "docs" / "references.md").read_text()
    texts = [*(ROOT / "pixart_ft").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    cited = {name for path in texts for name in CITED.findall(path.read_text())}
    assert len(cited) > 20 and "Karras et al. 2022" in cited
    assert [name for name in sorted(cited) if f"| {name.replace('(', '')} |" not in known] == []


def test_every_line_of_the_table_of_exactness_is_a_test() -> None:
    lines = [line for line in (ROOT / "docs" / "exactness.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 10
    for line in lines:
        named = re.search(r"\| `(tests/\S+\.py)::(\w+)` \|$", line)
        assert named and f"def {named[2]}(" in (ROOT / named[1]).read_text(), line


def test_the_readme_names_every_sampler() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in EVERY_SAMPLER)


def shell_lines(path: Path) -> list[list[str]]:
    """The words of each command line of this program in a guide's blocks, or in a recipe's card."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip("#").strip().removeprefix("run ").strip() for line in text.splitlines() if line[:4] != "    $"]
    found = [shlex.split(line) for line in lines if line.startswith(("pixart-ft ", "accelerate launch scripts/"))]
    return [words[2:] if words[0] == "accelerate" else words for words in found]


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/your_pictures.md",
        "docs/samplers.md",
        "docs/hub.md",
        "docs/where_adapters_load.md",
        "docs/other_programs.md",
        "configs/lora_512.yaml",
        "configs/dreambooth.yaml",
    ],
)
def test_every_command_in_the_guides_is_understood(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reads each; nothing is run, since the pictures and the model are the reader's."""
    monkeypatch.chdir(ROOT)
    lines = shell_lines(ROOT / path)
    assert lines
    for program, *words in lines:
        name = words.pop(0) if program == "pixart-ft" else Path(program).stem
        received: list[object] = []
        stand_in = replace(cli.COMMANDS[name], run=lambda *given: received.extend(given))  # noqa: B023
        monkeypatch.setitem(cli.COMMANDS, name, stand_in)
        assert cli.main([name, *words]) == 0, words
        assert received, words
        assert program == "pixart-ft" or (ROOT / program).is_file()


def test_the_blocks_on_where_an_adapter_loads_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, but for the embedded model, whose place a small one takes."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "where_adapters_load.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for seed, name in enumerate(("my_style", "my_dog")):
        make_adapter(tiny, tmp_path / "runs" / name / "final" / "adapter", seed=seed)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block.replace('"demo"', "base"), "where_adapters_load.md", "exec"), {"base": str(tiny)})
    assert (tmp_path / "fused" / "model_index.json").is_file()
