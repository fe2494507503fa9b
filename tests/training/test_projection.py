"""Captions kept as the network's own projection of them. Oracles: diffusers' layer, and the run without."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixart_ft.config.train import TrainConfig
from pixart_ft.data.store import TensorStore
from pixart_ft.errors import UserError
from pixart_ft.model import loading
from pixart_ft.model.base import Base
from pixart_ft.model.projection import Projection
from pixart_ft.model.text import encode_captions, null_caption
from pixart_ft.model.weights import read_null_caption
from pixart_ft.training import memory
from pixart_ft.training.encode import Encoded, encode_once, read_squares
from pixart_ft.training.memory import Case
from pixart_ft.training.processes import Together
from pixart_ft.training.start import accelerator_for, dry_run
from tests.helpers.runs import Options, configured, losses, short_run, train
from tests.helpers.tiny import build_tiny_pipeline


@pytest.fixture
def options(tiny: Path, pictures: Path, tmp_path: Path) -> Options:
    """Captions are dropped in half of the draws, measured, and drawn with guidance: all of these take texts."""
    run = short_run(tiny, pictures, tmp_path / "run", tmp_path / "cache")
    return run | {"diffusion.caption_dropout": 0.5, "validation.guidance": 3, "validation.samples_every": 2}


def held_out(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["held_out"]["loss"]["mean"] for record in records if "held_out" in record]


def drawn(run: Path) -> np.ndarray:
    last = sorted((run / "samples").glob("*/*.png"))[-1]
    return np.asarray(Image.open(last).convert("RGB"), dtype=int)


@pytest.mark.parametrize(
    "kind", [{}, {"adapter.kind": "full", "adapter.trainable": ["*.attn2.*"]}], ids=["lora", "part"]
)
def test_a_run_on_projected_captions_is_the_run_without_to_rounding(
    options: Options, tmp_path: Path, kind: Options
) -> None:
    """In its losses, what is measured and drawn on the way, and what it leaves."""
    if kind:
        options = {key: value for key, value in options.items() if not key.startswith("adapter.")} | kind
    plain = train(options, run__folder=tmp_path / "plain", data__cache=tmp_path / "whole")
    short = train(options, run__folder=tmp_path / "short", data__project_captions=True)
    for one, other in zip(losses(plain), losses(short), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert held_out(plain) == pytest.approx(held_out(short), rel=1e-4) and len(held_out(plain)) > 1
    assert np.abs(drawn(plain) - drawn(short)).max() < 4
    if kind:
        files = (next((run / "final").rglob("transformer/*.safetensors")) for run in (plain, short))
        first, second = map(load_file, files)
        assert first.keys() == second.keys() and any("caption_projection" in name for name in first)
        assert all(torch.equal(first[name], second[name]) for name in first if "caption_projection" in name)
    places = (next((run / "final").rglob("null_caption.safetensors")).parent for run in (plain, short))
    nulls = [read_null_caption(place, 32) for place in places]
    assert torch.equal(*nulls)  # as T5 gives it: whoever draws with the result projects it


def encoded(config: TrainConfig) -> Encoded:
    with Together(accelerator := accelerator_for(config)):
        return encode_once(config, Base.read(config.model.base), *read_squares(config, 64), accelerator)


def test_what_is_kept_is_what_the_layer_makes_of_t5(options: Options, tiny: Path) -> None:
    """Of what is trained on, measured, drawn and dropped; the null caption that a result carries is T5's."""
    base = Base.read(tiny)
    tokenizer, encoder = loading.load_text_encoder(base, dtype=torch.float32)
    layer = loading.load_transformer(base, dtype=torch.float32).caption_projection
    found = encoded(config := configured(options, data__project_captions=True))
    learned, held = (sized.rows for sized in read_squares(config, 64))
    texts = [row.caption for row in (*learned, *held)]
    got = [*found.train.texts(range(len(learned))), *(text for each in found.held_out for text in each.texts)]
    with torch.no_grad():
        whole = encode_captions(encoder, tokenizer, [*texts, "a red circle", ""])
        expected = [layer(text) for text in whole]
    for one, other in zip([*got, *found.prompts, found.null_text], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.null_caption, null_caption(encoder, tokenizer))


def test_another_projection_is_encoded_anew_and_another_block_is_not(options: Options, tmp_path: Path) -> None:
    base = build_tiny_pipeline(tmp_path / "base")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    config, made = configured(options, data__project_captions=True, model__base=base), [0]
    for name in ("", "transformer_blocks.0.attn1.to_q.weight", "caption_projection.linear_2.bias"):
        weights = load_file(file)
        if name:
            weights[name] += 1
            save_file(weights, file, {"format": "pt"})
        encoded(config)
        made.append(len(TensorStore(config.data.cache)))
    texts = len({row.caption for sized in read_squares(config, 64) for row in sized.rows} | {"a red circle", ""})
    assert [after - before for before, after in pairwise(made)] == [12 + texts + 1, 0, texts]


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"adapter.targets": "all-linear"}, r"is trained here \(.*caption_projection.*adapter\.targets"),
        ({"adapter.kind": "full"}, r"is trained here \(caption_projection\.linear_1"),
        ({"data.live": True}, r"data\.project_captions.*unused while data\.live"),
    ],
)
def test_what_would_make_it_wrong_is_refused(options: Options, trained: Options, message: str) -> None:
    plain = {key: value for key, value in options.items() if not key.startswith("adapter.")}
    with pytest.raises(UserError, match=message):
        train(plain | trained, data__project_captions=True)
    assert not Path(options["run.folder"]).exists()


def test_a_projection_that_half_precision_cannot_hold_is_named(tiny: Path) -> None:
    projection = Projection.load(Base.read(tiny))
    with torch.no_grad():
        projection.layer.get_parameter("linear_2.bias").add_(1e5)
    assert projection.of(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"NaN or infinite in torch\.float16; set model\.text_encoder_dtype"):
        projection.of(torch.zeros(2, 32, dtype=torch.float16))


def test_a_dry_run_says_how_much_smaller_and_the_doctor_knows_it(options: Options, tiny: Path) -> None:
    config = configured(options, data__project_captions=True)
    assert any("projected, 64 numbers a token in place of 32" in line for line in dry_run(config))
    assert "projected" not in "".join(dry_run(configured(options)))
    needs = [
        memory.training(Case.of(one, Base.read(tiny), tokens=12, on_gpu=False)).bytes
        for one in (config, configured(options))
    ]
    assert needs[0] == pytest.approx(needs[1], rel=0.05)
