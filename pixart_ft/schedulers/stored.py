"""What a diffusers scheduler's configuration says of the process that a network was trained on.

A key that is absent has the default of the class that wrote the configuration, from its own constructor: diffusers'
Heun begins its betas at 0.00085, its DDPM at 0.0001, and a flow-matching scheduler has no betas at all.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from pixart_ft.diffusion.schedules import DIFFUSERS_KEYS

# Keys that make another process of the same betas, and the value at which they do not.
_OTHER_PROCESS = {"snr_shift_scale": 1.0, "use_flow_sigmas": False}


def process_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`DIFFUSERS_KEYS` and prediction_type of a scheduler_config.json, or of a scheduler's `config`.

    Raises ValueError where the configuration is another family's (flow matching, EDM), or lacks a key whose default is
    not known because it does not name a class of diffusers.
    """
    name = config.get("_class_name")
    known = _defaults(name)
    # what a class does not take is left over from the scheduler that it was made from: its steps are not on these betas
    takes = {*known, "rescale_betas_zero_snr"} if known else set(config)
    found = {
        key: config[key] if key in takes and key in config else known.get(key)
        for key in (*DIFFUSERS_KEYS, "prediction_type")
    }
    by = f"a scheduler of class {name}" if name else "a scheduler configuration without _class_name"
    for key, neutral in _OTHER_PROCESS.items():
        if config.get(key, known.get(key, neutral)) != neutral:
            raise ValueError(f"{by} with {key} {config.get(key, known.get(key))!r} walks through another process")
    if found["trained_betas"] is not None:
        wanted = ["prediction_type"]
    elif found["beta_schedule"] == "squaredcos_cap_v2":
        wanted = ["num_train_timesteps", "prediction_type"]
    else:
        wanted = ["num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"]
    if missing := [key for key in wanted if found[key] is None]:
        raise ValueError(
            f"{by} says no {', '.join(missing)}, and a PixArt-Sigma is trained on betas; use the scheduler that the "
            "model was trained with, such as DPMSolverMultistepScheduler, with these keys in its configuration"
        )
    return {key: value for key, value in found.items() if value is not None}


def _defaults(class_name: object) -> dict[str, Any]:
    """The defaults of diffusers' scheduler of that name, {} for another class."""
    kind = getattr(diffusers.schedulers, str(class_name), None)
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.SchedulerMixin):  # or its package is not there
        return {}
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
