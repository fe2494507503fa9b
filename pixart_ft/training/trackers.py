"""Where the curves and sheets of a run go beside its log: TensorBoard, Weights & Biases, trackio, by accelerate."""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from pixart_ft.config.train import Tracker
from pixart_ft.errors import UserError

_PROJECT = "pixart_ft"  # that all runs are in; TensorBoard's are in their own folders


def begin_trackers(
    accelerator: Accelerator, names: Iterable[Tracker], run: str, folder: Path, config: Mapping[str, Any]
) -> None:
    """Let accelerate log into these, under the name of the run; UserError for one that refuses."""
    about = {"name": run, "config": dict(config)}
    options: dict[Tracker, tuple[str, dict[str, Any]]] = {
        "tensorboard": ("tensorboard", {"logging_dir": folder}),  # the first is the name of its folder there
        "wandb": (_PROJECT, {"dir": folder, **about}),
        "trackio": (_PROJECT, {"resume": "allow", **about}),
    }
    for name in dict.fromkeys(names):
        place, more = options[name]
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"logging.trackers: this accelerate knows no {name}: pip install --upgrade accelerate")
        try:
            # by itself accelerate would give all trackers one project's name
            accelerator.log_with = [LOGGER_TYPE_TO_CLASS[name](place, **more)]
            started, accelerator.trackers = accelerator.trackers, []
            accelerator.init_trackers(place)
            accelerator.trackers = [*started, *accelerator.trackers]
        except OSError:
            raise
        except Exception as error:  # such as no account
            raise UserError(f"logging.trackers: {name} cannot begin: {error}") from error


def show_sheet(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """A sheet of samples, in every tracker."""
    for tracker in accelerator.trackers:
        match tracker.name:
            case "tensorboard":
                image = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
                image = image.view(1, sheet.height, sheet.width, 3)
                tracker.log_images({"samples": image.numpy()}, step=step, dataformats="NHWC")
            case "wandb":
                tracker.log_images({"samples": [sheet]}, step=step)
            case "trackio":
                tracker.log({"samples": importlib.import_module("trackio").Image(sheet)}, step=step)
