"""The real trainer on a network of 40 parameters and a few random latents: a run takes milliseconds. Shared."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from pixart_ft.config.train import Optim
from pixart_ft.data.cache import CachedPictures, TensorStore
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.vae import LatentScale
from pixart_ft.runs.folder import RunFolder
from pixart_ft.training.batches import DrawLaws, TrainingSet
from pixart_ft.training.ema import Ema, OwnAverage
from pixart_ft.training.learning_rate import LearningRate
from pixart_ft.training.optimizers import build_optimizer
from pixart_ft.training.sharding import Whole, in_shards
from pixart_ft.training.trainer import Plan, Trainer

LAWS = DrawLaws(seed=3, caption_dropout=0.0, timestep_law="importance", logit_mean=0.0, logit_std=1.0)
PLAN = Plan(
    steps=12,
    batch_size=4,
    accumulation=1,
    clip_norm=0.0,
    in_backward=False,
    give_up_after=10,
    log_every=1,
    validate_every=0,
    samples_every=0,
    checkpoint_every=0,
    keep_checkpoints=1,
)


RATE = LearningRate(0.5, 2, "cosine", 12)


def plain_optimizer(trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Unlike Adam, it feels a gradient that is twice as large."""
    return torch.optim.SGD(trained.values(), lr=0.0, momentum=0.5)


class Toy(nn.Module):
    """A 1x1 convolution that the timestep and the text turn up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 8, 1)
        with torch.no_grad():
            values = torch.linspace(-0.5, 0.5, 40)
            self.layer.weight.copy_(values[:32].view_as(self.layer.weight))
            assert self.layer.bias is not None
            self.layer.bias.copy_(values[32:])

    def forward(self, x: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        loud = 1 + timestep / 10 + encoder_hidden_states.mean(dim=(1, 2))
        return (loud.view(-1, 1, 1, 1) * self.layer(x),)


def toy_set(folder: Path) -> TrainingSet:
    """Six random latents with captions of a token each."""
    generator, store = torch.Generator().manual_seed(0), TensorStore(folder)
    latents = {f"latent{i}": torch.rand(2, 4, 2, 2, generator=generator) for i in range(6)}
    texts = {f"text{i}": torch.randn(1, 3, generator=generator) for i in range(6)}
    store.add(latents)
    store.add(texts)
    return TrainingSet(CachedPictures(store, list(latents), list(texts)), LatentScale(1.0), torch.zeros(1, 3))


def toy_trainer(
    folder: Path,
    data: Path,
    draw_samples: Callable[[Toy], Any] | None = None,
    choice: Optim | None = None,
    *,
    shards: bool = False,
    **plan: Any,
) -> Trainer:
    """Ready to run in `folder`; three noise levels, so that the history of losses is soon full.

    choice: an optimizer, and the average that goes with it. shards: the network over all processes.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, network = Accelerator(cpu=True), Toy().train()
    run = RunFolder(folder)
    if accelerator.is_main_process:
        RunFolder.create(folder, resume=True)
    in_one: Any = network
    if shards:
        network = in_shards(in_one, accelerator)
    trained = dict(network.named_parameters())
    ema, optimizer = Ema(trained, 0.9), plain_optimizer(trained)
    if choice is not None:
        optimizer = build_optimizer(choice, trained, LAWS.seed)
        ema = OwnAverage(trained, optimizer) if choice.optimizer == "schedule_free" else ema
    piece = Ema(dict(in_one.named_parameters()), 0.9) if accelerator.is_main_process else Ema.off()
    return Trainer(
        accelerator=accelerator,
        transformer=network,
        whole=Whole(accelerator, in_one, piece, network, ema) if shards else None,
        objective=Objective(NoiseSchedule.linear(3, beta_start=0.1, beta_end=0.5), "epsilon", "hybrid"),
        data=toy_set(data),
        optimizer=optimizer,
        ema=ema,
        learning_rate=RATE if choice is None else replace(RATE, peak=choice.learning_rate, decay=choice.decay),
        laws=LAWS,
        plan=replace(PLAN, **plan),
        folder=run,
        draw_samples=None if draw_samples is None else lambda: draw_samples(network),
    )
