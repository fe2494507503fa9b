"""Facts about each sampler, as data: configuration, schedulers, help, documentation and tests all read them here.

No torch: asking for help must be instant. The formulas are in `diffusion/solvers.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pixart_ft.diffusion.names import IndexSpacing, SigmaSpacing, Spacing

OwnSampler = Literal[
    "ddpm", "ddpm_greedy", "iddpm", "ddim", "euler", "euler_ancestral", "edm", "score_sde", "annealed_langevin",
    "pf_ode",
]  # fmt: skip
StockSampler = Literal["dpm++", "dpm++_sde", "unipc", "deis", "heun", "dpm2", "dpm2_ancestral", "lms", "pndm"]
Sampler = Literal[OwnSampler, StockSampler]
Space = Literal["index", "sigma", "sde"]


@dataclass(frozen=True, kw_only=True)
class SamplerFacts:
    """What a user, or a test, needs to know about one sampler."""

    name: Sampler  # the word of `--sampler`
    title: str
    source: str
    # the error of a run of N steps falls like N**-order; None: it converges in distribution only
    order: int | None = None
    calls_per_step: int = 1  # network calls with the default options, guidance's second branch not counted
    stochastic: bool = False  # whether its steps draw noise with the default options
    needs_variance: bool = False  # whether it steps by the network's own variance
    space: Space = "index"  # indices of the schedule; noise-to-signal ratios; the reverse SDE on some of the indices
    options: tuple[str, ...] = ("spacing", "clip_x0")  # what it takes beside sampler, steps and guidance
    summary: str

    @property
    def spacings(self) -> tuple[Spacing, ...]:
        """How its steps may be spaced, the default first."""
        return get_args(SigmaSpacing if self.space == "sigma" else IndexSpacing)


@dataclass(frozen=True, kw_only=True)
class StockFacts(SamplerFacts):
    """The same of a scheduler of diffusers."""

    space: Space = "sigma"
    options: tuple[str, ...] = ("spacing",)
    kind: str  # its class there
    arguments: Mapping[str, object] = field(default_factory=dict)  # of its constructor
    spacings_taken: tuple[Spacing, ...] = ("linspace", "trailing", "leading", "karras")
    begins_late: bool = True  # False: a step needs the steps before it, so it cannot start from a picture

    @property
    def spacings(self) -> tuple[Spacing, ...]:
        return self.spacings_taken


_SIGMAS = ("spacing", "clip_x0", "rho", "sigma_min", "sigma_max")
_CHURN = ("s_churn", "s_min", "s_max", "s_noise")

SAMPLERS: dict[str, SamplerFacts] = {
    facts.name: facts
    for facts in (
        SamplerFacts(
            name="ddpm",
            title="DDPM",
            source="Ho et al. 2020, Alg. 2",
            stochastic=True,
            options=("spacing", "clip_x0", "variance"),
            summary="ancestral, fixed variance; wants 100 steps or more",
        ),
        SamplerFacts(
            name="ddpm_greedy",
            title="DDPM, greedy",
            source="Su, the mean alone",
            summary="DDPM without its noise; smooth, washed out: for study",
        ),
        SamplerFacts(
            name="iddpm",
            title="iDDPM",
            source="Nichol & Dhariwal 2021, secs. 3.1 and 4",
            stochastic=True,
            needs_variance=True,
            options=("spacing", "clip_x0", "variance"),
            summary="ancestral, with the variance that the network learned; good from 50 steps",
        ),
        SamplerFacts(
            name="ddim",
            title="DDIM",
            source="Song et al. 2021a, eq. 12",
            order=1,
            options=("spacing", "clip_x0", "eta"),
            summary="deterministic at eta 0, good from 20 to 50 steps; at eta 1 it is DDPM with beta_tilde",
        ),
        SamplerFacts(
            name="euler",
            title="Euler",
            source="Karras et al. 2022, Alg. 1 without its second order",
            order=1,
            space="sigma",
            options=(*_SIGMAS, *_CHURN),
            summary="DDIM on a grid of noise levels of your choice",
        ),
        SamplerFacts(
            name="euler_ancestral",
            title="Euler ancestral",
            source="Song et al. 2021a, eq. 12, in sigma",
            stochastic=True,
            space="sigma",
            options=(*_SIGMAS, "eta"),
            summary="Euler that goes too far down and adds noise back, eta 1 by default",
        ),
        SamplerFacts(
            name="edm",
            title="EDM (Heun)",
            source="Karras et al. 2022, Algs. 1 and 2",
            order=2,
            calls_per_step=2,
            space="sigma",
            options=(*_SIGMAS, *_CHURN),
            summary="second order, deterministic, stochastic with s_churn; two calls a step, good from 12 steps",
        ),
        SamplerFacts(
            name="score_sde",
            title="Score SDE",
            source="Song et al. 2021b, Alg. 1 and app. E to G",
            calls_per_step=2,
            stochastic=True,
            space="sde",
            options=("spacing", "clip_x0", "predictor", "corrector_steps", "corrector_snr", "corrector_first"),
            summary="reverse SDE, predictor and Langevin corrector; wants 100 steps or more",
        ),
        SamplerFacts(
            name="annealed_langevin",
            title="Annealed Langevin",
            source="Song & Ermon 2019, Alg. 1, with a last denoising step",
            calls_per_step=3,
            stochastic=True,
            space="sigma",
            options=(*_SIGMAS, "langevin_steps", "langevin_step_size"),
            summary="Langevin dynamics at each noise level in turn; wants 50 steps or more",
        ),
        SamplerFacts(
            name="pf_ode",
            title="Probability flow",
            source="Song et al. 2021b, sec. 4.3",
            order=1,
            space="sde",
            options=("spacing", "clip_x0", "tolerance"),
            summary="the deterministic ODE of score_sde, in even steps or, with a tolerance, adaptive ones",
        ),
    )
}

# diffusers' own, for comparison with what others draw; none of them steps by the learned variance.
STOCK_SAMPLERS: dict[str, StockFacts] = {
    facts.name: facts
    for facts in (
        StockFacts(
            name="dpm++",
            title="DPM-Solver++ 2M",
            source="Lu et al. 2022b",
            order=2,
            kind="DPMSolverMultistepScheduler",
            arguments={"algorithm_type": "dpmsolver++"},
            summary="PixArt-Sigma's own choice; good from 14 steps",
        ),
        StockFacts(
            name="dpm++_sde",
            title="DPM-Solver++ 2M SDE",
            source="Lu et al. 2022b, as an SDE",
            stochastic=True,
            kind="DPMSolverMultistepScheduler",
            arguments={"algorithm_type": "sde-dpmsolver++"},
            summary="DPM-Solver++ with noise; good from 25 steps",
        ),
        StockFacts(
            name="unipc",
            title="UniPC",
            source="Zhao et al. 2023",
            order=2,
            kind="UniPCMultistepScheduler",
            summary="a predictor and a corrector; good from 12 steps",
        ),
        StockFacts(
            name="deis",
            title="DEIS",
            source="Zhang & Chen 2022",
            order=2,
            kind="DEISMultistepScheduler",
            summary="exponential integrator; good from 15 steps",
        ),
        StockFacts(
            name="heun",
            title="Heun (diffusers)",
            source="Karras et al. 2022, Alg. 1",
            order=2,
            calls_per_step=2,
            kind="HeunDiscreteScheduler",
            summary="as edm without churn, on another grid; two calls a step",
        ),
        StockFacts(
            name="dpm2",
            title="DPM2",
            source="Karras et al. 2022, Alg. 2 with the midpoint",
            order=2,
            calls_per_step=2,
            kind="KDPM2DiscreteScheduler",
            summary="the midpoint method; two calls a step",
        ),
        StockFacts(
            name="dpm2_ancestral",
            title="DPM2 ancestral",
            source="the midpoint method with noise added back",
            calls_per_step=2,
            stochastic=True,
            kind="KDPM2AncestralDiscreteScheduler",
            summary="dpm2 with noise; two calls a step",
        ),
        StockFacts(
            name="lms",
            title="LMS",
            source="linear multistep, Adams-Bashforth",
            order=4,
            kind="LMSDiscreteScheduler",
            begins_late=False,
            summary="fourth order from the steps before; good from 20 steps",
        ),
        StockFacts(
            name="pndm",
            title="PNDM",
            source="Liu et al. 2022, PLMS",
            order=4,
            kind="PNDMScheduler",
            arguments={"skip_prk_steps": True},
            spacings_taken=("linspace", "trailing", "leading"),
            begins_late=False,
            summary="DDIM with the slopes of four steps; one call more than steps",
        ),
    )
}

EVERY_SAMPLER: dict[str, SamplerFacts] = {**SAMPLERS, **STOCK_SAMPLERS}

OPTIONS = tuple(dict.fromkeys(option for facts in SAMPLERS.values() for option in facts.options))

# (option, other, used): the option acts only where `used(value of other)` is true, None being the default.
# The other is an option too, or the steps.
CONDITIONS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("rho", "spacing", lambda spacing: spacing in (None, "karras")),
    ("sigma_min", "spacing", lambda spacing: spacing in (None, "karras", "exponential")),
    ("sigma_max", "spacing", lambda spacing: spacing in (None, "karras", "exponential")),
    ("s_min", "s_churn", bool),
    ("s_max", "s_churn", bool),
    ("s_noise", "s_churn", bool),
    ("corrector_snr", "corrector_steps", lambda steps: steps != 0),
    ("corrector_first", "corrector_steps", lambda steps: steps != 0),
    ("spacing", "tolerance", lambda tolerance: tolerance is None),
    ("clip_x0", "tolerance", lambda tolerance: tolerance is None),
    ("spacing", "steps", lambda steps: not isinstance(steps, str)),  # a respacing says where they are
)


def users_of(option: str) -> tuple[str, ...]:
    """The samplers that take an option."""
    return tuple(facts.name for facts in EVERY_SAMPLER.values() if option in facts.options)
