"""What people see of a running training. Oracle: the numbers told, and that a file has whole lines."""

import os
import sys
from contextlib import suppress

import pytest

from pixart_ft.training.pace import Pace
from pixart_ft.training.screen import Screen


def shown(*, show: bool = True) -> None:
    screen = Screen(400, 100, show=show)
    with screen.running():
        screen.move(50)
        screen.tell(0.25, 12.5)
        screen.move(250)
        screen.tell(0.125, 12.5)
        screen.end()
    print("the end", file=sys.stderr)


def test_a_file_has_a_line_for_each_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    shown()
    assert capsys.readouterr().err.splitlines() == [
        "training: 150 of 400 pictures, 12.5 a second, 00:20 left, loss 0.2500",
        "training: 400 of 400 pictures, 12.5 a second, 00:00 left, loss 0.1250",
        "the end",
    ]


def test_a_terminal_has_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown()
    bar, end = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert end == "the end" and bar.startswith("\rtraining:  25%")
    last = bar.rpartition("\r")[2]
    assert "400/400" in last and "pictures/s" in last and "loss 0.1250" in last


def test_a_reader_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pipe to `tee`, say, which a closed terminal ends too: the state is still to be saved."""
    reading, writing = os.pipe()
    os.close(reading)
    screen = Screen(400, 0, show=True)
    with os.fdopen(writing, "w", closefd=False) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with screen.running():
            screen.tell(0.25, 12.5)
        with pytest.raises(BrokenPipeError):  # as what was told has met
            print("more", file=pipe, flush=True)
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            pipe.close()
    os.close(writing)


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        shown(show=False)
        assert capsys.readouterr().err == "the end\n"


def test_the_pace_is_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"))
    for seconds in (2.0, 3.0):
        with pace.step(10):
            now[0] += seconds
        now[0] += 100  # measured and drawn
    assert pace.close(1.0) == {"samples_per_second": 4.0, "data_wait": 0.2}
    with pace.step(8):
        now[0] += 2
    assert pace.close(2.0) == {"samples_per_second": 4.0, "data_wait": 0.5}
