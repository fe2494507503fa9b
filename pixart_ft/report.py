"""What a finished run leaves: adapters, the before/after sheet, the loss curve, and a summary on the terminal."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image
from torch import Tensor, nn

from pixart_ft.adapters import FINAL_ADAPTERS, AdapterMetadata, save_adapter
from pixart_ft.checkpoint import RunFolder
from pixart_ft.ema import Ema
from pixart_ft.evaluation import Estimate
from pixart_ft.files import write_file
from pixart_ft.pictures import grid, loss_curve
from pixart_ft.trainer import Result

TITLES = {"loss": "held-out loss", "simple": "noise error", "vlb": "bits/dim of one step"}


def finish(
    folder: RunFolder,
    transformer: nn.Module,
    ema: Ema,
    metadata: AdapterMetadata,
    null_caption: Tensor,
    result: Result,
    prompts: Sequence[str],
) -> None:
    """Write `final/` and print the summary.

    final/adapter holds the averaged weights where the run has them, else the last; then final/adapter_raw the last.
    """
    main, beside = (folder.path / place for place in FINAL_ADAPTERS.values())
    if ema.is_on:
        averaged = replace(metadata, weights="ema")
        save_adapter(main, transformer, averaged, null_caption, state=ema.shadows)
        save_adapter(beside, transformer, metadata, null_caption)
    else:
        save_adapter(main, transformer, metadata, null_caption)
    written = {"adapter": main}
    records = folder.log.records()
    if any(record.get("train") for record in records):
        written["loss curve"] = folder.final / "loss.png"
        loss_curve(records, written["loss curve"], title=folder.path.name)
    if prompts:
        written["before and after"] = folder.final / "before_after.png"
        sheet = before_after(folder, result.steps, prompts)
        write_file(written["before and after"], lambda aside: sheet.save(aside, format="PNG"))
    print(summary(result))
    for what, path in written.items():
        print(f"  {what:<18}{path}")
    example = prompts[0] if prompts else "..."
    print(f'  draw with it      pixart-ft generate --lora {folder.path} --prompt "{example}"')


def before_after(folder: RunFolder, last_step: int, prompts: Sequence[str]) -> Image.Image:
    """The fixed prompts before the first step (upper row) and after the last (lower row); the first seed of each."""
    rows = []
    for step in (0, last_step):
        files = sorted(folder.samples_at(step).glob("*.png"))
        seeds = len(files) // len(prompts)
        rows.append([Image.open(file).convert("RGB") for file in files[::seeds]])
    return grid(rows, row_labels=["before", "after"], column_labels=list(prompts))


def summary(result: Result) -> str:
    """By how much the held-out loss changed, with the standard error of the paired difference over pictures."""
    lines = [f"{result.steps} steps, {result.samples_seen} pictures seen"]
    # "loss" is the sum of the others: first, and alone where there is only one other
    names = ["loss", *(name for name in result.change if name != "loss" and len(result.change) > 2)]
    for name in names if result.change else ():
        change = result.change[name]
        before, after = result.held_out_before[name], result.held_out_after[name]
        lines.append(f"  {TITLES.get(name, name):<22}{before.mean:.4f} -> {after.mean:.4f}   change {_signed(change)}")
    return "\n".join(lines)


def _signed(change: Estimate) -> str:
    if change.standard_error == 0:
        return f"{change.mean:+.4f}"
    errors = abs(change.mean) / change.standard_error
    return f"{change.mean:+.4f} ± {change.standard_error:.4f} ({errors:.1f} standard errors)"
