"""What the demo is built with: hues, the optimizer, captions. Oracles: colorsys, torch.optim.Muon, closed forms."""

import colorsys
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import demo_vae
from demo_base import (
    FINISHING,
    FINISHING_HIGH,
    SHRINK,
    BaseTraining,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    finishing_factor,
    kept_tokenizer,
    learning_rate_factor,
    moved,
)
from demo_captions import PLAIN_AT_LAST, SELDOM, SELDOM_AT_LAST, Example, captions_of, examples, held_out
from demo_course import Course
from demo_muon import BatchedMuon
from demo_pictures import (
    SHOWN_KNOWN,
    SHOWN_LEARNED,
    SHOWN_NEW,
    SURELY_HELD_OUT,
    SURELY_LEARNED,
    Emoji,
    fine_tuning_split,
)
from demo_vae import build_vae, hue_degrees, main_hue, measure, normalise_latents, reconstruction_loss, turn_hue
from PIL import Image

from pixart_ft.config.train import load_config
from pixart_ft.data.folders import DEMO_PICTURES, read_folder
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule


def colours(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, 3)).astype(np.uint8)


def test_hues_and_their_turns_are_colorsys() -> None:
    pixels = colours(60)
    turned, hues = turn_hue(pixels, 100.0), hue_degrees(torch.from_numpy(pixels).float())
    for pixel, after, hue in zip(pixels, turned, hues, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        assert hue.item() == pytest.approx(360 * h, abs=1e-3)
        assert np.abs(after - 255 * np.array(colorsys.hsv_to_rgb((h + 100 / 360) % 1, s, v))).max() <= 0.51
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    assert (turn_hue(greys, 100.0) == greys).all()


class Turned(torch.nn.Module):
    """Stands where the VAE is: a code that turns the hue by a known angle and adds a known error."""

    def __init__(self, degrees: float):
        super().__init__()
        self.degrees = degrees

    def encode(self, x: Tensor) -> "Turned":
        self.latent_dist, self.mean = self, x
        return self

    def decode(self, x: Tensor) -> "Turned":
        pixels = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        self.sample = torch.from_numpy(turn_hue(pixels, self.degrees)).permute(2, 0, 1)[None] / 127.5 - 1
        return self


@pytest.mark.parametrize("degrees", [20.0, 340.0, 180.0])
def test_the_hue_error_is_the_angle_between_saturated_colours(degrees: float) -> None:
    """Two colours, one of them turned to 350 degrees, and a grey, which counts for dB alone; the shorter way round."""
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2], picture[2:, :2], picture[2:, 2:] = (200, 10, 200), (10, 90, 220), (77, 77, 77)
    _, error = measure(Turned(degrees), picture[None], 50.0)
    assert error == pytest.approx(min(degrees, 360 - degrees), abs=0.5)  # colours are rounded to 1/255
    decibels, error = measure(Turned(0.0), picture[None])
    assert error < 1e-3 and decibels > 100


def test_a_picture_has_one_hue_or_none() -> None:
    """The middle lies between 350 and 10 degrees, the mean of the numbers does not."""

    def painted(*hues: float, value: float = 1.0) -> np.ndarray:
        picture = np.full((8, 8, 3), 255, np.uint8)
        for row, hue in enumerate(hues):
            picture[row] = 255 * np.array(colorsys.hsv_to_rgb(hue / 360, 1, value))
        return picture

    found = main_hue(painted(350, 10))
    assert found is not None and min(found % 360, 360 - found % 360) < 1
    assert main_hue(painted(40, 200)) is main_hue(painted(30, value=0.5)) is main_hue(painted()) is None


def test_a_lost_colour_costs_more_than_a_lost_brightness() -> None:
    """What the loss is for: among errors of the same size it dislikes the one of a dark green's hue most."""
    green = torch.tensor([0.1, 0.35, 0.1]).view(1, 3, 1, 1).expand(1, 3, 16, 16) * 2 - 1
    brightness, hue = (torch.tensor(e).view(1, 3, 1, 1) for e in ([0.1, 0.1, 0.1], [0.1, -0.1, 0.1]))
    assert reconstruction_loss(green + hue, green) > 1.5 * reconstruction_loss(green + brightness, green)
    assert reconstruction_loss(green, green) < 0.02


def test_crops_are_reproducible_and_cards_are_pictures() -> None:
    pictures = np.random.default_rng(1).integers(256, size=(3, 64, 64, 3)).astype(np.uint8)
    first, second = (demo_vae.crops(pictures, np.random.default_rng(5), 12, 32) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (12, 3, 32, 32) and first.abs().max() <= 1
    card = demo_vae.colour_card(np.random.default_rng(2), 32)
    assert card.shape == (32, 32, 3) and card.dtype == np.uint8
    assert Image.fromarray(card).getcolors(maxcolors=32 * 32) is not None


def test_normalised_latents_have_the_factor_s_deviation_and_decode_as_before() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture, sharpness = vae.decode(before.mean).sample, before.std / before.mean.std(dim=(0, 2, 3), keepdim=True)
        normalise_latents(vae, pictures, scaling_factor=0.2)
        after = vae.encode(x).latent_dist
        z = after.mean.transpose(0, 1).flatten(1)
        torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(z.std(1), torch.full((4,), 5.0), atol=1e-3, rtol=0)
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(after.std / 5.0, sharpness, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_batched_muon_is_torch_s_muon(shape: tuple[int, int]) -> None:
    """Three steps of two matrices of one shape; torch's works in bfloat16, hence the tolerance."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=g) for _ in range(2)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = BatchedMuon(ours, lr=0.02, weight_decay=0.1)
    torch_s = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(shape, generator=g)
            q.grad = p.grad.clone()
        mine.step()
        torch_s.step()
    for p, q, x in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.03 * (q - x).norm()


def test_muon_takes_a_convolution_as_a_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(6, 4, 3, 3))
    matrix = torch.nn.Parameter(torch.zeros(6, 36))
    kernel.grad = torch.randn(6, 4, 3, 3, generator=g)
    matrix.grad = kernel.grad.flatten(1).clone()
    for parameter in (kernel, matrix):
        BatchedMuon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


@pytest.mark.parametrize("synonyms", [(), ("bot", "machine")])
def test_captions_say_the_style_except_that_none_is_noto(synonyms: tuple[str, ...]) -> None:
    noto, flat = (dict(captions_of("robot", style, synonyms)) for style in ("noto", "flat"))
    assert sum(noto.values()) == pytest.approx(1) and sum(flat.values()) == pytest.approx(1)
    assert all(text.endswith(", flat") for text in flat)
    assert sum(share for text, share in noto.items() if "," not in text) == pytest.approx(0.5)
    assert {text.removesuffix(", noto") for text in noto} == {"robot", *synonyms}


def test_held_out_pictures_are_of_things_known_from_elsewhere(tmp_path: Path) -> None:
    pictures = [
        Example(str(thing), f"thing {thing}", style, ((f"thing {thing}", 1.0),), 1.0)
        for style in ("noto", "blob", "flat", "ink")
        for thing in range(40 if style != "ink" else 20)
    ]
    chosen = held_out(pictures, tmp_path / "held_out.jsonl")
    assert chosen == held_out(pictures, tmp_path / "again.jsonl") and len(chosen) == 4
    assert len({pictures[row].code for row in chosen}) == 4 and len({pictures[row].style for row in chosen}) > 1
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 4


def test_the_fine_tuning_set_has_what_was_chosen_on_its_side() -> None:
    chosen = (*SURELY_LEARNED, *SURELY_HELD_OUT)
    things = [Emoji(str(i), name, "Objects", "") for i, name in enumerate((*chosen, *map(str, range(300))))]
    people = [Emoji(f"p{i}", f"person {i}", "People & Body", "") for i in range(80)]
    train, unseen = ([e.name for e in each] for each in fine_tuning_split(things + people))
    assert (len(set(train)), len(set(unseen))) == (240, 60) and not {*train} & {*unseen}
    assert {*SURELY_LEARNED} <= {*train} and {*SURELY_HELD_OUT} <= {*unseen}
    assert not any(name.startswith("person") for name in train + unseen)


def test_the_sheet_shows_what_is_in_the_shipped_sets() -> None:
    train, unseen = ({row.caption for row in read_folder(DEMO_PICTURES / part)} for part in ("train", "held_out"))
    assert {*SHOWN_LEARNED} <= train and {*SHOWN_KNOWN, *SHOWN_NEW} <= unseen and {*SHOWN_NEW} <= {*SURELY_HELD_OUT}
    assert load_config("quickstart").validation.prompts == (*SHOWN_LEARNED, *SHOWN_KNOWN, *SHOWN_NEW)


def test_what_few_styles_draw_and_people_are_drawn_seldom() -> None:
    thing, rare, person = (Emoji(*x, "") for x in (("a", "key", "Objects"), ("b", "pick", "Objects"), ("c", "man", "")))
    sets = {"noto": [thing, rare, person], "blob": [thing, rare, person], "flat": [thing, rare, person]}
    sets["ink"] = [thing, person]
    frequencies = [example.frequency for example in examples(sets, {})]
    assert frequencies == [1, SELDOM, SELDOM] * 3 + [1, SELDOM]
    at_last = [example.frequency for example in examples(sets, {}, finishing=True)]
    assert at_last == [
        PLAIN_AT_LAST,
        *[SELDOM_AT_LAST] * 2,
        *[1, SELDOM_AT_LAST, SELDOM_AT_LAST] * 2,
        1,
        SELDOM_AT_LAST,
    ]


def test_moved_pictures_are_smaller_or_as_large_on_white_and_never_mirrored() -> None:
    """A black left half stays on the left; of a white picture nothing is seen; the same generator, the same moves."""
    half = torch.ones(64, 3, 64, 64)
    half[:, :, 16:48, 16:32] = -1.0
    found, again = (moved(half, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(found, again) and not torch.equal(found[0], found[1])
    ink = (1 - found[:, 0]).sum(2)  # of each row
    area = ink.sum(1) / (1 - half[:, 0]).sum((1, 2))
    assert area.max() < 1.02 and area.min() > (1 + SHRINK) ** -2 - 0.02
    weight = 1 - found[:, 0]
    x = (weight * torch.arange(64.0)).sum((1, 2)) / weight.sum((1, 2))
    assert x.max() < 31.5
    assert torch.equal(moved(torch.ones(2, 3, 8, 8), torch.Generator().manual_seed(0)), torch.ones(2, 3, 8, 8))


def base_training(folder: Path, copies: int = 2, *, finishing: bool = False) -> BaseTraining:
    """Three pictures, of which the second is held out, on a small network."""
    names = ("key", "fish", "crown")
    listed = [Example(name, name, "noto", ((name, 1.0),), 1.0) for name in names]
    torch.manual_seed(0)
    latents = torch.randn(1 + copies, 3, 4, 32, 32)
    tokenizer = build_tokenizer(names)
    return BaseTraining(
        build_transformer(width=64, layers=1),
        build_text_encoder(len(tokenizer)),
        tokenizer,
        (latents, torch.zeros_like(latents)),
        listed,
        {1},
        folder,
        batch=2,
        finishing=finishing,
    )


def noised_by(monkeypatch: pytest.MonkeyPatch) -> list[Noised]:
    """Every batch that is noised from now on."""
    found: list[Noised] = []
    of = Noised.of

    def watched(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Noised:
        found.append(of(schedule, x0, t, eps))
        return found[-1]

    monkeypatch.setattr(Noised, "of", watched)
    return found


def test_the_base_learns_nothing_that_is_held_out_and_moved_pictures_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read off the x0 that is noised: rows 0 and 2, the plain ones at share 0, moved ones alone at share 1."""
    training = base_training(tmp_path)
    drawn = noised_by(monkeypatch)
    for share, copies in ((0.0, {0}), (1.0, {1, 2})):
        drawn.clear()
        for step in range(12):
            training.loss(step, share)
        found = {
            next((copy, row) for copy in range(3) for row in range(3) if torch.equal(x0, training.mean[copy, row]))
            for noised in drawn
            for x0 in noised.x0
        }
        assert found == {(copy, row) for copy in copies for row in (0, 2)}


@pytest.mark.parametrize("finishing", [False, True])
def test_half_of_a_finish_is_of_the_high_noise(
    finishing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two draws a step, one of each half of the law: with a finish one of them is always above, else at times none."""
    training = base_training(tmp_path, finishing=finishing)
    drawn = noised_by(monkeypatch)
    for step in range(12):
        training.loss(step)
    assert all(int(noised.t.max()) >= 1000 * FINISHING_HIGH for noised in drawn) == finishing
    assert min(int(noised.t.min()) for noised in drawn) < 200


def test_a_look_at_what_is_held_out_is_repeatable_and_moves_nothing(tmp_path: Path) -> None:
    training = base_training(tmp_path)
    training.run(2, compiled=False)
    first = training.held_out_error()
    training.course.average["transformer.proj_out.bias"] += 1.0
    before = {name: p.clone() for name, p in training.modules.named_parameters()}
    assert training.held_out_error() == training.held_out_error() > first
    assert all(torch.equal(p, before[name]) for name, p in training.modules.named_parameters())


def test_a_finished_model_s_rates_fall_from_the_start() -> None:
    rates = [finishing_factor(step, 1000) for step in range(1001)]
    assert max(rates) < FINISHING and rates[1000] == 0 and rates[29] == max(rates)
    assert learning_rate_factor(500, 1000) == 1.0 and learning_rate_factor(1000, 1000) == 0


def test_a_model_to_finish_keeps_its_own_tokenizer_or_another_is_refused(tmp_path: Path) -> None:
    work, warm, other = (tmp_path / name / "tokenizer" for name in ("work", "warm", "other"))
    own = kept_tokenizer(warm, ["red apple, red pear", "a red apple"], None).get_vocab()
    assert own == kept_tokenizer(warm, ["blue whale, blue sky"], None).get_vocab()
    assert kept_tokenizer(work, ["blue whale, blue sky"], warm.parent).get_vocab() == own
    assert kept_tokenizer(other, ["blue whale, blue sky"], None).get_vocab() != own
    with pytest.raises(SystemExit, match=r"other.tokenizer is not the tokenizer of --finish .*warm, whose text"):
        kept_tokenizer(other, [], warm.parent)


def test_a_course_goes_on_from_its_file_and_averages(tmp_path: Path) -> None:
    """Five steps in two pieces are the five in one to the bit; the average after the first is 0.1 old and 0.9 new."""

    def course(name: str) -> Course:
        torch.manual_seed(0)
        network = torch.nn.Linear(8, 8)
        muon = BatchedMuon([network.get_parameter("weight")])
        return Course(network, muon, rates=(1e-2, 1e-2), decay=0.9, file=tmp_path / name / "state.pt")

    def run(course: Course, steps: int) -> dict[str, Tensor]:
        while course.step < steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(course.step))
            course.update(course.network(x).square().mean(), 1.0)
        return {name: p.detach().clone() for name, p in course.network.named_parameters()}

    whole, first = course("whole"), course("cut")
    began, stepped = run(whole, 0), run(whole, 1)
    for name, average in whole.average.items():
        torch.testing.assert_close(average, 0.1 * began[name] + 0.9 * stepped[name])
        assert not torch.equal(began[name], stepped[name])
    run(first, 2)
    first.save()
    again = course("cut")
    expected, found = run(whole, 5), run(again, 5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(again.average[name], whole.average[name]) for name in expected)
