"""Settings to a scheduler, and what is refused, without any model. Oracles: numpy's interpolation of the schedules'
noise levels, arithmetic, and expected messages."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from pixart_ft.config.samplers import SAMPLERS
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.sampling.settings import Abilities, Settings, inversion_calls, recipe_of, scheduler_for, settled, size_of
from pixart_ft.schedulers.discrete import IndexScheduler
from pixart_ft.schedulers.sigma import SigmaScheduler
from tests.helpers.sampling_by_hand import OPTION_VALUES

ABLE = Abilities(NoiseSchedule.linear(), "epsilon", "trained", size=64, unit=16)
STALE, BARE = replace(ABLE, variance="stale"), replace(ABLE, variance="none")
VELOCITY = replace(ABLE, schedule=NoiseSchedule.linear().zero_terminal_snr(), prediction_type="v_prediction")
MEANS = replace(ABLE, prediction_type="posterior_mean")
IMAGE = Path("a.png")  # never opened here
NAMED: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "su_linear": NoiseSchedule.su_linear,
}
INDEX = "zero terminal SNR (no signal at its last step); use ddim, ddpm or iddpm"


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """That a matched schedule reaches beyond the model's is warned of, which has its own tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="of .* noise levels")
        yield


def faults(settings: Settings, model: Abilities = ABLE, adapter: str | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        settled(settings, model, adapter)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_settled_fills_in_the_size_and_every_option_of_the_sampler(sampler: str) -> None:
    done = settled(Settings(sampler=sampler), ABLE)
    assert (done.width, done.height) == (64, 64)
    assert tuple(done.options) == SAMPLERS[sampler].options
    assert done.options["spacing"] == SAMPLERS[sampler].spacings[0]
    assert settled(done, ABLE) == done
    other = SAMPLERS[sampler].spacings[-1]
    given = settled(Settings(sampler=sampler, options={"spacing": other}, width=32, height=96), ABLE)
    assert given.options == {**done.options, "spacing": other} and (given.width, given.height) == (32, 96)
    scheduler = scheduler_for(given, ABLE)
    assert scheduler.facts.name == sampler and scheduler.config["spacing"] == other
    assert len(scheduler.step_starts) == 30


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        ({"sampler": "dpm"}, ABLE, f"sampler: unknown sampler 'dpm'; choose {', '.join(SAMPLERS)}"),
        ({"steps": 0}, ABLE, "steps must be at least 1, got 0"),
        ({"steps": 1001}, ABLE, "cannot take 1001 steps of a process of 1000; choose 1 to 1000"),
        ({"width": 72}, ABLE, "width (72) must be a multiple of 16 (patch size times VAE factor); try 64"),
        ({"height": -16}, ABLE, "height (-16) must be a multiple of 16 (patch size times VAE factor); try 16"),
        ({"options": {"rho": 7.0}}, ABLE, "sampler ddim does not use rho"),
        ({"options": {"eta": 1.5}}, ABLE, "eta"),
        ({"options": {"spacing": "karras"}}, ABLE, "unknown spacing 'karras'; choose iddpm, trailing or leading"),
        ({"sampler": "euler", "options": {"spacing": "iddpm"}}, ABLE, "choose karras, exponential, linspace"),
        (
            {"sampler": "euler", "options": {"sigma_max": 200.0}},
            ABLE,
            "sigma_max 200 must lie in order within this schedule's noise levels, 0.01 to 157.41, the only ones that",
        ),
        ({"sampler": "edm", "options": {"sigma_min": 0.001}}, ABLE, "sigma_min 0.001 and sigma_max 157.407"),
        ({"sampler": "ddpm", "options": {"variance": "learned"}}, ABLE, "iDDPM steps by the learned one"),
        ({"sampler": "iddpm"}, STALE, "use sampler ddpm, or set variance beta_tilde, or train with"),
        ({"sampler": "iddpm"}, BARE, "this network has no variance channels; use ddpm"),
        ({"sampler": "iddpm", "options": {"variance": "learned"}}, STALE, "leaves it stale"),
        ({"sampler": "iddpm", "options": {"variance": "learned_range"}}, STALE, "leaves it stale"),
        ({"sampler": "iddpm", "options": {"variance": "learned_range"}}, BARE, "no variance channels; use ddpm"),
        *(
            ({"sampler": name}, VELOCITY, f"sampler {name} divides by the signal, and this schedule has {INDEX}")
            for name, facts in SAMPLERS.items()
            if facts.space != "index"
        ),
        *(
            ({}, replace(VELOCITY, prediction_type=kind), f"prediction_type v_prediction or sample, not {kind}")
            for kind in ("epsilon", "score", "step_noise")
        ),
        (
            {"sampler": "euler"},
            MEANS,
            "sampler euler steps between the timesteps, where a prediction of one step (post",
        ),
        ({"negative_prompt": "red", "guidance": 1.0}, ABLE, "negative_prompt is unused at guidance 1; raise guidance"),
        ({"guidance_interval": (1, 2), "guidance": 1.0}, ABLE, "guidance_interval is unused at guidance 1"),
        ({"guidance": 0.0}, ABLE, "guidance must be at least 1, which is off, got 0"),
        ({"guidance": float("nan")}, ABLE, "guidance must be at least 1, which is off, got nan"),
        ({"guidance": float("inf")}, ABLE, "guidance must be at least 1, which is off, got inf"),
        (
            {"guidance_interval": (0.2, 0.8)},
            ABLE,
            "guidance_interval [0.2, 0.8] holds none of this run's 30 network calls, at timesteps 999 to 0, so "
            "guidance would never act; it is in the network's timesteps, from 0 (the least noise) to 999",
        ),
        (
            {"guidance_interval": (2000, 3000)},
            ABLE,
            "guidance_interval [2000, 3000] reaches beyond the timesteps",
        ),
        ({"guidance_interval": (500, 1000)}, ABLE, "guidance_interval [500, 1000] reaches beyond the timesteps; it is"),
        ({"guidance_interval": (-1, 500)}, ABLE, "guidance_interval [-1, 500] reaches beyond the timesteps; it is"),
        ({"guidance_interval": (float("nan"), 5)}, ABLE, "guidance_interval [nan, 5] reaches beyond the timesteps"),
        ({"guidance_interval": (800, 100)}, ABLE, "guidance_interval [800, 100] ends before it begins; it is in the"),
        (
            {"guidance_interval": (700, 900), "image": IMAGE, "steps": 10, "strength": 0.5},
            ABLE,
            "holds none of this run's 5 network calls, at timesteps 444 to 0",
        ),
        (
            {"guidance_interval": (700, 900), "sampler": "dpm++", "steps": 2},
            ABLE,
            "holds none of this run's 2 network calls, at timesteps 999 to 500",
        ),
        ({"inversion": True}, ABLE, "inversion starts from a picture: give image"),
        ({"steps": "ten"}, ABLE, "sampler ddim: cannot respace 1000 steps by 'ten'"),
        ({"steps": "2,1"}, ABLE, "of the sections 2,1 the last begins the sampling, by its least noise; give it 2 or"),
        ({"steps": "2,2", "sampler": "dpm++"}, ABLE, "sampler dpm++ steps on noise levels, and steps 2,2 are of"),
        (
            {"steps": "ddim4", "options": {"spacing": "trailing"}},
            ABLE,
            "spacing is 'trailing', unused while steps is 'ddim4'; change one",
        ),
        ({"image": IMAGE, "strength": 0.0}, ABLE, "strength must lie above 0 (the picture itself) and at most at 1"),
        ({"image": IMAGE, "strength": 1.1}, ABLE, "(only noise), got 1.1"),
        ({"image": IMAGE, "inversion": True, "options": {"eta": 0.1}}, ABLE, "use sampler ddim with eta 0"),
        ({"image": IMAGE, "inversion": True, "sampler": "euler"}, ABLE, "inversion is DDIM backwards"),
        (
            {"image": IMAGE, "sampler": "pf_ode", "options": {"tolerance": 0.1}},
            ABLE,
            "image starts at a step, and pf_ode with a tolerance has none; remove tolerance",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(settings: dict[str, Any], model: Abilities, expected: str) -> None:
    (line,) = faults(Settings(**settings), model)
    assert expected in line


def test_an_unknown_schedule_is_refused_with_the_choices() -> None:
    (line,) = faults(Settings(schedule="cosin"))  # type: ignore[arg-type]
    assert "'cosin'" in line and all(name in line for name in NAMED)


def test_an_index_rescaled_to_as_many_steps_is_refused() -> None:
    (line,) = faults(Settings(schedule="cosine", time_conditioning="rescaled"))
    assert "time_conditioning rescaled of 1000 steps to 1000 is the index; choose index" in line


def test_a_shorter_process_may_be_told_in_the_longer_ones_timesteps() -> None:
    """Trained on 250 steps that are told as 0, 4, ..., 996: guidance and what is walked through are in these."""
    short = replace(ABLE, schedule=NoiseSchedule.linear(250, rescale=True).counted_as(1000))
    assert scheduler_for(Settings(steps=3), short).timesteps.tolist() == [996, 496, 0]  # 249, 124 (of 124.5) and 0
    assert settled(Settings(guidance_interval=(500, 996)), short).guidance_interval == (500, 996)
    assert "from 0 (the least noise) to 996" in faults(Settings(guidance_interval=(500, 997)), short)[0]
    walked = scheduler_for(Settings(schedule="linear", steps=3), short).schedule
    torch.testing.assert_close(walked.alpha_bar, short.schedule.alpha_bar)


def test_guidance_knows_the_timesteps_of_a_longer_process() -> None:
    longer = replace(ABLE, schedule=NoiseSchedule.linear(2000))
    assert settled(Settings(guidance_interval=(1200, 1999)), longer).guidance_interval == (1200, 1999)
    assert "from 0 (the least noise) to 1999" in faults(Settings(guidance_interval=(1200, 2000)), longer)[0]


def test_an_adapter_of_much_noise_says_how_little_strength_keeps_it_idle() -> None:
    """Nobody gave an interval here: the adapter was trained there."""
    settings = Settings(image=IMAGE, strength=0.3)
    assert faults(settings, replace(ABLE, intervals=((600.0, 1000.0),))) == [
        "the adapter acts at [600, 1000] alone, which holds none of this run's 9 network calls, at timesteps 276 to 0; "
        "give another lora_interval, more steps or more strength"
    ]


def test_all_that_is_wrong_is_named_at_once() -> None:
    wrong = Settings(sampler="euler", options={"rho": -1.0}, guidance=1.0, negative_prompt="a", inversion=True, width=8)
    assert [line.split()[0] for line in faults(wrong)] == ["width", "negative_prompt", "inversion", "sampler"]
    assert [line.split()[0] for line in faults(Settings(sampler="dpm", steps=0, height=1))] == [
        "height",
        "steps",
        "sampler:",
    ]


def test_a_stale_variance_is_named_after_its_adapter_and_may_be_replaced() -> None:
    (line,) = faults(Settings(sampler="iddpm"), STALE, "runs/mine")
    assert line.startswith("sampler iddpm steps by a learned variance, and runs/mine was trained by")
    assert "and this model was trained by" in faults(Settings(sampler="iddpm"), STALE)[0]
    for model in (STALE, BARE):
        for variance in ("beta_tilde", "beta"):
            fixed = Settings(sampler="iddpm", options={"variance": variance})
            assert settled(fixed, model).options["variance"] == variance
    assert settled(Settings(sampler="iddpm"), ABLE).options["variance"] == "learned"


def test_a_variance_is_read_as_it_was_trained() -> None:
    direct = replace(ABLE, variance="direct")
    assert settled(Settings(sampler="iddpm"), direct).options["variance"] == "direct"
    assert settled(Settings(sampler="iddpm", options={"variance": "beta"}), direct).options["variance"] == "beta"
    for model, variances in ((direct, ("learned", "learned_range")), (ABLE, ("direct",))):
        for variance in variances:
            (line,) = faults(Settings(sampler="iddpm", options={"variance": variance}), model)
            assert f"variance {variance} is not how this model was trained (diffusion.variance)" in line
    assert "leaves it stale" in faults(Settings(sampler="iddpm", options={"variance": "direct"}), STALE)[0]


@pytest.mark.parametrize("sampler", [name for name, facts in SAMPLERS.items() if facts.space == "index"])
def test_zero_snr_is_no_hindrance_to_samplers_on_indices(sampler: str) -> None:
    assert settled(Settings(sampler=sampler), VELOCITY).options["spacing"] == "iddpm"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", NAMED)
def test_another_schedule_is_walked_through_and_told_to_the_network(name: str, sampler: str) -> None:
    """By index: its own index. Matched in SNR: where the model's schedule has that noise level, or its nearest end."""
    told = {}
    for how in ("index", "snr_matched"):
        settings = settled(Settings(sampler=sampler, steps=9, schedule=name, time_conditioning=how), ABLE)  # type: ignore[arg-type]
        scheduler = scheduler_for(settings, ABLE)
        torch.testing.assert_close(scheduler.schedule.alpha_bar, NAMED[name]().alpha_bar, rtol=1e-9, atol=0)
        told[how] = scheduler.timesteps.double().numpy()
    own, walked = (schedule.log_sigmas.numpy() for schedule in (ABLE.schedule, NAMED[name]()))
    if isinstance(scheduler, SigmaScheduler):
        levels = numpy.log(scheduler.calls)
    else:
        assert isinstance(scheduler, IndexScheduler)
        levels = walked[told["index"].astype(int)]
    indices = numpy.arange(1000.0)
    numpy.testing.assert_allclose(told["index"], numpy.interp(levels, walked, indices), atol=2e-3)
    numpy.testing.assert_allclose(told["snr_matched"], numpy.interp(levels, own, indices), atol=0.1)
    if name != "linear":
        assert numpy.abs(told["index"] - told["snr_matched"]).max() > 1


def test_the_base_schedule_is_the_models_whatever_it_is() -> None:
    model = replace(ABLE, schedule=NoiseSchedule.cosine(60).matched_to(NoiseSchedule.linear()))
    scheduler = scheduler_for(Settings(sampler="ddim", steps=60), model)
    assert torch.equal(scheduler.schedule.alpha_bar, model.schedule.alpha_bar)
    torch.testing.assert_close(scheduler.timesteps.double(), model.schedule.timesteps.flip(0), rtol=1e-6, atol=0)
    named = scheduler_for(Settings(sampler="ddim", steps=60, schedule="su_linear", time_conditioning="index"), model)
    su = NoiseSchedule.su_linear(60, rescale=True)  # as many steps, and as much noise
    torch.testing.assert_close(named.schedule.alpha_bar, su.alpha_bar)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("steps", "strength", "run"), [(30, 0.6, 18), (10, 1.0, 10), (10, 0.04, 1), (1, 0.5, 1)])
def test_a_picture_saves_the_steps_above_its_strength(sampler: str, steps: int, strength: float, run: int) -> None:
    settings = Settings(sampler=sampler, steps=steps, image=IMAGE, strength=strength)
    scheduler = scheduler_for(settings, ABLE)
    assert scheduler.begin_index == scheduler.step_starts[steps - run]
    assert scheduler_for(replace(settings, image=None), ABLE).begin_index is None
    assert inversion_calls(settings, scheduler) == 0
    assert inversion_calls(replace(settings, inversion=True), scheduler) == run - 1


def test_a_respacing_says_which_steps_are_taken() -> None:
    """Sections of 334, 333 and 333 indices, both ends of each kept; every 250th, which is the first to give four."""
    for sampler in ("ddim", "iddpm", "pf_ode"):
        done = settled(Settings(sampler=sampler, steps="2,2,3"), ABLE)
        assert scheduler_for(done, ABLE).timesteps.tolist() == [999, 833, 667, 666, 334, 333, 0]
        begun = scheduler_for(replace(done, image=IMAGE, strength=0.6), ABLE)
        assert inversion_calls(replace(done, inversion=True), begun) == 3  # four of the seven steps are run
        assert scheduler_for(Settings(sampler=sampler, steps="ddim4"), ABLE).timesteps.tolist() == [750, 500, 250, 0]


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("1:1", (512, 512)), ("3:2", (624, 416)), ("2:3", (416, 624)), ("16:9", (688, 384)), ("1:8", (176, 1456)),
     ("1.5:1", (624, 416)), ("100:100", (512, 512))],
)  # fmt: skip
def test_aspect_ratios_keep_the_area(ratio: str, size: tuple[int, int]) -> None:
    model = replace(ABLE, size=512)
    width, height = size_of(ratio, model)
    assert (width, height) == size
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(512**2, rel=0.03)
    assert settled(Settings(width=width, height=height), model).width == width


@pytest.mark.parametrize(
    "ratio", ["", "3", "3/2", "a:b", "1:0", "0:1", "9:1", "1:9", "1:2:3", "nan:1", "inf:1", "-3:2"]
)
def test_other_aspect_ratios_are_refused(ratio: str) -> None:
    with pytest.raises(UserError) as caught:
        size_of(ratio, ABLE)
    assert str(caught.value) == f"aspect_ratio is {ratio!r}; write width:height, as 3:2, between 1:8 and 8:1"


@pytest.mark.parametrize(
    ("sampler", "option"), [(name, option) for name, facts in SAMPLERS.items() for option in facts.options]
)
def test_what_is_settled_stays_so(sampler: str, option: str) -> None:
    """A recipe holds every option, those too that are idle beside the one that was given."""
    spacing = {"spacing": {"spacing": SAMPLERS[sampler].spacings[-1]}}
    done = settled(Settings(sampler=sampler, options=(OPTION_VALUES | spacing)[option]), ABLE)
    assert settled(done, ABLE) == done


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_recipe_is_plain_values_that_give_the_settings_back(sampler: str) -> None:
    settings = Settings(sampler=sampler, schedule="cosine", guidance_interval=(10.0, 900.0), image=IMAGE, strength=0.3)
    done = settled(settings, ABLE)
    recipe = json.loads(json.dumps(recipe_of(done)))
    again = Settings(**recipe | {"image": Path(recipe["image"]), "guidance_interval": (10.0, 900.0)})
    assert again == done and recipe["guidance_interval"] == [10.0, 900.0]
    assert recipe_of(settled(Settings(), ABLE))["image"] is None


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_interval": (0, 999)},
        {"guidance_interval": (0, 0)},
        {"guidance_interval": (999.0, 999.0)},
        {"guidance_interval": (0.2, 0.8), "sampler": "pf_ode", "options": {"tolerance": 0.1}},  # it chooses its calls
        {"guidance_interval": (400, 444), "image": IMAGE, "steps": 10, "strength": 0.5},
    ],
)
def test_an_interval_that_holds_a_call_is_taken(settings: dict[str, Any]) -> None:
    assert settled(Settings(**settings), ABLE).guidance_interval == settings["guidance_interval"]


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (
            128,
            128,
            "128 x 128 pixels are far from the 64 x 64 that this model was trained on (area times 4,",
        ),
        (32, 32, "area times 0.25"),
        (144, 32, "sides 4.5 to 1"),
        (16, 256, "sides 16 to 1"),
        (80, 80, None),
        (96, 32, None),
        (64, 128, None),
    ],
)
def test_a_size_far_from_the_trainings_is_warned_of(width: int, height: int, words: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settled(Settings(width=width, height=height), ABLE)
    found = [str(warning.message) for warning in caught]
    assert len(found) == (words is not None) and all(words in line for line in found if words)
