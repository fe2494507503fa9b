"""Adapters that act in an interval of timesteps: drawn, measured and trained there, and the bare base elsewhere.

Oracles: a network made by hand of two others, the bare base and the adapter everywhere, chosen by each call's timestep;
closed forms of the laws of t.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from pixart_ft import cli
from pixart_ft.adapters.acting import limit_adapter, load_adapter, merge
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.config.samplers import EVERY_SAMPLER
from pixart_ft.diffusion.intervals import WHOLE, holds
from pixart_ft.diffusion.likelihood import OdeLikelihood, ode_likelihood
from pixart_ft.diffusion.names import TimestepLaw
from pixart_ft.diffusion.process import network_timesteps
from pixart_ft.diffusion.schedules import NoiseSchedule, conditioned
from pixart_ft.diffusion.weighting import LossHistory, importance_timesteps, indices_within, logit_normal_timesteps
from pixart_ft.errors import UserError
from pixart_ft.evaluation.held_out import HeldOutSet, held_out_loss
from pixart_ft.evaluation.objective import Objective
from pixart_ft.model.base import Base
from pixart_ft.model.loading import load_transformer
from pixart_ft.model.network import network_output
from pixart_ft.model.shared_calls import prepared
from pixart_ft.model.text import pad_text
from pixart_ft.pictures.recipes import config_of, read_recipe
from pixart_ft.runs.metadata import read_metadata
from pixart_ft.sampling.pipeline import PixArtPipeline
from pixart_ft.sampling.settings import Settings
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.training.batches import Batch, draw_batch
from pixart_ft.training.learning_rate import LearningRate
from pixart_ft.training.trained_on import TrainedOn, changes
from tests.helpers.adapters import make_adapter
from tests.helpers.rounding import PICTURE, gap
from tests.helpers.runs import STEPS, losses, short_run, train
from tests.helpers.toy_run import LAWS, toy_set

PROMPTS = ["a red circle on grey", "A photo of the black triangle on pink "]
INTERVAL = (300.0, 700.0)
JOBS = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


class ByHand(nn.Module):
    """The adapter's network for timesteps in the interval, the bare one for others; both ends are inside."""

    def __init__(self, bare: nn.Module, adapted: nn.Module) -> None:
        super().__init__()
        self.bare, self.adapted, self.config = bare, adapted, bare.config
        self.used: Counter[bool] = Counter()

    def forward(self, x: Tensor, *, timestep: Tensor, **arguments: Any) -> Any:
        inside = INTERVAL[0] <= float(timestep[0]) <= INTERVAL[1]
        self.used[inside] += 1
        return (self.adapted if inside else self.bare)(x, timestep=timestep, **arguments)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("interval") / "adapter")


@pytest.fixture(scope="module")
def limited(tiny: Path, adapter: Path) -> TextToImage:
    return TextToImage.load(tiny, lora=adapter, lora_interval=INTERVAL)


@pytest.fixture(scope="module")
def by_hand(tiny: Path, limited: TextToImage) -> TextToImage:
    adapted = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(adapted, Adapter.read(limited.adapters[0].path))
    return replace(limited, transformer=ByHand(load_transformer(Base.read(tiny), dtype=torch.float32), adapted).eval())


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="of .* noise levels")
        yield


# Sampling


@pytest.mark.parametrize(
    "asked",
    [
        *({"sampler": name} for name in EVERY_SAMPLER),
        {"sampler": "pf_ode", "options": {"tolerance": 0.3}},
        {"guidance": 1.0},
        {"guidance_interval": (500.0, 900.0), "negative_prompt": "a square"},
        {"image": "picture", "strength": 0.8},
        {"image": "picture", "strength": 0.8, "inversion": True, "guidance": 1.0},
        {"sampler": "euler", "schedule": "cosine", "steps": 10},
        {"width": 96, "height": 64},
    ],
    ids=str,
)
def test_every_way_of_sampling_is_the_adapter_inside_and_the_base_outside(
    limited: TextToImage, by_hand: TextToImage, asked: dict[str, Any]
) -> None:
    if "image" in asked:
        asked = asked | {"image": Image.effect_noise((64, 64), 60).convert("RGB")}
    settings = limited.settled(Settings(**{"steps": 4} | asked))
    network: Any = by_hand.transformer
    network.used.clear()
    wanted = by_hand.latents(JOBS, settings)
    assert network.used[True] and network.used[False]
    found = limited.latents(JOBS, settings)
    assert torch.equal(found, wanted) and found.isfinite().all()
    assert limited.transformer.adapter_switch.acting == ("default",)


@pytest.mark.parametrize("target", ["caption_projection.linear_1", "attn2.to_k", "attn2.to_v", "proj_out"])
def test_a_text_prepared_once_differs_with_the_adapter_on_and_off(tiny: Path, target: str) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    embeds, mask = pad_text([torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 5)])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = [(x, torch.tensor([timestep] * 2)) for timestep in (900, 500, 700, 100, 300, 299)]
    with torch.no_grad():
        bare = [network_output(transformer, *call, embeds, mask) for call in calls]
        attach(transformer, LoraSettings(4, 4.0, (target,)), seed=0)
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        whole = [network_output(transformer, *call, embeds, mask) for call in calls]
        limit_adapter(transformer, INTERVAL)
        plain = [network_output(transformer, *call, embeds, mask) for call in calls]
        with prepared(transformer, embeds, mask, (8, 8)) as network:
            shared = [network(*call) for call in calls]
    for number, inside in enumerate([False, True, True, False, True, False]):
        wanted, other = (whole, bare) if inside else (bare, whole)
        assert torch.equal(plain[number], wanted[number]) and torch.equal(shared[number], wanted[number])
        assert not torch.equal(wanted[number], other[number])


def test_likelihood_walks_through_both(limited: TextToImage, by_hand: TextToImage) -> None:
    embeds, mask = pad_text([limited.text.of(PROMPTS[0])])
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    probe = torch.ones_like(x0)

    def likelihood(transformer: nn.Module) -> OdeLikelihood:
        def network(x: Tensor, timesteps: Tensor) -> Tensor:
            return network_output(transformer, x, timesteps, embeds, mask)

        schedule = NoiseSchedule.linear(1000)
        return ode_likelihood(schedule, network, x0, "epsilon", probe=probe, rtol=1.0, atol=1.0)

    found = [likelihood(model.transformer) for model in (limited, by_hand)]
    assert torch.equal(found[0].log_density, found[1].log_density) and torch.equal(found[0].latent, found[1].latent)


@pytest.mark.parametrize("kind", [PixArtPipeline, PixArtSigmaPipeline])
def test_pipelines_draw_the_same(tiny: Path, adapter: Path, limited: TextToImage, kind: Any) -> None:
    pipeline = kind.from_pretrained(str(tiny))
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    if kind is PixArtPipeline:
        pipeline.load_lora(adapter, interval=INTERVAL)
    else:
        load_adapter(pipeline.transformer, Adapter.read(adapter, interval=INTERVAL))
    more = {} if kind is PixArtPipeline else {"clean_caption": False, "use_resolution_binning": False}

    def drawn() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        latents: Tensor = pipeline(
            PROMPTS[0], num_inference_steps=5, generator=generator, output_type="latent", **more
        ).images
        return latents

    found = drawn()
    assert (
        gap(found, limited.latents(JOBS[:1], limited.settled(Settings(steps=5, options={"spacing": "trailing"}))))
        < PICTURE
    )
    limit_adapter(pipeline.transformer, (0, 1000))
    assert gap(drawn(), found) > 0.05


def test_a_pipeline_refuses_what_would_do_nothing_and_warns_of_another_process(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    pipeline = PixArtPipeline.from_pretrained(str(tiny))
    pipeline.load_lora(adapter, interval=(0.2, 0.8))
    with pytest.raises(ValueError, match=r"acts at \[0.2, 0.8\] alone, which holds none of this run's 2 network"):
        pipeline(PROMPTS[0], num_inference_steps=2)
    with pytest.raises(UserError, match=r"is not written: .* keep the adapter's folder beside the base, or add it to"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    limit_adapter(pipeline.transformer, WHOLE)
    merge(pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "saved")
    merged = PixArtSigmaPipeline.from_pretrained(str(tmp_path / "saved")).transformer.state_dict()
    assert all(torch.equal(merged[name], value) for name, value in pipeline.transformer.state_dict().items())
    other = PixArtPipeline.from_pretrained(str(tiny))
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(
        UserError, match=r"trained on the schedule .*, and the scheduler of this pipeline walks through an"
    ):
        other.load_lora(adapter)
    with pytest.warns(UserWarning, match=r"let pass: adapter: it was trained on the schedule"):
        other.load_lora(adapter, strict=False)


# The switch


def test_one_call_has_one_side_and_training_is_always_inside(tiny: Path, adapter: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(adapter, interval=INTERVAL))
    embeds, mask = pad_text([torch.randn(3, 32)] * 2)
    x = torch.randn(2, 4, 8, 8)

    def call(*timesteps: int) -> Tensor:
        with torch.no_grad():
            return network_output(transformer, x, torch.tensor(timesteps), embeds, mask)

    with pytest.raises(ValueError, match=r"timesteps inside and outside of \[300, 700\]"):
        call(500, 900)
    inside, outside = call(500, 500), call(900, 900)
    limit_adapter(transformer, (0, 1000))
    assert torch.equal(call(500, 500), inside) and not torch.equal(call(900, 900), outside)
    limit_adapter(transformer, INTERVAL)
    hook = transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(900, 900)
    hook.remove()
    assert transformer.adapter_switch.acting == ("default",)
    transformer.train()
    trained = call(900, 900)  # no dropout is set
    transformer.eval()
    limit_adapter(transformer, (0, 1000))
    assert torch.equal(trained, call(900, 900))


@pytest.mark.parametrize("way", ["everywhere", "training", "elsewhere"])
def test_a_call_that_was_interrupted_leaves_nothing_to_the_next(tiny: Path, adapter: Path, way: str) -> None:
    """Ctrl-C ends a call before any hook that comes after it."""
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(adapter))
    embeds, mask = pad_text([torch.randn(3, 32)])
    x = torch.randn(1, 4, 8, 8)

    def call() -> Tensor:
        with torch.no_grad():
            return network_output(transformer, x, torch.tensor([900]), embeds, mask)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = call()
    limit_adapter(transformer, INTERVAL)
    hook = transformer.proj_out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    hook.remove()
    if way == "training":
        transformer.train()  # no dropout is set
    else:
        limit_adapter(transformer, WHOLE if way == "everywhere" else (800.0, 900.0))
    assert torch.equal(call(), wanted)


def test_an_adapter_of_an_interval_is_not_merged(tiny: Path, adapter: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(adapter, interval=INTERVAL))
    with pytest.raises(UserError, match=r"acts at the timesteps \[300, 700\] alone.*load it with the interval \[0, 10"):
        merge(transformer)
    limit_adapter(transformer, (0, 1000))
    merge(transformer)
    assert not hasattr(transformer, "adapter_switch")
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks


# What an adapter remembers


def test_an_adapter_acts_where_it_was_trained_unless_told_otherwise(tiny: Path, tmp_path: Path) -> None:
    kept = make_adapter(tiny, tmp_path / "kept", interval=INTERVAL)
    assert read_metadata(kept).interval == INTERVAL
    model = TextToImage.load(tiny, lora=kept)
    assert model.adapters[0].interval == INTERVAL and "in [300, 700]" in repr(model)
    settings = model.settled(Settings(steps=6))
    found = model.latents(JOBS[:1], settings)
    with pytest.warns(UserWarning, match=r"\[0, 1000\] goes beyond \[300, 700\], the timesteps that this adapter was"):
        model.set_lora_interval((0, 1000))
    whole = model.latents(JOBS[:1], settings)
    assert not torch.equal(found, whole)
    bare = TextToImage.load(tiny)
    model.set_lora_interval((998.5, 998.5))
    assert torch.equal(model.latents(JOBS[:1], settings), bare.latents(JOBS[:1], settings))
    model.set_lora_interval(None)
    assert torch.equal(model.latents(JOBS[:1], settings), found)
    with pytest.raises(UserError, match="lora_interval: this model has no adapter"):
        bare.set_lora_interval(None)


def test_an_adapter_from_before_acts_everywhere(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    content = json.loads((adapter / "pixart_ft.json").read_text())
    assert content.pop("interval") == [0, 1000]
    old = make_adapter(tiny, tmp_path / "old")
    (old / "manifest.json").unlink()
    (old / "pixart_ft.json").write_text(json.dumps(content))
    assert read_metadata(old).interval == (0, 1000)
    for wrong in ([0], [5, 1], ["0", 9], [0, 1e7], 7):
        (old / "pixart_ft.json").write_text(json.dumps(content | {"interval": wrong}))
        with pytest.raises(UserError, match="interval is "):
            read_metadata(old)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((5, 1), r"lora_interval \[5, 1\] ends before it begins; it is in the network's timesteps, from 0"),
        ((-1, 5), r"lora_interval \[-1, 5\] reaches beyond the timesteps"),
        ((0, 1000.5), r"lora_interval \[0, 1000.5\] reaches beyond the timesteps"),
        ((float("nan"), 5), r"lora_interval \[nan, 5\] reaches beyond the timesteps"),
    ],
)
def test_an_interval_that_there_is_not_is_refused(tiny: Path, adapter: Path, interval: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextToImage.load(tiny, lora=adapter, lora_interval=interval)


def test_an_interval_without_a_call_is_refused(limited: TextToImage) -> None:
    """The adapter may have been trained there, so no word of a key that nobody gave."""
    with pytest.raises(UserError) as caught:
        limited.settled(Settings(steps=1))
    assert str(caught.value) == (
        "the adapter acts at [300, 700] alone, which holds none of this run's 1 network calls, at timesteps 999 to "
        "999; give another lora_interval, more steps or more strength"
    )


@pytest.mark.parametrize("everywhere", [(0, 999), (0, 999.5), (0, 1000)])
def test_all_timesteps_are_everywhere_however_they_are_written(tiny: Path, tmp_path: Path, everywhere: Any) -> None:
    kept = make_adapter(tiny, tmp_path / "kept", interval=everywhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [Adapter.read(kept, interval=asked).interval for asked in (None, WHOLE, everywhere)]
    assert found == [WHOLE] * 3
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    load_adapter(transformer, Adapter.read(kept, interval=everywhere))
    merge(transformer)


def test_a_longer_process_has_its_own_timesteps(tiny: Path, tmp_path: Path) -> None:
    schedule = {"num_train_timesteps": 2000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.01}
    kept = make_adapter(tiny, tmp_path / "kept", schedule=schedule, interval=(1200.0, 1999.0))
    assert Adapter.read(kept).interval == (1200, 1999)
    with pytest.warns(UserWarning, match=r"\[0, 1999\] goes beyond \[1200, 1999\]"):
        assert Adapter.read(kept, interval=(0, 1999)).interval == WHOLE
    with pytest.raises(UserError, match=r"\[0, 2001\] reaches beyond .* from 0 \(the least noise\) to 1999"):
        Adapter.read(kept, interval=(0, 2001))


def test_one_warning_for_one_interval(tiny: Path, tmp_path: Path) -> None:
    kept = make_adapter(tiny, tmp_path / "kept", interval=INTERVAL)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        TextToImage.load(tiny, lora=kept, lora_interval=(0, 800))
    assert len([one for one in found if "goes beyond" in str(one.message)]) == 1


def test_the_command_line_takes_two_numbers_and_a_picture_remembers_them(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", tiny, "--prompt", "a", "--steps", 4, "--device", "cpu"]

    def draw(out: str, *more: object) -> bytes:
        assert cli.main([*map(str, [*words, "--out", tmp_path / out, *more])]) == 0
        return (tmp_path / out / "000-a-seed0.png").read_bytes()

    def words_of(path: Path) -> str:
        with Image.open(path) as image:
            return str(image.info["parameters"])

    first = draw("a", "--lora", adapter, "--lora-interval", "300", "700")
    assert draw("b", "--lora", adapter, "--lora-interval", "[300, 700]") == first
    assert draw("c", "--lora", adapter) != first
    picture = tmp_path / "a" / "000-a-seed0.png"
    assert read_recipe(picture)["adapter"]["interval"] == [300, 700]
    assert 'Lora interval: "[300, 700]"' in words_of(picture)
    assert "Lora interval" not in words_of(tmp_path / "c" / "000-a-seed0.png")
    assert cli.main(["generate", "--from", str(picture), "--out", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "000-a-seed0.png").read_bytes() == first
    values = config_of(picture, ["lora"])  # the other adapter acts where it was trained, with the weights it has
    assert values["lora_scale"] == 1 and not {"lora_interval", "weights"} & set(values)
    assert config_of(picture)["lora_interval"] == [300, 700] and config_of(picture)["weights"] == "raw"
    capsys.readouterr()
    for wrong, message in (
        (["--lora-interval", "5", "1", "--lora", adapter], "lora_interval [5, 1] ends before it begins"),
        (["--lora-interval", "1", "5"], "lora_interval is [1, 5], unused while lora is null"),
        (["--lora", adapter, "--lora-interval", "0", "2000"], "lora_interval [0, 2000] reaches beyond the timesteps"),
        (["--lora", adapter, "--lora-interval", "[5]"], "lora_interval is [5]; expected two numbers LOW HIGH, or null"),
        (["--lora", adapter, "--lora-interval", "0,600", "x"], "x: not an option"),
        (["--lora", adapter, "--lora-interval", "5", "x"], "x: not an option"),
    ):
        assert cli.main([*map(str, [*words, "--out", tmp_path / "e", *wrong])]) == 2
        assert message in capsys.readouterr().err


# Training


@pytest.mark.parametrize("law", get_args(TimestepLaw))
def test_every_law_of_t_stays_in_the_range_and_the_whole_is_as_without(tmp_path: Path, law: TimestepLaw) -> None:
    data, laws = toy_set(tmp_path), replace(LAWS, timestep_law=law, logit_mean=1.0)

    def draw(count: int, within: range | None) -> Batch:
        even = torch.full((len(within or range(1000)),), 1.0, dtype=torch.float64)
        return draw_batch(data, range(count), laws, global_batch=4, num_steps=1000, within=within, law=even / len(even))

    within = range(100, 132)
    t = draw(400, within).t
    assert set(t.tolist()) == set(within)
    if law == "stratified":  # each batch of 4 has one in each quarter of the 32
        assert torch.equal((t - 100).view(-1, 4) * 4 // 32, torch.arange(4).expand(100, 4))
    whole, without = (draw(40, w) for w in (range(1000), None))
    assert torch.equal(whole.t, without.t) and torch.equal(whole.weight, without.weight)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-2.0, 0.7), (3.0, 1.5)])
def test_the_logit_normal_law_of_a_range_is_the_whole_one_given_the_range(mean: float, std: float) -> None:
    count, within = 200_000, range(10, 30)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = logit_normal_timesteps(u, 50, mean=mean, std=std, within=within)
    edges = (torch.arange(10, 31, dtype=torch.float64) / 50).logit().tolist()
    below = torch.tensor([NormalDist(mean, std).cdf(edge) for edge in edges], dtype=torch.float64)
    wanted = below.diff() / (below[-1] - below[0])
    # a cell of the grid of u that lies across an edge may fall on either side
    assert (torch.bincount(t - 10, minlength=20) / count - wanted).abs().max() <= 1.01 / count
    with pytest.raises(ValueError, match=r"mean -9 and deviation 0.5 leaves almost nothing .* for t from 10 to 29"):
        logit_normal_timesteps(u, 50, mean=-9.0, std=0.5, within=within)


def test_importance_sampling_knows_the_losses_of_the_range_alone() -> None:
    within, history = range(2, 5), LossHistory.empty(6, kept=2)
    assert history.probabilities(within=within).tolist() == [1 / 3] * 3
    t = torch.arange(2, 5).repeat(2)
    history = history.updated(t, torch.tensor([1.0, 2.0, 4.0] * 2))  # the others are never met, so never full
    law = history.probabilities(0.0, within=within)
    torch.testing.assert_close(law, torch.tensor([1, 2, 4], dtype=torch.float64) / 7)
    u = (torch.arange(70_000, dtype=torch.float64) + 0.5) / 70_000
    drawn, weight = importance_timesteps(u, law)
    f = torch.tensor([5.0, -1.0, 7.0], dtype=torch.float64)
    assert (weight * f[drawn]).mean().item() == pytest.approx(f.mean().item(), rel=1e-4)


def test_a_range_means_what_the_network_is_told() -> None:
    base = NoiseSchedule.linear(1000)
    assert indices_within(base, 100, 600) == range(100, 601)
    assert indices_within(base.respaced(10), 111, 333) == range(1, 4)  # told 0, 111, 222, ...
    matched = conditioned(NoiseSchedule.cosine(1000), base, "snr_matched")
    inside = [t for t, told in enumerate(matched.timesteps.tolist()) if 100 <= told <= 600]
    assert (
        indices_within(matched, 100, 600) == range(inside[0], inside[-1] + 1)
        and len(inside) == inside[-1] - inside[0] + 1
    )
    assert inside != list(range(100, 601))
    told = network_timesteps(matched, torch.arange(1000)).tolist()  # in float32: may lie on the other side of an end
    for end in matched.timesteps[25::25].tolist():
        within = indices_within(matched, 0, end)
        assert [holds((0, end), timestep) for timestep in told] == [t in within for t in range(1000)]
    with pytest.raises(ValueError, match=r"\[0.1, 0.9\] holds none of the network's timesteps, 0 to 999"):
        indices_within(base, 0.1, 0.9)


def test_the_held_out_loss_is_measured_in_the_range(tiny: Path) -> None:
    transformer = load_transformer(Base.read(tiny), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    held_out = HeldOutSet(
        torch.randn(2, 4, 8, 8, generator=generator),
        [torch.randn(n, 32, generator=generator) for n in (2, 3)],
        timestep_count=4,
        seed=0,
    )
    told: list[int] = []
    hook = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.extend(kwargs["timestep"].tolist()), with_kwargs=True
    )
    objective = Objective(NoiseSchedule.linear(1000), "epsilon", "hybrid", interval=(200.0, 599.0))
    found = held_out_loss(transformer, objective, held_out, batch_size=3)
    hook.remove()
    assert found.keys() == {"loss", "simple", "vlb"} and told == [250, 350, 450, 550] * 2  # t = 0 is not trained


@pytest.fixture(scope="module")
def run(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The options of a finished run in the first quarter of the timesteps, which is only read."""
    place = tmp_path_factory.mktemp("ranged")
    options = short_run(tiny, pictures, place / "run", tmp_path_factory.getbasetemp() / "cache") | {
        "diffusion.timestep_range": [0, 240],
        "diffusion.timestep_law": "importance",
        "optim.learning_rate": 0.1,
        "validation.steps": 5,
    }
    told: list[float] = []
    forward = PixArtTransformer2DModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            told.extend(kwargs["timestep"].tolist())
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixArtTransformer2DModel, "forward", watched)
        train(options)
    assert len(told) == 4 * STEPS and max(told) <= 240
    return options


def test_a_run_in_a_range_says_so_and_draws_with_the_adapter_there(run: dict[str, Any], tiny: Path) -> None:
    folder = Path(run["run.folder"])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = [record for record in records if "held_out" in record]
    assert measured and all(record["interval"] == [0, 240] for record in measured)
    assert all("simple_q1" in means and "simple_q2" not in means for means in losses(folder))
    assert read_metadata(folder / "final" / "adapter").interval == (0, 240)
    drawn = TextToImage.load(tiny, lora=folder).generate("a red circle", steps=5, progress=False)[0]
    whole = TextToImage.load(tiny, lora=folder, lora_interval=(0, 1000)).generate("a red circle", steps=5)[0]
    (sample,) = (folder / "samples" / f"step-{STEPS:06d}").glob("*.png")
    there, here, other = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
        for picture in (Image.open(sample), drawn, whole)
    )
    assert (there - here).abs().max() <= 1 < (other - here).abs().max()


def test_a_resumed_run_keeps_its_range(run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diffusion.timestep_range was \[0(.0)?, 240(.0)?\], is \[0(.0)?, 500(.0)?\]"):
        train(run | {"diffusion.timestep_range": [0, 500], "train.steps": STEPS + 1}, resume="auto")


def test_a_run_from_before_ranges_was_trained_everywhere() -> None:
    before, everywhere, part = (
        {"diffusion.objective": "hybrid", **more}
        for more in ({}, {"diffusion.timestep_range": [0.0, 1000.0]}, {"diffusion.timestep_range": [0.0, 500.0]})
    )
    rate = LearningRate(1.0, 0, "constant", 9)
    found = [changes(TrainedOn({}, before), TrainedOn({}, now), rate, 0) for now in (everywhere, part)]
    assert [change.names for change in found] == [[], ["diffusion.timestep_range"]]
    assert found[1].begins_anew
