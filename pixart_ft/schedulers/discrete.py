"""Samplers on the indices of the schedule: DDPM, its greedy form, iDDPM and DDIM."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers' loader looks for it beside the class
from torch import Tensor

from pixart_ft.diffusion.names import FixedVariance, IndexSpacing, LearnedVariance, StepVariance, Variance, check
from pixart_ft.diffusion.process import Prediction, predict, promoted, to_eps
from pixart_ft.diffusion.respacing import sampled_indices
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.solvers import ddim_encode_step, ddim_step, ddpm_step
from pixart_ft.schedulers.base import PixArtScheduler, with_process


class IndexScheduler(PixArtScheduler):
    """Walks down a respaced schedule; the samples are x_t, of unit variance.

    respaced: the schedule of the steps chosen; kept: their indices in the whole one.
    """

    spacing: IndexSpacing
    respaced: NoiseSchedule
    kept: list[int]

    def set_timesteps(
        self,
        num_inference_steps: int | str | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the steps: a number of them, spaced as configured, a respacing such as "10,10,20" or "ddim25"
        (`NoiseSchedule.respaced`), or the indices themselves, falling.

        Raises ValueError for a number that the schedule does not have, or indices that it lacks or do not fall.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if timesteps is not None:
            self.kept = [int(index) for index in reversed(list(timesteps))]
            last = self.schedule.num_steps - 1
            falls = all(before < after for before, after in pairwise(self.kept))
            whole = all(index == int(index) for index in timesteps)
            if not self.kept or not whole or not falls or self.kept[0] < 0 or self.kept[-1] > last:
                raise ValueError(
                    f"timesteps must fall, in integers, from at most {last} to at least 0, got {list(timesteps)}"
                )
        elif num_inference_steps is not None:
            self.kept = sampled_indices(self.schedule.num_steps, num_inference_steps, self.spacing)
        self.respaced = self.schedule.respaced(self.kept)
        self._walk(device)

    def _walk(self, device: torch.device | str | None) -> None:
        """List the calls: one a step, here."""
        self._ready(self.respaced.timesteps.flip(0), range(len(self.kept)), device)

    def _call_levels(self) -> Tensor:
        return self.respaced.sigmas.flip(0)

    def _predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """The network's output at index t (N,) of `respaced`."""
        prediction = predict(self.respaced, output, x, t, self.prediction_type)
        x0 = self._clipped(prediction.x0)
        if x0 is prediction.x0:
            return prediction
        return replace(prediction, x0=x0, eps=to_eps(self.respaced, x0, x, t, "sample"))


class _DownIndices(IndexScheduler):
    """One call a step, each a step down the kept indices."""

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        index = len(self.kept) - 1 - call
        t = torch.full((len(x),), index, dtype=torch.int64, device=x.device)
        prediction = self._predict(output, x, t)
        return self._down(prediction, x, t, new_noise if index > 0 else None), prediction.x0

    @abstractmethod
    def _down(self, prediction: Prediction, x: Tensor, t: Tensor, new_noise: Callable[[], Tensor] | None) -> Tensor:
        """x one kept step on; `new_noise` is None at the last, which adds no noise."""


class _Ancestral(_DownIndices):
    """DDPM (Ho et al. 2020, Alg. 2) on a subset of the steps, whatever its variance.

    diffusers' DDPM, where its last step is not at t = 0 (trailing, or leading with an offset), adds noise there that
    the algorithm does not have: 0.37 on unit latents with the variance beta.
    """

    variance: StepVariance

    def _down(self, prediction: Prediction, x: Tensor, t: Tensor, new_noise: Callable[[], Tensor] | None) -> Tensor:
        if new_noise is None or self.variance == "none":
            return ddpm_step(self.respaced, prediction, x, t, variance="none")
        return ddpm_step(self.respaced, prediction, x, t, variance=self.variance, noise=new_noise())


class RespacedDDPMScheduler(_Ancestral):
    """DDPM with a fixed variance, beta_tilde or beta; the network's own, if any, is dropped."""

    sampler = "ddpm"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
        variance: FixedVariance = "beta_tilde",
    ) -> None:
        if variance not in get_args(FixedVariance):
            raise ValueError(f"DDPM's variance is beta_tilde or beta, got {variance!r}; iDDPM steps by the learned one")
        self.spacing, self.variance = spacing, variance


class GreedyDDPMScheduler(_Ancestral):
    """DDPM without its noise: the posterior's mean alone (Su's greedy form)."""

    sampler = "ddpm_greedy"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
    ) -> None:
        self.spacing, self.variance = spacing, "none"


class IDDPMScheduler(_Ancestral):
    """DDPM with the variance that the network learned (Nichol & Dhariwal 2021, eq. 15 and sec. 4).

    It needs the network's whole output, which the stock pipeline cuts in half. variance: learned, on the steps chosen
    by the error of x0 that it means on those it was trained on; learned_range, its fraction taken for that of the steps
    chosen, as the authors and diffusers do; or a fixed one, for a network whose own was not trained.
    """

    sampler = "iddpm"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
        variance: Variance = "learned",
    ) -> None:
        check(variance, "variance", Variance)
        self.spacing, self.variance = spacing, variance

    def _predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        if self.variance in get_args(LearnedVariance) and output.shape[1] == x.shape[1]:
            raise ValueError(
                f"iDDPM needs the network's {2 * x.shape[1]} channels, got {output.shape[1]}: the variance half is "
                "missing. diffusers' PixArtSigmaPipeline throws it away; use pixart_ft.PixArtPipeline, which "
                "keeps it. A network without a variance half takes RespacedDDPMScheduler"
            )
        return super()._predict(output, x, t)


class RespacedDDIMScheduler(_DownIndices):
    """DDIM (Song et al. 2021a, eq. 12), any eta in 0..1.

    diffusers' DDIM takes t - T // N for the previous step, whatever the next one in the list is: 0.05 off with linspace
    spacing, 0.008 with trailing where N does not divide T.
    """

    sampler = "ddim"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
        eta: float = 0.0,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 (no noise) to 1 (as much as DDPM), got {eta:g}")
        self.spacing, self.eta = spacing, eta

    def _down(self, prediction: Prediction, x: Tensor, t: Tensor, new_noise: Callable[[], Tensor] | None) -> Tensor:
        if new_noise is None or self.eta == 0:
            return ddim_step(self.respaced, prediction, x, t)
        return ddim_step(self.respaced, prediction, x, t, eta=self.eta, noise=new_noise())

    def encode(self, model_output: Tensor, index: int, sample: Tensor) -> Tensor:
        """DDIM backwards: the sample one kept step noisier than `index` of `respaced`, where the network was called."""
        self._check_ready()
        x = promoted(sample)
        t = torch.full((len(x),), index, dtype=torch.int64, device=x.device)
        return ddim_encode_step(self.respaced, self._predict(model_output, x, t), x, t).to(sample.dtype)
