"""The words of the mathematics: each list stands once, and whoever acts by its words knows all of them and no other.

Oracle: the lists themselves. What a word means is tested with the function that it chooses from.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import pixart_ft
from pixart_ft.diffusion import names, objectives, process, respacing, schedules, sigmas, solvers, weighting
from pixart_ft.diffusion.schedules import NoiseSchedule

LINEAR, SHORT = NoiseSchedule.linear(20), NoiseSchedule.linear(10)
T = torch.tensor([3, 7])
X = torch.ones(2, 4, 2, 2)
OUTPUT = torch.ones(2, 8, 2, 2)
LEVEL = torch.ones(1, dtype=torch.float64)
NOISED = process.Noised.of(LINEAR, X, T, X)
PREDICTION = process.predict(LINEAR, OUTPUT, X, T, "epsilon")
PACKAGE = Path(pixart_ft.__file__).parent

# A list, and a function of one of its words.
USES: dict[str, tuple[object, Callable[[Any], object]]] = {
    "to_x0": (names.Quantity, lambda word: process.to_x0(LINEAR, X, X, T, word)),
    "to_eps": (names.Quantity, lambda word: process.to_eps(LINEAR, X, X, T, word)),
    "to_v": (names.Quantity, lambda word: process.to_v(LINEAR, X, X, T, word)),
    "fixed_log_variance": (names.FixedVariance, lambda word: process.fixed_log_variance(LINEAR, word)),
    "named_config": (names.ScheduleName, schedules.named_config),
    "conditioned": (names.TimeConditioning, lambda word: schedules.conditioned(SHORT, LINEAR, word)),
    "spaced_indices": (names.IndexSpacing, lambda word: respacing.spaced_indices(20, 5, word)),
    "sigma_to_index": (names.Lookup, lambda word: sigmas.sigma_to_index(LINEAR, LEVEL, word)),
    "loss_weights": (names.Weighting, lambda word: weighting.loss_weights(LINEAR, word, "epsilon")),
    "loss_weights in a space": (names.LossSpace, lambda word: weighting.loss_weights(LINEAR, "min_snr", word)),
    "simple_term of a type": (names.PredictionType, lambda word: simple(word)),
    "simple_term in a space": (names.LossSpace, lambda word: simple("epsilon", space=word)),
    "simple_term of a norm": (names.Norm, lambda word: simple("epsilon", norm=word)),
    "su_term": (names.SuForm, lambda word: objectives.su_term(LINEAR, X, NOISED, X, "epsilon", word)),
    "vlb_term of a decoder": (names.Decoder, lambda word: bound(decoder=word)),
    "vlb_term of a variance": (names.Variance, lambda word: bound(variance=word)),
    "ddpm_step": (
        names.StepVariance,
        lambda word: solvers.ddpm_step(LINEAR, PREDICTION, X, T, variance=word, noise=X),
    ),
    "sde_step": (names.Predictor, lambda word: solvers.sde_step(word, X, X, 0.1)),
    "langevin_step_size": (names.CorrectorNorms, lambda word: solvers.langevin_step_size(X, X, 0.9, 0.1, word)),
}


def simple(kind: Any, **settings: Any) -> object:
    return objectives.simple_term(LINEAR, OUTPUT, NOISED, kind, **settings)


def bound(**settings: Any) -> object:
    return objectives.vlb_term(LINEAR, OUTPUT, NOISED, "epsilon", **settings)


@pytest.mark.parametrize("use", USES)
def test_each_word_is_known_and_no_other(use: str) -> None:
    known, act = USES[use]
    for word in get_args(known):
        act(word)
    with pytest.raises(ValueError, match=r"unknown [a-z_ ]+ 'sesame'; choose \w+"):
        act("sesame")


def test_what_comes_from_a_file_is_checked() -> None:
    names.check("learned", "variance", names.Variance)
    with pytest.raises(ValueError, match="unknown variance 'none'; choose learned, learned_range, direct, beta_tilde"):
        names.check("none", "variance", names.Variance)


def test_each_list_stands_once() -> None:
    """No file of the package spells a list of strings that another has, or a part of one of these."""
    lists = [set(get_args(value)) for value in vars(names).values() if get_args(value)]
    assert len(lists) > 15
    spelled: dict[frozenset[object], str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
                words = frozenset(part.value for part in ast.walk(node.slice) if isinstance(part, ast.Constant))
                if len(words) > 1:
                    where = spelled.setdefault(words, f"{path.name}:{node.lineno}")
                    assert where == f"{path.name}:{node.lineno}", f"{path.name} spells {sorted(map(str, words))} again"
                    known = path.name != "names.py" and any(words <= each for each in lists)
                    assert not known, f"{path.name} spells {sorted(map(str, words))} again"
