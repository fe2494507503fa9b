"""Facts about each sampler, as data: help, documentation and tests all read them here.

No torch: asking for help must be instant. The formulas are in `diffusion/solvers.py`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplerFacts:
    """What a user, or a test, needs to know about one sampler."""

    name: str  # the word of `--sampler`
    title: str
    order: int  # the error of a run of N steps falls like N**-order
    calls_per_step: int  # network calls one step takes, guidance's second branch not counted
    stochastic: bool  # whether the steps draw noise with the default settings
    uses_learned_variance: bool  # whether it can use the network's variance half
    space: Literal["index", "sigma"]  # steps on the indices of the schedule, or on noise-to-signal ratios
    summary: str


SAMPLERS: dict[str, SamplerFacts] = {
    facts.name: facts
    for facts in (
        SamplerFacts(
            name="ddim",
            title="DDIM",
            order=1,
            calls_per_step=1,
            stochastic=False,
            uses_learned_variance=False,
            space="index",
            summary="deterministic at eta 0, good from 20 to 50 steps; at eta 1 it is DDPM with beta_tilde",
        ),
        SamplerFacts(
            name="ddpm",
            title="DDPM / iDDPM",
            order=1,
            calls_per_step=1,
            stochastic=True,
            uses_learned_variance=True,
            space="index",
            summary="ancestral, with the learned variance where it is trained; wants 50 steps or more",
        ),
    )
}
