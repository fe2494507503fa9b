"""What the guides say is what the code says. Oracle: the table of sampler facts."""

from pathlib import Path

from pixart_ft.samplers import EVERY_SAMPLER, SAMPLERS, STOCK_SAMPLERS

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


def test_the_readme_names_every_sampler() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in EVERY_SAMPLER)
