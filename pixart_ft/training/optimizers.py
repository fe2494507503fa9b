"""Optimizers from libraries, built as the configuration says; groups of weights; weights kept in bfloat16.

Which there are, and what each takes, is `config/optimizers.py`.
"""

import contextlib
import importlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pixart_ft.config.train import Group, Optim
from pixart_ft.errors import Mistakes
from pixart_ft.model.weights import chunks, plain_name
from pixart_ft.randomness import generator

# What optimizers count in their groups as they go; all else there are settings.
COUNTED = {"k", "d", "d_max", "d_hat", "d_numerator", "d_denom", "weight_sum", "lr_max", "scheduled_lr", "train_mode"}
_ROUNDED = "rounded"  # of a weight: how often
_MATRIX = re.compile(r"transformer_blocks\..*weight$")  # of a hidden layer: what Muon is for, if it has two dimensions


def build_optimizer(choice: Optim, trained: Mapping[str, Parameter], seed: int) -> Optimizer:
    """The optimizer that `choice` asks for, over the trained weights by their names.

    Raises UserError as `check_trained` does.
    """
    expected = torch.bfloat16 if choice.stochastic_rounding else torch.float32
    assert all(p.dtype == expected for p in trained.values()), f"trained weights are kept in {expected}"
    check_trained(choice, trained)
    optimizer = _built(choice, trained)
    return Rounded(optimizer, trained, seed) if choice.stochastic_rounding else optimizer


def check_trained(choice: Optim, trained: Mapping[str, Parameter]) -> None:
    """Raise UserError where a pattern of `groups` finds no weight of its own among these, or Muon no matrix."""
    names, mistakes = [plain_name(name) for name in trained], Mistakes()
    found = {_place(name, choice.groups) for name in names}
    idle = [repr(group.pattern) for number, group in enumerate(choice.groups) if number not in found]
    if idle:
        mistakes.add(
            f"optim.groups: no trained weight falls to the pattern {', '.join(idle)}; their names are like "
            f"{', '.join(names[:: max(1, len(names) // 3)][:3])}"
        )
    if choice.optimizer == "muon" and not _matrices(trained):
        mistakes.add("optim.optimizer muon is for the matrices of hidden layers, and none is trained; use adamw")
    mistakes.raise_if_any()


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Go on from a saved state: what was counted and remembered is the state's, the settings are the optimizer's."""
    groups = [
        before | {key: value for key, value in now.items() if key not in {"params", *COUNTED}}
        for before, now in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    library: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds it
    library = library.inner if isinstance(library, Rounded) else library
    if getattr(library, "is_paged", False):  # bitsandbytes loads into plain memory of the device what was in pages
        for parameter, kept in library.state.items():
            for key in ("state1", "state2"):
                kept[key] = library.get_state_buffer(parameter, dtype=kept[key].dtype).copy_(kept[key])


def found_by(optimizer: Optimizer) -> dict[str, float]:
    """What an optimizer found by itself, for the log: Prodigy's step size, which the learning rate multiplies."""
    size = optimizer.param_groups[0].get("d")
    return {} if size is None else {"step_size": size}


class Muon(Optimizer):
    """torch's Muon for the matrices, AdamW for all else: one state, one list of groups."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adam: Any) -> None:
        # its steps are as large as AdamW's, so that one learning rate serves both
        self.parts: list[Optimizer] = [_of("torch.optim", "Muon", matrices, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(torch.optim.AdamW(others, **adam))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer's."""
        super().load_state_dict(state_dict)
        self._share()


class Rounded(Optimizer):
    """Steps bfloat16 weights in float32, then rounds each up or down at random, so that the mean is what came out.

    Rounded to the nearest, a step of less than half the last place would leave a weight where it is, for ever. What the
    optimizer remembers is float32. The random bits follow from (seed, number of the step, name of the weight). A step
    uses the gradients up.
    """

    def __init__(self, inner: Optimizer, trained: Mapping[str, Parameter], seed: int) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.seed = inner, seed
        self._names = {parameter: name for name, parameter in trained.items()}
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, a part of the weights at a time: float32 copies of all would cost what bfloat16 saves."""
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        for part in chunks(gradients):
            with _in_float32(part) as kept:
                for parameter in part:
                    parameter.grad = gradients.pop(parameter).float()
                self.inner.step()
                for parameter in part:
                    number = self.state[parameter].get(_ROUNDED, 0)
                    bits = generator(self.seed, number, f"rounding of {self._names[parameter]}", parameter.device)
                    kept[parameter].copy_(stochastically_rounded(parameter, bits))
                    self.state[parameter][_ROUNDED] = number + 1
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer's; what it remembers stays float32."""
        with _in_float32(self._names, filled=False):
            self.inner.load_state_dict(state_dict)
        self._share()


def stochastically_rounded(values: Tensor, bits: torch.Generator) -> Tensor:
    """Float32 values (...) in bfloat16: one of the two neighbours, the nearer the likelier; their mean is the value."""
    dropped = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=bits)
    return ((values.view(torch.int32) + dropped) & -(2**16)).view(torch.float32).to(torch.bfloat16)


@contextlib.contextmanager
def _in_float32(parameters: Iterable[Parameter], *, filled: bool = True) -> Iterator[dict[Parameter, Tensor]]:
    """Within, these bfloat16 parameters are float32, of their values if `filled`; yields what they are after it."""
    kept = {parameter: parameter.data for parameter in parameters}
    for parameter, data in kept.items():
        stand_in = data.new_empty((), dtype=torch.float32).expand(data.shape)  # costs no memory
        parameter.data = data.float() if filled else stand_in
    try:
        yield kept
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _place(name: str, groups: Sequence[Group]) -> int | None:
    """The number of the group that a weight falls to."""
    plain = plain_name(name)
    return next((number for number, group in enumerate(groups) if fnmatchcase(plain, group.pattern)), None)


def _grouped(choice: Optim, trained: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Torch's groups of the weights: all that fall to no pattern first, then by pattern.

    One with a learning rate of its own keeps its peak as `initial_lr`, as torch's schedulers call it.
    """
    common = {"lr": choice.learning_rate, "weight_decay": choice.weight_decay}
    places = {name: _place(name, choice.groups) for name in trained}
    found = []
    for number, group in [(None, None), *enumerate(choice.groups)]:
        own: dict[str, Any] = {}
        if group is not None and group.weight_decay is not None:
            own["weight_decay"] = group.weight_decay
        if group is not None and group.learning_rate is not None:
            own |= {"lr": group.learning_rate, "initial_lr": group.learning_rate}
        if members := [parameter for name, parameter in trained.items() if places[name] == number]:
            found.append({"params": members, **common, **own})
    return found


def _built(choice: Optim, trained: Mapping[str, Parameter]) -> Optimizer:
    groups = _grouped(choice, trained)
    adam: dict[str, Any] = {"betas": (choice.beta1, choice.beta2), "eps": choice.epsilon}
    on_gpu = all(parameter.is_cuda for parameter in trained.values())
    match choice.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **adam, fused=on_gpu or None)
        case "adafactor":
            # by the learning rate given, as every other
            return _of("transformers.optimization", "Adafactor", groups, scale_parameter=False, relative_step=False)
        case "prodigy":
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that the decay is decoupled
                # what its authors advise for diffusion, and for a warm-up
                return _of("prodigyopt", "Prodigy", groups, **adam, safeguard_warmup=True, use_bias_correction=True)
        case "schedule_free":
            averaging = _of("schedulefree", "AdamWScheduleFree", groups, **adam)
            averaging.train()
            return averaging
        case "muon":
            return _muon(groups, trained, **adam, fused=on_gpu or None)
    names = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw8bit": "PagedAdamW8bit"}
    return _of("bitsandbytes.optim", names[choice.optimizer], groups, **adam)


def _of(package: str, name: str, groups: list[dict[str, Any]], **how: Any) -> Any:
    return getattr(importlib.import_module(package), name)(groups, **how)


def _matrices(trained: Mapping[str, Parameter]) -> set[Parameter]:
    return {parameter for name, parameter in trained.items() if parameter.ndim == 2 and _MATRIX.search(name)}


def _muon(groups: list[dict[str, Any]], trained: Mapping[str, Parameter], **adam: Any) -> Muon:
    hidden = _matrices(trained)
    halves: list[list[dict[str, Any]]] = []
    for wanted in (True, False):
        members = [{**group, "params": [p for p in group["params"] if (p in hidden) == wanted]} for group in groups]
        halves.append([group for group in members if group["params"]])
    return Muon(*halves, **adam)
