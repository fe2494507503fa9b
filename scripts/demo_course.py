"""What the trainings of the demo's networks share: Muon and AdamW, an average of the weights, and a checkpoint."""

from pathlib import Path

import torch
from demo_muon import BatchedMuon

from pixart_ft.files import write_file


class Course:
    """A network on its way: what moves it, its average, and the steps done; it goes on from `file` where that is.

    muon    with the network's matrices; AdamW takes the rest
    rates   the peaks of the two
    decay   of the average, in the end
    """

    def __init__(
        self, network: torch.nn.Module, muon: BatchedMuon, *, rates: tuple[float, float], decay: float, file: Path
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.network, self.decay, self.file, self.step = network, decay, file, 0
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()}
        taken = {id(p) for group in muon.param_groups for p in group["params"]}
        others = [p for p in network.parameters() if id(p) not in taken]
        adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = list(zip((muon, adamw), rates, strict=True))
        if file.is_file():
            state = torch.load(file, weights_only=True, map_location=next(network.parameters()).device)
            network.load_state_dict(state["weights"])
            self.average, self.step = state["average"], state["step"]
            for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        state = {
            "weights": self.network.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step,
        }
        write_file(self.file, lambda aside: torch.save(state, aside))

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """One step down this loss, at `factor` times the peak rates; the gradient's norm is at most 1."""
        for optimizer, peak in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.network.parameters()], 1 - decay)
        self.step += 1
