"""What training minimises: one network call at x_t, and its loss."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from pixart_ft.diffusion.intervals import WHOLE, Interval
from pixart_ft.diffusion.names import (
    LearnedVariance,
    LossSpace,
    Norm,
    ObjectiveKind,
    PredictionType,
    Variance,
    Weighting,
)
from pixart_ft.diffusion.objectives import simple_term, su_factors, su_term, variance_alone, vlb_term
from pixart_ft.diffusion.process import Noised, at, network_timesteps
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.weighting import indices_within, loss_weights
from pixart_ft.model.network import network_output

_ERRORS: dict[LossSpace, str] = {
    "epsilon": "noise error",
    "v_prediction": "v error",
    "sample": "x0 error",
    "posterior_mean": "posterior mean error",
    "score": "score error",
    "step_noise": "step noise error",
}


@dataclass(frozen=True)
class Objective:
    """A loss on a process.

    kind       hybrid: simple + vlb_scale * vlb, where vlb moves the variance alone (Nichol & Dhariwal 2021, eq. 16);
               simple: the prediction's error alone; vlb: the whole bound, which moves mean and variance (their L_vlb);
               su_raw, su_noises, su_reduced: Su's three forms of the simple one
    vlb_scale  the paper's lambda = 0.001 times T, since one term stands for the sum over T of them: 1 at T = 1000,
               which PixArt-Sigma was trained with
    space      whose error the simple term is; None: of what the network predicts
    weighting  of the simple term by t, see `loss_weights`
    variance   p's, for hybrid and vlb
    interval   the network's timesteps that are trained, both ends included
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType
    kind: ObjectiveKind
    vlb_scale: float = 1.0
    space: LossSpace | None = None
    norm: Norm = "squared"
    huber_delta: float = 1.0
    weighting: Weighting = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    variance: Variance = "learned"
    interval: Interval = WHOLE

    @property
    def trains_variance(self) -> bool:
        """Whether the network's variance half is trained; the other kinds leave it stale."""
        return self.kind == "hybrid" or (self.kind == "vlb" and self.variance in get_args(LearnedVariance))

    @property
    def titles(self) -> dict[str, str]:
        """What each of the `terms` is, for people."""
        space = self.space if self.kind in ("hybrid", "simple") else None
        simple = _ERRORS[space or self.prediction_type]
        if self.kind not in ("hybrid", "simple", "vlb"):
            simple = f"error of the form {self.kind}"
        if self.norm == "huber" and self.kind in ("hybrid", "simple"):
            simple += " (Huber)"
        return {"loss": "loss", "simple": simple, "vlb": "bits/dim of one step"}

    @property
    def draws_two_noises(self) -> bool:
        """Whether `terms` needs `rest`, a second noise."""
        return self.kind in ("su_raw", "su_noises")

    @cached_property
    def within(self) -> range:
        """The t that are trained. Raises ValueError where there is none."""
        whole = self.interval == WHOLE
        return range(self.schedule.num_steps) if whole else indices_within(self.schedule, *self.interval)

    @property
    def where(self) -> str:
        """The part of the process that is trained, for people; empty for all of it."""
        low, high = self.interval
        return "" if self.interval == WHOLE else f"timesteps {low:g} to {high:g}"

    @cached_property
    def weights(self) -> Tensor:
        """The weight (T,) of the simple term. Raises ValueError where it is infinite."""
        space = self.prediction_type if self.space is None else self.space
        return loss_weights(
            self.schedule, self.weighting, space, min_snr_gamma=self.min_snr_gamma, p2_gamma=self.p2_gamma
        )

    @property
    def noise_weights(self) -> Tensor:
        """What the squared error of the noise has for its weight (T,) in the loss, whatever error that is of.

        Of a small error under Huber's penalty; of vlb under the variance beta tilde; infinite or not a number where the
        noise means nothing for it.
        """
        match self.kind:
            case "hybrid" | "simple":
                return self.weights / loss_weights(self.schedule, "constant", self.space or self.prediction_type)
            case "vlb":
                return loss_weights(self.schedule, "elbo", "sample") / self.schedule.snr / math.log(2)
        factors = su_factors(self.schedule)
        by_form = {"su_raw": ("raw_per_noises", "noises_per_reduced"), "su_noises": ("noises_per_reduced",)}
        weights = torch.ones_like(self.schedule.snr)
        for name in by_form.get(self.kind, ()):
            weights = weights * factors[name]
        return weights

    def terms(
        self,
        transformer: torch.nn.Module,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        embeds: Tensor,
        mask: Tensor,
        rest: Tensor | None = None,
        area: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample named terms, each (N,) float32, of one network call at x_t.

        `x0`, `eps`, `rest` and `area` are (N, C, H, W) float32, `t` (N,) int64 indices into the schedule, text
        (N, L, D) and (N, L); for `area` see `Noised`. "loss" is what is minimised, the others are what it is made of,
        unweighted.
        """
        noised = Noised.of(self.schedule, x0, t, eps, area)
        output = network_output(transformer, noised.x_t, network_timesteps(self.schedule, t), embeds, mask)
        return self.terms_of(output, noised, rest)

    def terms_of(self, output: Tensor, noised: Noised, rest: Tensor | None = None) -> dict[str, Tensor]:
        """The same, of a network's output (N, C or 2C, H, W); computed in float32, or in float64 if the output is.

        Raises ValueError for a kind that wants a learned variance where the output has none.
        """
        given = (self.schedule, output, noised)
        match self.kind:
            case "hybrid" | "simple":
                simple = simple_term(
                    *given, self.prediction_type, space=self.space, norm=self.norm, huber_delta=self.huber_delta
                )
                loss = simple if self.weighting == "none" else at(self.weights, noised.t, simple) * simple
                if self.kind == "simple":
                    return {"simple": simple, "loss": loss}
                vlb = vlb_term(
                    self.schedule, variance_alone(output), noised, self.prediction_type, variance=self.variance
                )
                return {"simple": simple, "vlb": vlb, "loss": loss + self.vlb_scale * vlb}
            case "vlb":
                simple = simple_term(self.schedule, output.detach(), noised, self.prediction_type)
                vlb = vlb_term(*given, self.prediction_type, variance=self.variance)
                return {"simple": simple, "vlb": vlb, "loss": vlb}
        rest = torch.zeros_like(noised.eps) if rest is None and not self.draws_two_noises else rest
        assert rest is not None, f"{self.kind} draws two noises"
        simple = su_term(*given, rest, self.prediction_type, self.kind)
        return {"simple": simple, "loss": simple}
