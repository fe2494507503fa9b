"""The words of the mathematics, each list once: configuration, schedulers and formulas all take them from here.

Nothing of torch is imported, so that help is instant. Whoever acts by such a word ends with `raise unknown(...)`:
so a type checker sees a word that is not in the list, and one of the list that was forgotten.
"""

from collections.abc import Iterable
from typing import Any, Literal, Never, get_args

# What a network may predict: eps, v and x0 as in diffusers' scheduler_config.json; and what diffusers does not know,
# the posterior's mean, the score, and the noise of one step (Su's own).
StockPrediction = Literal["epsilon", "v_prediction", "sample"]
PredictionType = Literal[StockPrediction, "posterior_mean", "score", "step_noise"]
StepPrediction = Literal[
    "posterior_mean", "step_noise"
]  # of one step, that of the training, and of no level between two
NoisePrediction = Literal["epsilon", "score", "step_noise"]  # which say nothing of x0 where no signal is left
LossSpace = PredictionType  # any network may be trained by the error of any of them
Quantity = PredictionType  # what x_t and t turn into each other

# The process.
ScheduleName = Literal["linear", "scaled_linear", "cosine", "su_linear"]
ScheduleChoice = Literal["base", ScheduleName]  # base: the one that the model knows
# What another schedule than its own tells a network: its index; the index on the network's own count of steps
# (rescale_timesteps in guided-diffusion); where the network knows that noise.
TimeConditioning = Literal["index", "rescaled", "snr_matched"]
COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17: as they have it
FixedVariance = Literal["beta_tilde", "beta"]
# The network's own: learned is read in the process that it was trained on and said in another by the error of x0 that
# it means; learned_range takes it for the fraction of the step at hand (Nichol & Dhariwal 2021). direct is for another
# network, whose output is the logarithm itself, exp(f), which they found unstable; read as learned is.
LearnedVariance = Literal["learned", "learned_range", "direct"]
Variance = Literal[LearnedVariance, FixedVariance]  # p's, that of x_{t-1} given x_t
# Of a run, which trains whole processes: there learned and learned_range are one.
TrainedVariance = Literal["learned", "direct", FixedVariance]
# Of a network's learned variance: fit to use as a fraction, or as the logarithm itself; left behind, absent.
VarianceState = Literal["trained", "direct", "stale", "none"]

# Losses.
SuForm = Literal["su_raw", "su_noises", "su_reduced"]
ObjectiveKind = Literal["hybrid", "simple", "vlb", SuForm]
Norm = Literal["squared", "huber"]
Decoder = Literal["gaussian", "discretized", "discretized_tanh"]
Weighting = Literal["none", "constant", "min_snr", "soft_min_snr", "p2", "debiased", "elbo"]
TimestepLaw = Literal["uniform", "stratified", "logit_normal", "importance"]

# Sampling.
IndexSpacing = Literal["iddpm", "trailing", "leading"]  # of indices into the schedule
SigmaSpacing = Literal["karras", "exponential", "linspace", "trailing"]  # of noise levels
Spacing = Literal[IndexSpacing, SigmaSpacing]
Lookup = Literal["interpolated", "nearest_log", "nearest"]  # of a noise level in a schedule
StepVariance = Literal[Variance, "none"]
Predictor = Literal["euler_maruyama", "reverse_diffusion", "ancestral"]
CorrectorNorms = Literal["per_sample", "batch_mean"]


def unknown_word(word: object, what: str, words: Iterable[str]) -> str:
    """The message for a word that is none of two or more: "unknown spacing 'x'; choose a, b or c"."""
    *others, last = words
    return f"unknown {what} {word!r}; choose {', '.join(others)} or {last}"


def unknown(word: Never, what: str, names: object) -> ValueError:
    """The error for a word that is none of `names`, one of the lists above.

    A type checker calls the word Never where every name of the list was handled before.
    """
    return ValueError(unknown_word(word, what, get_args(names)))


def check(word: Any, what: str, names: object) -> None:
    """Raise ValueError unless `word`, which may come from a file, is one of `names`."""
    if word not in get_args(names):
        raise unknown(word, what, names)
