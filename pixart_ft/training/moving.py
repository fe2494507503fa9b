"""What moves as a run trains: the trained weights, their average and the optimizer; into and out of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from pixart_ft.errors import UserError
from pixart_ft.model.weights import all_finite
from pixart_ft.training.ema import Ema
from pixart_ft.training.nested import load_nested
from pixart_ft.training.optimizers import load_optimizer
from pixart_ft.training.sharding import like, moments_like


@dataclass(frozen=True)
class Moving:
    """The trained weights by name, their average, and what steps them; in shards or not."""

    trained: dict[str, Parameter]
    ema: Ema
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """By the names of its files."""
        return {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, folder: Path) -> None:
        """Become what a checkpoint holds. Raises UserError if these are other weights, or not finite."""
        saved = load_nested(folder / "trained.safetensors")
        shapes = {name: p.shape for name, p in self.trained.items()}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise UserError(f"{folder} holds other trained weights than this run's adapter: check the section adapter")
        average = load_nested(folder / "ema.safetensors")
        if not all_finite([*saved.values(), *average["shadows"].values()]):
            raise UserError(f"{folder} holds weights that are not finite: give an earlier checkpoint, or begin again")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(like(p, saved[name]))
        own = self.ema.shadows
        shadows = {name: like(own[name], x) if name in own else x for name, x in average["shadows"].items()}
        self.ema.load_state_dict(average | {"shadows": shadows})
        load_optimizer(self.optimizer, moments_like(self.optimizer, load_nested(folder / "optimizer.safetensors")))
