"""The table of sampler facts. Oracle: the solvers' own code, and an interpreter without torch."""

import subprocess
import sys
from typing import get_args

from pixart_ft.config import Sampler
from pixart_ft.diffusion import solvers
from pixart_ft.samplers import SAMPLERS


def test_every_sampler_has_its_step_function_and_its_own_name() -> None:
    for name, facts in SAMPLERS.items():
        assert facts.name == name
        assert callable(getattr(solvers, f"{name}_step"))


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, pixart_ft.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configurations_offer_exactly_the_samplers_there_are() -> None:
    assert set(get_args(Sampler)) == set(SAMPLERS)
