"""What run_training hands to the network, the loss and the optimizer. Oracle: the same numbers recomputed by hand from
the picture files, the base's own T5 and VAE, diffusers' transformer and plain torch; only the randomness by purpose
and the loss's formula, which have their own tests, are taken from the package."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

from pixart_ft.adapters.acting import load_adapter
from pixart_ft.adapters.attach import attach
from pixart_ft.adapters.files import Adapter, LoraSettings
from pixart_ft.config.train import load_config
from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import fitted
from pixart_ft.diffusion.objectives import simple_term, variance_alone, vlb_term
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.evaluation import objective
from pixart_ft.model import loading, shared_calls
from pixart_ft.model.base import Base
from pixart_ft.model.text import encode_captions, pad_text
from pixart_ft.randomness import normal, permuted, uniform
from pixart_ft.training.run import run_training
from pixart_ft.training.trainer import Trainer
from tests.helpers.runs import blank_curves
from tests.helpers.tiny import build_picture_folder, shifted_copy

SEED, STEPS, WARMUP, GLOBAL_BATCH, GRID = 4, 2, 2, 4, 3
VLB_SCALE, CLIP_NORM, LEARNING_RATE, EMA_DECAY, DROPOUT = 3.0, 0.05, 0.05, 0.9, 0.5
BETAS, EPSILON, WEIGHT_DECAY = (0.8, 0.9), 1e-3, 0.5  # Adam forgets the gradient's size, except for a large epsilon
LORA = LoraSettings(rank=4, alpha=8, targets=("to_q", "to_v"), dropout=0.0)
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # of the tiny base


@pytest.fixture(scope="module")
def tiny(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a VAE that shifts its latents, which training must do as sampling does."""
    return shifted_copy(tiny, tmp_path_factory.mktemp("shifted") / "base")


@pytest.fixture(scope="module")
def options(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A short run with every number of the first steps away from its default, and held-out pictures of its own."""
    folder = tmp_path_factory.mktemp("wiring")
    held_out = build_picture_folder(folder / "held_out", 3, size=80)
    captions = held_out / "metadata.jsonl"
    captions.write_text(captions.read_text().replace(" circle on grey", "", 1))  # of unequal length: masks matter
    adamw = {"beta1": BETAS[0], "beta2": BETAS[1], "epsilon": EPSILON, "weight_decay": WEIGHT_DECAY}
    return {
        "run": {"folder": str(folder / "run"), "seed": SEED},
        "model": {"base": str(tiny)},
        "data": {"folder": str(pictures), "held_out": str(held_out), "resolution": 64, "cache": str(folder / "cache")},
        "diffusion": {"timestep_law": "stratified", "vlb_scale": VLB_SCALE, "caption_dropout": DROPOUT},
        "adapter": {"rank": LORA.rank, "alpha": LORA.alpha, "targets": list(LORA.targets)},
        "optim": {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "warmup_steps": WARMUP} | adamw,
        "train": {"steps": STEPS, "batch_size": 2, "accumulation": 2, "mixed_precision": "no", "ema_decay": EMA_DECAY},
        "validation": {"timesteps": GRID, "raw_weights": True},
        "logging": {"every": 1, "trackers": []},
    }


def train(options: dict[str, dict[str, Any]], **more: dict[str, Any]) -> Path:
    """Run with these options; keyword `run={...}` overrides keys of that section."""
    with blank_curves():
        return run_training(load_config({name: part | more.get(name, {}) for name, part in options.items()}))


@pytest.fixture(scope="module")
def run(options: dict[str, dict[str, Any]]) -> Path:
    """The finished run, shared by the tests that only read it."""
    return train(options)


def log(run: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if kind in r]


def text_of(tiny: Path, captions: list[str]) -> list[torch.Tensor]:
    tokenizer, encoder = loading.load_text_encoder(Base.read(tiny), dtype=torch.float32)
    return encode_captions(encoder, tokenizer, captions)


@torch.no_grad()
def encoded(tiny: Path, folder: Path | str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Mean and standard deviation of each picture's latents, shifted and scaled, and the captions' embeddings."""
    rows, vae = read_folder(folder), loading.load_vae(Base.read(tiny), dtype=torch.float32)
    given = vae.encode(torch.stack([fitted(row.opened().picture, 64) for row in rows])).latent_dist
    factor = vae.config.scaling_factor
    return (given.mode() - 0.5) * factor, given.std * factor, text_of(tiny, [row.caption for row in rows])


def losses(
    transformer: PixArtTransformer2DModel,
    x0: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    texts: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Per-sample terms of the hybrid loss, the network called as diffusers documents it."""
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    x_t = a.sqrt().float() * x0 + (1 - a).sqrt().float() * eps
    embeds, mask = pad_text(texts)
    sizes = {"resolution": None, "aspect_ratio": None}  # PixArt-Sigma takes no sizes
    output = transformer(x_t, embeds, t, sizes, encoder_attention_mask=mask).sample
    schedule, noised = NoiseSchedule.linear(1000), Noised(x0, eps, t, x_t)
    simple = simple_term(schedule, output, noised, "epsilon")
    vlb = vlb_term(schedule, variance_alone(output), noised, "epsilon")
    return {"simple": simple, "vlb": vlb, "loss": simple + VLB_SCALE * vlb}


def test_first_steps_by_hand(run: Path, tiny: Path, pictures: Path) -> None:
    mean, std, texts = encoded(tiny, pictures)
    null = text_of(tiny, [""])[0]
    transformer = loading.load_transformer(Base.read(tiny), dtype=torch.float32)
    attach(transformer, LORA, seed=SEED)
    own = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    trained = {"base_model.model." + name.replace(".default.", "."): p for name, p in own.items()}  # as in the file
    average = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)

    dropped = uniform(SEED, range(STEPS * GLOBAL_BATCH), "caption dropout") < DROPOUT
    assert dropped.any() and not dropped.all(), "choose a seed that drops some captions and keeps some"
    logged = log(run, "train")
    assert len(logged) == STEPS
    for step, record in enumerate(logged):
        draws = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        chosen = [permuted(SEED, 0, "epoch order", len(mean), d) for d in draws]
        noise = normal(SEED, draws, "posterior", mean.shape[1:])
        eps = normal(SEED, draws, "noise", mean.shape[1:])
        t = ((torch.arange(GLOBAL_BATCH) + uniform(SEED, draws, "timestep")) / GLOBAL_BATCH * 1000).long()
        text = [null if dropped[d] else texts[row] for d, row in zip(draws, chosen, strict=True)]
        terms = losses(transformer, mean[chosen] + std[chosen] * noise, eps, t, text)
        terms["loss"].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP_NORM)
        assert norm > 2 * CLIP_NORM, "the clipping must act for this test to see it"
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (step + 1) / WARMUP
        optimizer.step()
        optimizer.zero_grad()
        keep = min(EMA_DECAY, (1 + step) / (10 + step))
        average = {name: keep * average[name] + (1 - keep) * p.detach() for name, p in trained.items()}

        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
        for name, values in terms.items():
            assert record["train"][name] == pytest.approx(values.mean().item(), rel=1e-5), name
    for name, by_hand in (("adapter_raw", trained), ("adapter", average)):
        saved = load_file(run / "final" / name / "adapter_model.safetensors")
        torch.testing.assert_close(saved, {key: p.detach() for key, p in by_hand.items()}, rtol=0, atol=1e-5)


@torch.no_grad()
def test_held_out_loss_by_hand(run: Path, tiny: Path, options: dict[str, dict[str, Any]]) -> None:
    """Before: of the bare base. After: of the averaged adapter as a user loads it."""
    x0, _, texts = encoded(tiny, options["data"]["held_out"])
    t = torch.tensor([166, 500, 833])  # the middles of thirds of 0..999
    each = torch.cat([torch.arange(len(x0)).repeat_interleave(GRID), torch.arange(len(x0))])  # the last at t = 0
    eps, t = (
        normal(SEED, range(len(each)), "held-out noise", x0.shape[1:]),
        torch.cat([t.repeat(len(x0)), 0 * each[:3]]),
    )

    def measured(transformer: PixArtTransformer2DModel) -> dict[str, float]:
        terms = losses(transformer, x0[each], eps, t, [texts[p] for p in each])
        zero = {name: value[-3:].mean().item() for name, value in terms.items()}
        mean = {name: 0.999 * value[:-3].mean().item() + 0.001 * zero[name] for name, value in terms.items()}
        return mean | {f"{name}_t0": value for name, value in zero.items()}

    base, averaged, last = (loading.load_transformer(Base.read(tiny), dtype=torch.float32) for _ in range(3))
    load_adapter(averaged, Adapter.read(run))
    load_adapter(last, Adapter.read(run, weights="raw"))
    by_hand, raw = [measured(base), measured(averaged)], [measured(base), measured(last)]
    logged = [{name: e["mean"] for name, e in r["held_out"].items()} for r in log(run, "held_out")]
    assert logged == [pytest.approx(expected, rel=1e-5) for expected in by_hand]
    logged = [{name: e["mean"] for name, e in r["held_out_raw"].items()} for r in log(run, "held_out")]
    assert logged == [pytest.approx(expected, rel=1e-5) for expected in raw]
    others = by_hand[0]["loss"], raw[1]["loss"]
    assert all(abs(by_hand[1]["loss"] - other) > 1e-3 for other in others), "they must differ to be told apart"


def test_training_and_sampling_see_the_same_null_caption(
    options: dict[str, dict[str, Any]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every caption dropped, the network trains on what the unconditional branch is later given."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"training": [], "sampling": []}
    for module, calls in ((objective, seen["training"]), (shared_calls, seen["sampling"])):

        def recording(
            transformer: PixArtTransformer2DModel,
            x_t: torch.Tensor,
            timesteps: torch.Tensor,
            embeds: torch.Tensor,
            mask: torch.Tensor,
            calls: list[tuple[torch.Tensor, torch.Tensor]] = calls,
            whole: Callable[..., Any] = module.network_output,
        ) -> Any:
            calls.append((embeds.clone(), mask.clone()))
            return whole(transformer, x_t, timesteps, embeds, mask)

        monkeypatch.setattr(module, "network_output", recording)
    place, data = {"folder": str(tmp_path / "run")}, {"held_out": None}  # each call of the loss is a training step's
    sampled = {"prompts": ["a red circle"], "steps": 2, "guidance": 2.0}
    run = train(options, run=place, data=data, diffusion={"caption_dropout": 1.0}, validation=sampled)
    (null,) = text_of(tiny, [""])
    saved = load_file(run / "final" / "adapter" / "null_caption.safetensors")["null_caption"]
    assert saved.dtype == null.dtype and torch.equal(saved, null)
    checks = 2  # of the last step's weights and of their average, before the checkpoint
    assert len(seen["training"]) == STEPS * 2 + checks and len(seen["sampling"]) == 2 * 2
    unconditional = [(embeds[:1], mask[:1]) for embeds, mask in seen["sampling"]]
    for embeds, mask in seen["training"] + unconditional:
        expected_embeds, expected_mask = pad_text([null] * len(embeds), embeds.shape[1])
        assert embeds.dtype == null.dtype and torch.equal(embeds, expected_embeds) and torch.equal(mask, expected_mask)


def at_the_start(options: dict[str, dict[str, Any]], **more: dict[str, Any]) -> Trainer:
    """The trainer that `train` makes of these, before its first step."""
    caught: list[Trainer] = []

    def instead(self: Trainer) -> None:
        caught.append(self)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Trainer, "run", instead)
        train(options, **more)
    (trainer,) = caught
    return trainer


def test_every_number_of_the_configuration_arrives(options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The trainer gets each value of the configuration and no default; a new field must be added here."""
    length = {
        "steps": 31,
        "batch_size": 3,
        "accumulation": 7,
        "checkpoint_every": 11,
        "keep_checkpoints": 13,
        "give_up_after": 8,
    }
    optim = {"learning_rate": 3e-3, "warmup_steps": 5, "decay": "linear", "clip_norm": 0.7}
    noise = {"caption_dropout": 0.37, "timestep_law": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8}
    often = {"every": 19, "samples_every": 23, "timesteps": 6, "pictures": 2}
    other: dict[str, Any] = {"run": {"folder": str(tmp_path / "run"), "seed": 17}, "logging": {"every": 29}}
    diffusion, data = noise | {"vlb_scale": 2.5}, {"latents": "mode"}
    trainer = at_the_start(
        options, data=data, diffusion=diffusion, optim=optim, train=length, validation=often, **other
    )
    rest = {"log_every": 29, "validate_every": 19, "samples_every": 23, "in_backward": False}  # it would not clip
    assert dataclasses.asdict(trainer.laws) == noise | {"seed": 17} | data
    assert dataclasses.asdict(trainer.plan) == length | {"clip_norm": optim.pop("clip_norm")} | rest
    rate = {"peak": optim.pop("learning_rate"), "steps": length["steps"]}
    assert dataclasses.asdict(trainer.learning_rate) == rate | optim
    (group,) = trainer.optimizer.param_groups
    expected = {"lr": 3e-3, "betas": BETAS, "eps": EPSILON, "weight_decay": WEIGHT_DECAY}
    assert {name: group[name] for name in expected} == expected
    assert (trainer.objective.kind, trainer.objective.vlb_scale, trainer.ema.decay) == ("hybrid", 2.5, EMA_DECAY)
    (held_out,) = trainer.watch.held_out
    assert (len(held_out.x0), held_out.timestep_count, held_out.seed) == (2, 6, 17)


def test_the_prior_is_encoded_behind_the_pictures_with_its_weight(
    options: dict[str, dict[str, Any]], tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    prior = Path(options["data"]["held_out"])
    data = {"prior": str(prior), "prior_weight": 0.3, "held_out": None}
    trainer = at_the_start(options, run={"folder": str(tmp_path / "run")}, data=data).data
    assert (trainer.prior, trainer.prior_weight) == (3, 0.3)
    expected = [encoded(tiny, folder) for folder in (pictures, prior)]
    everything = list(range(len(trainer.pictures)))
    mean, _ = trainer.pictures.latents(everything)
    torch.testing.assert_close(trainer.scale.scaled(mean), torch.cat([x0 for x0, _, _ in expected]), rtol=0, atol=1e-5)
    texts = [text for _, _, part in expected for text in part]
    for kept, text in zip(trainer.pictures.texts(everything), texts, strict=True):
        torch.testing.assert_close(kept, text, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:different texts become the same tokens")
def test_what_is_encoded_and_loaded_is_what_the_configuration_says(
    options: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Size, length and precision, each unlike the base's own and the default."""
    place, data = {"folder": str(tmp_path / "run")}, {"resolution": 32, "max_tokens": 3}
    model = {"dtype": "bfloat16", "text_encoder_dtype": "float16"}
    with pytest.warns(UserWarning, match="max_tokens 3"):
        trainer = at_the_start(options, run=place, data=data, model=model)
    (held_out,) = trainer.watch.held_out
    texts = [*held_out.texts, *trainer.data.pictures.texts([0, 1])]
    assert {len(text) for text in texts} == {3} and {text.dtype for text in texts} == {torch.float16}
    assert held_out.x0.shape[2:] == trainer.data.pictures.latents([0])[0].shape[2:] == (4, 4)
    frozen = {p.dtype for p in trainer.transformer.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("live", [False, True])
def test_captions_are_those_of_t5_in_the_few_bits_that_were_asked_for(
    live: bool, options: dict[str, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    asked = {"text_encoder_quantization": "nf4"}
    place, data = {"folder": str(tmp_path / "run")}, {"live": live, "cache": str(tmp_path / "cache")}
    trainer = at_the_start(options, run=place, data=data, model=asked)
    tokenizer, short = loading.load_text_encoder(Base.read(tiny), dtype=torch.float32, quantization="nf4")
    captions = [row.caption for row in read_folder(options["data"]["folder"])[:2]]
    texts = encode_captions(short, tokenizer, captions)
    for kept, text in zip(trainer.data.pictures.texts([0, 1]), texts, strict=True):
        torch.testing.assert_close(kept, text, rtol=0, atol=1e-5)
