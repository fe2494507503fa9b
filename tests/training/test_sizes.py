"""Runs on pictures of several sizes. Oracles: one process for several, properties, the base of another size."""

import json
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from PIL import Image
from torch import Tensor

from pixart_ft.data import live as live_pictures
from pixart_ft.data.cache import CachedPictures, TensorStore
from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import fitted
from pixart_ft.errors import UserError
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model import loading
from pixart_ft.model.vae import LatentScale
from pixart_ft.training.batches import TrainingSet, draw_batch
from pixart_ft.training.encode import encode_once
from pixart_ft.training.start import accelerator_for, dry_run, look
from tests.helpers.launched import launch
from tests.helpers.packed import as_folder, as_parquet, as_tars
from tests.helpers.pictures import path_of
from tests.helpers.runs import Options, assert_same_end, configured, losses, short_run, train
from tests.helpers.toy_run import LAWS

OWN = {(64, 64): 9, (100, 50): 6, (40, 80): 2, (30, 120): 1}  # pictures of each size of their own
SIZES = {(64, 64): 9, (80, 48): 6, (48, 80): 2, (32, 128): 1}  # and what a resolution of 64 brings them to


@pytest.fixture
def shaped(tmp_path: Path) -> Path:
    """Pictures of four aspects."""
    folder = tmp_path / "shaped"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for number, size in enumerate(Counter(OWN).elements()):
            colours = torch.randint(0, 256, (3, 3, 3), generator=torch.Generator().manual_seed(number))
            small = Image.fromarray(colours.byte().numpy())
            small.resize(size).save(folder / f"{number:02d}.png")
            said = {"text": f"picture {number}", "other": f"a {'long ' * number}one"}
            file.write(json.dumps({"file_name": f"{number:02d}.png", **said}) + "\n")
    return folder


@pytest.fixture
def options(tiny: Path, shaped: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A short run on them, a step of four."""
    shared = short_run(tiny, shaped, tmp_path / "run", tmp_path_factory.getbasetemp() / "cache")
    return shared | {"data.aspect": "buckets", "adapter.dropout": 0.0, "data.held_out_fraction": 0.0}


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_processes_and_accumulation_see_the_same_steps_each_of_one_size(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: 1e-5 of a loss."""
    seen: list[tuple[int, ...]] = []
    terms = Objective.terms

    def noted(self: Objective, network: torch.nn.Module, x0: Tensor, *rest: Any, **named: Any) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            seen.append(tuple(x0.shape[2:]))
        return terms(self, network, x0, *rest, **named)

    monkeypatch.setattr(Objective, "terms", noted)
    whole = losses(train(options))
    assert len(seen) == len(whole) and len(set(seen)) > 1
    by_step, seen[:] = list(seen), []
    halves = losses(train(options, run__folder=tmp_path / "halves", train__batch_size=2, train__accumulation=2))
    assert seen == [shape for shape in by_step for _ in range(2)]
    launched = launch(lambda rank: train(options, run__folder=tmp_path / "two", train__batch_size=2) and 0, tmp_path)
    assert launched.end() == [0, 0], launched.said(0)
    for other in (halves, losses(tmp_path / "two")):
        assert [step["loss"] for step in other] == pytest.approx([step["loss"] for step in whole], rel=1e-5)


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_held_out_pictures_are_measured_at_their_sizes_and_a_run_resumes_bit_for_bit(
    options: Options, tmp_path: Path
) -> None:
    options |= {"data.held_out_fraction": 0.4, "train.checkpoint_every": 3, "validation.prompts": []}
    held = look(configured(options), None).held
    assert len(held.counts) > 1
    train(options, train__steps=3, optim__decay="constant")
    with pytest.raises(UserError, match="size of the pictures: 4 sizes before, 64 pixels now"):
        train(options, optim__decay="constant", data__aspect="square", resume="auto")
    whole = train(options, optim__decay="constant", run__folder=tmp_path / "whole", validation__report=True)
    assert '"held_out"' in (whole / "log.jsonl").read_text()
    report = json.loads((whole / "final" / "evaluation" / "report.json").read_text())
    assert report["data"]["pictures"] == [row.name for row in held.rows] and report["loss"]["rows"]
    assert losses(train(options, optim__decay="constant", resume="auto")) == losses(whole)


@pytest.mark.parametrize(("policy", "kept"), [("repeat", 18), ("drop", 15), ("merge_nearest", 18)])
def test_small_buckets_are_told_of_and_the_account_adds_up(options: Options, policy: str, kept: int) -> None:
    with pytest.warns(UserWarning, match=r"(?s)fewer pictures than the 4 .*32 x 128: 1 picture\n.*48 x 80: 2 pictures"):
        start = look(configured(options, data__small_buckets=policy), None)
    wanted = {size: count for size, count in SIZES.items() if policy == "repeat" or count >= 4}
    if policy == "merge_nearest":
        wanted[64, 64] += 3
    assert dict(start.train.counts) == wanted and len(start.train.rows) == kept
    facts = "\n".join(start.facts(configured(options), "cpu", 1))
    assert f"18 pictures: {kept} trained on" + (", 3 left out" if kept == 15 else "") in facts
    assert "80 x 48            6 pictures, 1.5 steps an epoch; 6 cropped, by 16.7% on average, 16.7% at most" in facts


def test_several_resolutions_each_for_the_pictures_that_fill_it(options: Options) -> None:
    start = look(configured(options, data__resolution=[64, 32], data__aspect="square"), None)
    assert dict(start.train.counts) == {(64, 64): 9, (32, 32): 9} and start.resolution == 64


@pytest.mark.filterwarnings("ignore:  sizes of fewer")
def test_crops_and_mirror_images_are_encoded_and_told(options: Options) -> None:
    """The caption of number 3 has a side; the train set alone is augmented."""
    folder = Path(str(options["data.folder"]))
    table = (folder / "metadata.jsonl").read_text().replace("picture 3", "picture 3, from the left")
    (folder / "metadata.jsonl").write_text(table)
    options |= {"data.crop": "random", "data.crops": 2, "data.flip": True, "data.held_out_fraction": 0.2}
    options |= {"data.sources": [{"folder": options.pop("data.folder"), "repeats": 2}]}
    with pytest.warns(UserWarning, match=r"(?s)that are not mirrored.*: 1\n    03\.png"):
        start = look(configured(options), None)
    assert "shown as           one of 4 crops and mirror images of each" in start.facts(configured(options), "cpu", 1)
    config = configured(options)
    encoded = encode_once(config, start.base, start.learned, start.held, accelerator_for(config))
    views = start.learned.views(config.data)
    assert encoded.train.views == 4 and len(encoded.train) == len(start.train.rows)
    vae = loading.load_vae(start.base, dtype=torch.float32)
    for index, view in ((0, 1), (len(views) - 1, 2)):
        with torch.no_grad():
            pixels = fitted(start.train.rows[index].opened().picture, views[index][view])
            alone = vae.encode(pixels[None]).latent_dist.mean
        torch.testing.assert_close(encoded.train.latents([index], [view])[0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_live_batches_are_the_cached_ones(options: Options, tmp_path: Path) -> None:
    """Also of a source that is repeated, with two captions. To the rounding of other batches in VAE and T5; nothing of
    the training is kept on the disk."""
    source = {"folder": str(options.pop("data.folder")), "repeats": 2, "caption": ["text", "other"]}
    options |= {"data.sources": [source], "data.crop": "random", "data.crops": 3, "data.flip": True}
    batches = []
    for live in (False, True):
        config = configured(options, data__live=live, data__cache=tmp_path / f"cache-{live}")
        start = look(config, None)
        encoded = encode_once(config, start.base, start.learned, start.held, accelerator_for(config))
        sizes = tuple(start.train.counts.values())
        parts = (encoded.train, encoded.scale, encoded.null_caption)
        data = TrainingSet(*parts, captions=encoded.captions, buckets=sizes, together=4)
        assert (sum(path.stat().st_size for path in config.data.cache.glob("*.safetensors")) < 10_000) == live
        batches.append(
            [draw_batch(data, range(4 * n, 4 * n + 4), start.laws, global_batch=4, num_steps=1000) for n in range(5)]
        )
    for cached, at_hand in zip(*batches, strict=True):
        assert torch.equal(cached.mask, at_hand.mask) and torch.equal(cached.t, at_hand.t)
        for name in ("x0", "eps", "embeds"):
            torch.testing.assert_close(getattr(cached, name), getattr(at_hand, name), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_live_pictures_are_encoded_by_one_thread_at_a_time(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's loss is looked at while the next batch is made."""
    config = configured(options, data__live=True)
    start = look(config, None)
    pictures = encode_once(config, start.base, start.learned, start.held, accelerator_for(config)).train
    inside, most, plain = list[int](), list[int](), live_pictures.encode_moments

    def slow(*given: Any) -> Tensor:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return plain(*given)

    monkeypatch.setattr(live_pictures, "encode_moments", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda index: pictures.latents([index]), range(4)))
    assert most == [1] * 4


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_a_live_picture_that_is_another_now_is_refused(options: Options) -> None:
    config = configured(options, data__live=True)
    start = look(config, None)
    pictures = encode_once(config, start.base, start.learned, start.held, accelerator_for(config)).train
    pictures.latents([0])
    Image.new("RGB", (64, 64)).save(path_of(start.learned.rows[0]))
    with pytest.raises(UserError, match="was changed since the run began"):
        pictures.latents([0])


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
@pytest.mark.parametrize("strict", [False, True])
def test_a_live_picture_without_latents_is_left_out_once_it_is_drawn_or_refused(
    strict: bool, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named once; and what a draw shows in its place does not depend on what was drawn before."""
    config, plain = configured(options, data__live=True, data__strict=strict), live_pictures.encode_moments
    start = look(config, None)

    def some(vae: Any, pixels: Tensor) -> Tensor:
        found = plain(vae, pixels)
        found[pixels[:, 0].mean((1, 2)) > 0.2] = torch.nan
        return found

    def begun() -> TrainingSet:
        encoded = encode_once(config, start.base, start.learned, start.held, accelerator_for(config))
        sizes = tuple(start.train.counts.values())
        return TrainingSet(encoded.train, encoded.scale, encoded.null_caption, buckets=sizes, together=4)

    def step(data: TrainingSet, number: int) -> Tensor:
        draws = range(4 * number, 4 * number + 4)
        return draw_batch(data, draws, start.laws, global_batch=4, num_steps=1000).x0

    monkeypatch.setattr(live_pictures, "encode_moments", some)
    told = r"the VAE gives NaN or infinity .*: \d+\n    .*png"
    with pytest.raises(UserError, match=told) if strict else pytest.warns(UserWarning, match=told):
        batches = [step(data := begun(), 0), *(step(data, number) for number in range(1, 12))]
    if not strict:
        assert data.pictures.lost and all(x0.isfinite().all() for x0 in batches)
        with warnings.catch_warnings(action="error"):
            again = [step(data, number) for number in range(12)]
        with pytest.warns(UserWarning, match=told):
            resumed = [step(later, number) for later in [begun()] for number in range(8, 12)]
        assert all(map(torch.equal, again, batches)) and all(map(torch.equal, resumed, batches[8:]))


@pytest.mark.filterwarnings("ignore:  (sizes|pictures)")
def test_repeated_sources_of_any_kind_and_a_prior_fill_buckets(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their folder listed as often, bit for bit."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of datasets")
    rows = read_folder(Path(options.pop("data.folder")))
    options |= {"validation.prompts": [], "data.prior_weight": 0.5}
    shapes = (as_folder, as_parquet, as_tars)
    folder, parquet, tars = (shape(rows, tmp_path / shape.__name__) for shape in shapes)
    prior = as_tars(rows[:14], tmp_path / "prior") | {"use": "prior"}
    plain = train(options, data__sources=[folder, folder, folder, prior], run__folder=tmp_path / "plain")
    several = {"data__sources": [parquet | {"repeats": 2}, tars, prior]}
    start = look(configured(options, **several), None)
    facts = "\n".join(start.facts(configured(options, **several), "cpu", 1))
    assert "\n80 x 48            12 pictures, 4.5 steps an epoch" in facts
    assert "\nprior 64 x 64      9 pictures, 2.25 steps an epoch" in facts
    assert "pictures           36, and 14 of the prior in every second step, of 4 sizes" in facts
    for name, sources in {"tars": [tars | {"repeats": 3}, prior], "parquet": [parquet | {"repeats": 3}, prior]}.items():
        assert_same_end(train(options, data__sources=sources, run__folder=tmp_path / name), plain)


def test_pictures_all_of_one_shape_are_told_by_their_size(options: Options) -> None:
    folder = Path(str(options["data.folder"]))
    for row in read_folder(folder):
        row.opened().picture.resize((100, 50)).save(folder / row.name)
    start = look(configured(options), None)
    assert "pictures           18, 80 x 48 pixels" in start.facts(configured(options), "cpu", 1)


def test_a_step_that_does_not_fit_the_base_is_refused(options: Options) -> None:
    with pytest.raises(UserError, match=r"data.bucket_step 512 leaves no size but squares of \[64\]"):
        look(configured(options, data__bucket_step=512), None)
    with pytest.raises(UserError, match=r"data.resolution\[1\] is 72; expected \[integer"):
        configured(options, data__resolution=[64, 72])
    with pytest.raises(UserError, match=r"data\.crop .none. with aspect .square. would squeeze"):
        configured(options, data__aspect="square", data__crop="none")
    with pytest.raises(UserError, match=r"small_buckets .drop. with aspect .square. and resolution .64"):
        configured(options, data__aspect="square", data__small_buckets="drop")
    with pytest.raises(UserError, match="drop leaves no picture"):
        look(configured(options, data__small_buckets="drop", train__batch_size=32), None)


def test_a_picture_without_latents_gives_way_to_one_of_its_own_size_and_use(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.add({f"latent{i}": torch.zeros(2, 4, 2, 2) for i in range(10)} | {"text": torch.zeros(1, 3)})
    pictures = CachedPictures(store, [f"latent{i}" for i in range(10)], ["text"] * 10)
    sizes: dict[str, Any] = {"prior": 5, "buckets": (3, 2), "prior_buckets": (2, 3), "together": 4}
    data = TrainingSet(pictures, LatentScale(1.0), torch.zeros(1, 3), names=list("abcdefghij"), **sizes)
    before = [data.row(0, draw) for draw in range(80)]
    assert set(before) == set(range(10))
    pictures.lost = {2, 3, 5, 8, 9}
    instead = {2: 0, 3: 4, 5: 6, 8: 7, 9: 7}
    assert [data.row(0, draw) for draw in range(80)] == [instead.get(row, row) for row in before]
    pictures.lost = {5, 6}
    with pytest.raises(UserError, match=r"for every picture of the size of [fg]"):
        [data.row(0, draw) for draw in range(80)]


def test_a_prior_has_every_second_step_where_there_are_several_sizes(tmp_path: Path) -> None:
    """Own pictures 0 to 2 and 3 to 4 of two sizes, the prior's 5 to 6 and 7 to 9."""
    store = TensorStore(tmp_path)
    wide = [number in (3, 4, 7, 8, 9) for number in range(10)]
    store.add({f"latent{i}": torch.full((2, 4, 2, 4 if wide[i] else 2), float(i)) for i in range(10)})
    store.add({f"text{i}": torch.full((1, 3), float(i)) for i in range(10)})
    pictures = CachedPictures(store, [f"latent{i}" for i in range(10)], [f"text{i}" for i in range(10)])
    sizes: dict[str, Any] = {"prior": 5, "prior_weight": 0.5, "buckets": (3, 2), "prior_buckets": (2, 3), "together": 4}
    data = TrainingSet(pictures, LatentScale(1.0), torch.zeros(1, 3), **sizes)
    laws = replace(LAWS, timestep_law="uniform", caption_dropout=0.0)
    of_prior = Counter[bool]()
    for step in range(20):
        batch = draw_batch(data, range(4 * step, 4 * step + 4), laws, global_batch=4, num_steps=10)
        shown = batch.embeds[:, 0, 0].int().tolist()
        assert len({number >= 5 for number in shown}) == 1 and len({wide[number] for number in shown}) == 1
        of_prior[shown[0] >= 5] += 1
        assert (batch.weight == (0.5 if shown[0] >= 5 else 1.0)).all()
    assert of_prior == {True: 10, False: 10}


@pytest.mark.parametrize("native", [256, 512, 1024, 2048])
def test_positions_at_another_size_are_those_of_the_base_of_that_size(native: int) -> None:
    """Each base has the interpolation_scale of its own size (native / 512), and diffusers stretches its positions over
    whatever grid it is given: so a run of several resolutions needs no scale but the base's own."""

    def positions(native: int, height: int, width: int) -> Tensor:
        side = native // 8
        embed = PatchEmbed(side, side, 2, 4, 16, interpolation_scale=side / 64)
        torch.nn.init.zeros_(embed.proj.weight)
        torch.nn.init.zeros_(embed.proj.bias)
        found: Tensor = embed(torch.zeros(1, 4, height // 8, width // 8))
        return found.detach()

    torch.testing.assert_close(positions(native, 512, 512), positions(512, 512, 512), rtol=0, atol=1e-5)
    torch.testing.assert_close(positions(native, 256, 512), positions(1024, 256, 512), rtol=0, atol=1e-5)


def test_a_dry_run_has_a_line_for_each_size(options: Options) -> None:
    with pytest.warns(UserWarning, match="fewer pictures"):
        lines = dry_run(configured(options))
    assert [line.split("  ")[0] for line in lines if "steps an epoch" in line] == [
        "32 x 128",
        "48 x 80",
        "64 x 64",
        "80 x 48",
    ]
