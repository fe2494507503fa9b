"""Score-based samplers: the reverse SDE with a Langevin corrector, and its probability-flow ODE."""

from collections.abc import Callable
from typing import get_args

import torch
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers' loader looks for it beside the class
from torch import Tensor

from pixart_ft.diffusion.flow import Network, eps_of, solve_flow
from pixart_ft.diffusion.names import CorrectorNorms, IndexSpacing, Predictor, StepPrediction, check
from pixart_ft.diffusion.process import to_score
from pixart_ft.diffusion.solvers import langevin_step, langevin_step_size, pf_ode_step, sde_step
from pixart_ft.schedulers.base import with_process
from pixart_ft.schedulers.discrete import IndexScheduler


class ScoreSDEScheduler(IndexScheduler):
    """Predictor and corrector on the reverse SDE (Song et al. 2021b, Algs. 1 and 5); the result is the last mean.

    Euler-Maruyama takes the integral of beta over a step, -log(alpha_bar / alpha_bar_prev), the others
    1 - alpha_bar / alpha_bar_prev. corrector_first: the corrector before the predictor, as the authors' code has it, or
    after it, at the level that the predictor reached, as their Algorithm 1 has it. corrector_snr: r of Alg. 5.
    """

    sampler = "score_sde"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
        predictor: Predictor = "reverse_diffusion",
        corrector_steps: int = 1,
        corrector_snr: float = 0.16,
        corrector_first: bool = False,
        corrector_norms: CorrectorNorms = "per_sample",
    ) -> None:
        check(predictor, "predictor", Predictor)
        if corrector_steps < 0 or corrector_snr <= 0:
            raise ValueError(
                f"corrector_steps must not be negative and corrector_snr positive, got {corrector_steps} and "
                f"{corrector_snr:g}"
            )
        self.spacing, self.predictor = spacing, predictor
        self.corrector_steps, self.corrector_snr = corrector_steps, corrector_snr
        self.corrector_first, self.corrector_norms = corrector_first, corrector_norms
        self.order = 1 + corrector_steps
        self._calls: list[tuple[int, bool]] = []  # index, and whether it corrects

    def _walk(self, device: torch.device | str | None) -> None:
        self._calls, starts = [], []
        for index in reversed(range(len(self.kept))):
            starts.append(len(self._calls))
            # Correcting after the predictor is correcting before the next one; the first has nothing before it.
            corrects = self.corrector_first or index < len(self.kept) - 1
            self._calls += [(index, True)] * (self.corrector_steps if corrects else 0) + [(index, False)]
        self._ready(self.respaced.timesteps[[index for index, _ in self._calls]], starts, device)

    def _call_levels(self) -> Tensor:
        return self.respaced.sigmas[[index for index, _ in self._calls]]

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        index, corrects = self._calls[call]
        t = torch.full((len(x),), index, dtype=torch.int64, device=x.device)
        prediction = self._predict(output, x, t)
        score = to_score(self.respaced, prediction.eps, x, t, "epsilon")
        if corrects:
            noise = new_noise()
            alpha = self.respaced.alphas[index].item()
            size = langevin_step_size(score, noise, alpha, self.corrector_snr, self.corrector_norms)
            return langevin_step(x, score, size, noise), prediction.x0
        beta = self.respaced.betas[index]
        beta = -torch.log1p(-beta) if self.predictor == "euler_maruyama" else beta
        return sde_step(self.predictor, x, score, beta.item(), new_noise() if index > 0 else None), prediction.x0


class ProbabilityFlowScheduler(IndexScheduler):
    """The probability-flow ODE of the forward SDE (Song et al. 2021b, sec. 4.3), deterministic.

    With a number of steps, Euler's method in the integral of beta, one call a step. With `tolerance`, `solve` chooses
    its own steps so that each picture's error stays below that, relative and absolute.
    """

    sampler = "pf_ode"

    @with_process
    def __init__(
        self,
        spacing: IndexSpacing = "iddpm",
        tolerance: float | None = None,
    ) -> None:
        if tolerance is not None and tolerance <= 0:
            raise ValueError(f"tolerance must be positive, got {tolerance:g}")
        if tolerance is not None and self.prediction_type in get_args(StepPrediction):
            raise ValueError(
                "an adaptive ODE steps between the timesteps, where a prediction of one step "
                f"({self.prediction_type}) has no meaning"
            )
        if tolerance is not None and self.clip_x0 is not None:
            raise ValueError("clip_x0 would bend the flow that an adaptive ODE follows; leave one of them out")
        self.spacing, self.tolerance = spacing, tolerance

    def _advance(self, call: int, output: Tensor, x: Tensor, new_noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        index = len(self.kept) - 1 - call
        t = torch.full((len(x),), index, dtype=torch.int64, device=x.device)
        prediction = self._predict(output, x, t)
        score = to_score(self.respaced, prediction.eps, x, t, "epsilon")
        return pf_ode_step(x, score, -torch.log1p(-self.respaced.betas[index]).item()), prediction.x0

    def solve(self, network: Network, x: Tensor) -> tuple[Tensor, int]:
        """x0 from one x_T (1, C, H, W) of unit variance, and the network calls it took, as the tolerance wants.

        network: (x_t, timesteps (1,) float32) -> output. The last step, from the schedule's least noise, is the guess
        of x0 there. Raises ValueError without a tolerance, and as `solve_flow`.
        """
        if self.tolerance is None:
            raise ValueError("solve chooses its steps by the tolerance: give one")
        assert len(x) == 1, "one picture at a time: another's error would change the steps"
        eps = eps_of(self.schedule, network, self.prediction_type)
        first, last = self.schedule.sigmas[0].item(), self.schedule.sigmas[-1].item()
        y = x * (1 + last**2) ** 0.5
        y, calls = solve_flow(eps, y, last, first, rtol=self.tolerance, atol=self.tolerance)
        return y - first * eps(y, first), calls + 1
