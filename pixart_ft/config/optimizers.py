"""Facts about each optimizer, as data: configuration, refusals, help and tests read them here; no torch.

`training/optimizers.py` builds them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pixart_ft.errors import UserError

OptimizerName = Literal[
    "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor", "prodigy", "schedule_free", "muon"
]
EMA_DECAY = 0.999  # of the averaged weights by default, beside an optimizer that does not average by itself
_ADAM = ("beta1", "beta2", "epsilon")


@dataclass(frozen=True)
class OptimizerFacts:
    """What a user needs to know about one optimizer.

    takes    keys of `optim` that not every optimizer has
    package  where it comes from, as pip takes it; None: torch and transformers, which are always there
    """

    takes: tuple[str, ...]
    package: str | None = None


_EACH_APART = ("stochastic_rounding", "in_backward")  # of those that step every weight by itself
_BITSANDBYTES = OptimizerFacts((*_ADAM, "decay", *_EACH_APART), "bitsandbytes")

OPTIMIZERS: Mapping[str, OptimizerFacts] = {
    "adamw": OptimizerFacts((*_ADAM, "decay", *_EACH_APART)),
    "adamw8bit": _BITSANDBYTES,
    "paged_adamw": _BITSANDBYTES,
    "paged_adamw8bit": _BITSANDBYTES,
    "adafactor": OptimizerFacts(("decay", *_EACH_APART)),
    # it finds the step size by how far the weights have come, which rounding would disturb
    "prodigy": OptimizerFacts((*_ADAM, "decay"), "prodigyopt"),
    # its averaging stands for the decay, and multiplies what rounding adds
    "schedule_free": OptimizerFacts(_ADAM, "schedulefree"),
    "muon": OptimizerFacts((*_ADAM, "decay", *_EACH_APART), "torch>=2.9"),
}


def takes(optimizer: str, key: str) -> bool:
    """Whether an optimizer has a use for this key of `optim`."""
    return key in OPTIMIZERS[optimizer].takes


def check_installed(optimizer: str) -> None:
    """Raise UserError with the pip command where the optimizer's package is missing or older than it."""
    if (package := OPTIMIZERS[optimizer].package) is None:
        return
    name, _, oldest = package.partition(">=")
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found is None or _numbers(found) < _numbers(oldest):
        have = "which is not installed" if found is None else f"and {found} is installed"
        raise UserError(f'optim.optimizer {optimizer} needs {package}, {have}: pip install "{package}", or use adamw')


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
