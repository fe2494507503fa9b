"""What the guides say is what the code says. Oracle: the table of sampler facts."""

from pathlib import Path

from pixart_ft.samplers import SAMPLERS

ROOT = Path(__file__).parent.parent


def sampler_table() -> str:
    """The Markdown table of docs/samplers.md."""
    lines = ["| sampler | | calls | order | noise | options | from |", "|---" * 7 + "|"]
    for facts in SAMPLERS.values():
        order = "" if facts.order is None else str(facts.order)
        options = ", ".join(facts.settings)
        noise = "yes" if facts.stochastic else "no"
        what = f"{facts.title}: {facts.summary}"
        lines.append(
            f"| `{facts.name}` | {what} | {facts.calls_per_step} | {order} | {noise} | {options} | {facts.source} |"
        )
    return "\n".join(lines)


def test_the_guide_has_the_table_of_facts() -> None:
    assert sampler_table() in (ROOT / "docs" / "samplers.md").read_text(), f"put this there:\n{sampler_table()}"


def test_the_readme_names_every_sampler() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in SAMPLERS)
