"""The law of each step under importance sampling. Oracle: a history to which the steps before the delay were added."""

import torch

from pixart_ft.diffusion.weighting import LossHistory
from pixart_ft.training.importance import DELAY, Importance


def met(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.arange(8) % 2
    return t, (1 + t) * torch.linspace(1, 2, 8) + step


def expected(step: int) -> torch.Tensor:
    history = LossHistory.empty(2)
    for earlier in range(step - DELAY + 1):
        history = history.updated(*met(earlier))
    return history.probabilities()


def test_the_law_is_of_the_steps_up_to_the_delay_whenever_they_were_read() -> None:
    early, late = (Importance(2, range(2)) for _ in range(2))
    for step in range(8):
        assert torch.equal(early.law(step), expected(step)) and torch.equal(late.law(step), expected(step))
        early.add(step, *met(step))  # at once, as where a log line is due
        if step >= DELAY - 2:
            late.add(step - DELAY + 2, *met(step - DELAY + 2))  # as late as the next law allows
    assert not torch.equal(expected(5), expected(4)), "the history must be full by then"


def test_what_was_saved_goes_on() -> None:
    """Saved after a step whose next law was asked for already, and after the last, whose next was not."""
    for asked in (True, False):
        whole, fresh = (Importance(2, range(2)) for _ in range(2))
        for step in range(6):
            whole.law(step + asked)
            whole.add(step, *met(step))
        fresh.load_state_dict(whole.state_dict(6), 6)
        for step in range(6, 9):
            assert torch.equal(fresh.law(step), expected(step))
            fresh.add(step, *met(step))
