"""Which steps are kept. Oracles: diffusers' DDIM, lists worked out by hand. See also test_golden.py."""

from collections.abc import Callable

import pytest
from diffusers import DDIMScheduler

from pixart_ft.diffusion.names import IndexSpacing
from pixart_ft.diffusion.respacing import kept_indices, sampled_indices, spaced_indices


def test_trailing_indices_are_those_of_diffusers_ddim() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for count in range(1, 101):
        scheduler.set_timesteps(count)
        # For a few counts rounding makes diffusers end with a timestep of -1 too many.
        theirs = [timestep for timestep in scheduler.timesteps.flip(0).tolist() if timestep >= 0]
        assert spaced_indices(1000, count, "trailing") == theirs


def test_leading_indices_are_those_of_diffusers_ddim() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="leading", steps_offset=0)
    for count in range(1, 101):
        scheduler.set_timesteps(count)
        assert spaced_indices(1000, count, "leading") == scheduler.timesteps.flip(0).tolist()


@pytest.mark.parametrize("spacing", ["iddpm", "trailing", "leading"])
@pytest.mark.parametrize("num_steps", [1, 37, 250])
def test_every_count_gives_that_many_increasing_indices(num_steps: int, spacing: IndexSpacing) -> None:
    for count in range(1, num_steps + 1):
        indices = spaced_indices(num_steps, count, spacing)
        assert len(indices) == count and indices == sorted(set(indices))
        assert indices[0] >= 0 and indices[-1] < num_steps
        # Sampling starts at pure noise; leading is known to stop short of it.
        assert spacing == "leading" or indices[-1] == num_steps - 1
    assert spaced_indices(num_steps, num_steps, spacing) == list(range(num_steps))


def test_a_count_keeps_both_ends() -> None:
    assert spaced_indices(1000, 2) == [0, 999] == kept_indices(1000, 2)
    # One step samples from pure noise, but the authors' respacing to one step keeps index 0.
    assert spaced_indices(1000, 1) == [999] and kept_indices(1000, 1) == [0]
    assert kept_indices(10, 4) == kept_indices(10, "4") == [0, 3, 6, 9]


def test_sections_each_keep_their_own_ends() -> None:
    assert kept_indices(9, "3,2,1") == [0, 1, 2, 3, 5, 6]
    # 11 steps in 3 sections: the first two are one longer (0-3, 4-7, 8-10).
    assert kept_indices(11, "2,2,2") == [0, 3, 4, 7, 8, 10]
    assert kept_indices(300, "10,15,20")[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_ddim_strides_from_0_and_may_stop_short() -> None:
    assert kept_indices(1000, "ddim50") == list(range(0, 1000, 20))
    assert kept_indices(10, "ddim3") == [0, 4, 8] and kept_indices(10, "ddim4") == [0, 3, 6, 9]


def test_a_sampler_takes_a_number_by_its_spacing_or_a_respacing_by_itself() -> None:
    assert sampled_indices(1000, 1) == [999] and sampled_indices(1000, 4, "leading") == [0, 250, 500, 750]
    assert sampled_indices(9, "3,2,2", "leading") == [0, 1, 2, 3, 5, 6, 8] == sampled_indices(9, "3,2,2")
    with pytest.raises(ValueError, match="of the sections 3,2,1 the last begins"):
        sampled_indices(9, "3,2,1")


def test_listed_indices_are_kept_as_they_are() -> None:
    assert kept_indices(1000, [0, 7, 999]) == [0, 7, 999]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda: kept_indices(1000, 1001), "cannot keep 1001 of the 1000 steps"),
        (lambda: kept_indices(1000, "10,0"), "cannot keep 0 of the 500 steps of section 2"),
        (lambda: kept_indices(1000, "ten"), "cannot respace 1000 steps by 'ten'.*write '20'"),
        (lambda: kept_indices(1000, "ddim600"), "no integer stride gives exactly 600"),
        (lambda: kept_indices(1000, []), "must increase"),
        (lambda: kept_indices(1000, [3, 2]), "must increase"),
        (lambda: kept_indices(1000, [3, 3]), "must increase"),
        (lambda: kept_indices(1000, [0, 1000]), r"within 0\.\.999"),
        (lambda: kept_indices(1000, [-1, 5]), r"within 0\.\.999"),
        (lambda: spaced_indices(1000, 0), "choose 1 to 1000"),
        (lambda: spaced_indices(1000, 1001), "choose 1 to 1000"),
        (lambda: spaced_indices(1000, 10, "linspace"), "choose iddpm, trailing or leading"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(keep: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep()
