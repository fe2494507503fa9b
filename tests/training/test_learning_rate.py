"""The learning rate. Oracle: values computed by hand; the warm-up that does not fit is in test_training_run.py."""

from dataclasses import replace

import pytest

from pixart_ft.training.learning_rate import LearningRate

RATE = LearningRate(peak=1.0, warmup_steps=4, decay="cosine", steps=10)


def test_it_warms_up_and_decays() -> None:
    assert [RATE.at(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert RATE.at(7) == pytest.approx(0.5)  # half way down the cosine from 4 to 10
    assert replace(RATE, decay="linear").at(7) == pytest.approx(0.5)
    assert replace(RATE, decay="linear").at(10) == 0
    assert replace(RATE, decay="constant").at(9) == 1
