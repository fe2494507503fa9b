"""What a finished run leaves: adapters, the before/after sheet, the loss curve, and a summary on the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from pixart_ft.adapters import FINAL_ADAPTERS, AdapterMetadata, save_adapter
from pixart_ft.checkpoint import RunFolder
from pixart_ft.errors import UserError, attempted
from pixart_ft.evaluation import Estimate
from pixart_ft.files import write_file
from pixart_ft.pictures import grid, loss_curve, term_curves
from pixart_ft.shell import pasteable
from pixart_ft.trainer import Trainer
from pixart_ft.watching import Comparison, Place


def finish(
    folder: RunFolder,
    trainer: Trainer,
    metadata: AdapterMetadata,
    null_caption: Tensor,
    prompts: Sequence[str],
) -> None:
    """Write `final/` and print the summary: the adapters first, since no report may lose them.

    final/adapter holds the averaged weights where the run has them, else the last; then final/adapter_raw the last.
    """
    written = save_adapters(folder, trainer, metadata, null_caption)
    with attempted("the held-out loss"):
        trainer.watch.measure(trainer.place)
    with attempted("the sample grid"):
        trainer.watch.draw(trainer.place)
    records = folder.log.comparable()
    if any(record.get("train") for record in records):
        with attempted("the loss curve"):
            loss_curve(records, folder.final / "loss.png", title=folder.path.name)
            written["loss curve"] = folder.final / "loss.png"
            terms = folder.final / "loss_terms.png"
            if term_curves(records, terms, titles=trainer.objective.titles, title=folder.path.name):
                written["its terms"] = terms
    if prompts:
        with attempted("the sheet of before and after"):
            sheet = before_after(folder, trainer.watch.since, trainer.step, prompts)
            write_file(folder.final / "before_after.png", lambda aside: sheet.save(aside, format="PNG"))
            written["before and after"] = folder.final / "before_after.png"
    with attempted("the summary"):
        print(summary(trainer.place, trainer.watch.comparison(), trainer.objective.titles))
    for what, path in written.items():
        print(f"  {what:<18}{path}")
    example = prompts[0] if prompts else "..."
    print(f"  draw with it      {pasteable('generate', '--lora', folder.path, '--prompt', example)}")


def save_adapters(
    folder: RunFolder, trainer: Trainer, metadata: AdapterMetadata, null_caption: Tensor
) -> dict[str, Path]:
    """Write the adapters of `final/`; returns the one to use by its name in the summary."""
    main, beside = (folder.path / place for place in FINAL_ADAPTERS.values())
    if trainer.ema.is_on:
        averaged = replace(metadata, weights="ema")
        save_adapter(main, trainer.transformer, averaged, null_caption, state=trainer.ema.shadows)
        save_adapter(beside, trainer.transformer, metadata, null_caption)
    else:
        save_adapter(main, trainer.transformer, metadata, null_caption)
    return {"adapter": main}


def before_after(folder: RunFolder, first_step: int, last_step: int, prompts: Sequence[str]) -> Image.Image:
    """The fixed prompts before the training (upper row) and after it (lower row); the first seed of each.

    Raises UserError where the pictures are no longer in the folder of samples.
    """
    rows = []
    for step in (first_step, last_step):
        files = sorted(folder.samples_at(step).glob("*.png"))
        if not files or len(files) % len(prompts):
            raise UserError(f"{folder.samples_at(step)} has {len(files)} pictures for {len(prompts)} prompts")
        rows.append([Image.open(file).convert("RGB") for file in files[:: len(files) // len(prompts)]])
    before = f"step {first_step}" if first_step else "before"
    return grid(rows, row_labels=[before, "after"], column_labels=list(prompts))


def summary(place: Place, held_out: Comparison, titles: Mapping[str, str]) -> str:
    """By how much the held-out loss changed, with the standard error of the paired difference over pictures."""
    lines = [f"{place.step} steps, {place.samples} pictures seen"]
    if held_out.change and held_out.since:
        lines.append(f"  compared with step {held_out.since}, where the comparison began anew")
    # "loss" is the sum of the others: first, and alone where there is only one other
    names = ["loss", *(name for name in held_out.change if name != "loss" and len(held_out.change) > 2)]
    for name in names if held_out.change else ():
        change = held_out.change[name]
        before, after = held_out.before[name], held_out.after[name]
        title = "held-out loss" if name == "loss" else titles[name]
        lines.append(f"  {title:<22}{before.mean:.4f} -> {after.mean:.4f}   change {_signed(change)}")
    return "\n".join(lines)


def _signed(change: Estimate) -> str:
    if change.standard_error == 0:
        return f"{change.mean:+.4f}"
    errors = abs(change.mean) / change.standard_error
    return f"{change.mean:+.4f} ± {change.standard_error:.4f} ({errors:.1f} standard errors)"
