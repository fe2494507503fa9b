"""Metrics of pictures in the command. Oracle: the metrics of the features of the very files that were drawn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from pixart_ft.config.evaluate import LIKENESS, EvaluateConfig
from pixart_ft.config.reading import load
from pixart_ft.data.folders import survey
from pixart_ft.errors import UserError
from pixart_ft.evaluation.command import run_evaluation
from pixart_ft.evaluation.contestants import look
from pixart_ft.evaluation.features import Extractor
from pixart_ft.evaluation.held_out import mean_over_pictures
from pixart_ft.evaluation.likeness import Sight
from pixart_ft.evaluation.metrics import caption_similarity, frechet_distance, memorisation, prdc
from tests.helpers.tiny import build_picture_folder, tiny_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = SMALL | {"image_size": 32, "patch_size": 16}
READS = SMALL | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likeness") / "clip"
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=READS, vision_config=SEES, projection_dim=4)).save_pretrained(str(folder))
    prepared = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def config(tiny: Path, data: Path, clip: Path, out: Path, **changes: Any) -> EvaluateConfig:
    words = {
        "model": str(tiny),
        "data": str(data),
        "features": str(clip),
        "train_data": str(data),
        "metrics": list(LIKENESS),
        "steps": [1, 2],
        "device": "cpu",
        "out": str(out),
    }
    return load(EvaluateConfig, {key: value for key, value in (words | changes).items() if value is not None})


def test_every_number_is_the_metric_of_the_pictures_on_the_disk(
    tiny: Path, pictures: Path, clip: Path, tmp_path: Path
) -> None:
    training = build_picture_folder(tmp_path / "training", 15)
    asked = config(tiny, pictures, clip, tmp_path / "out", train_data=str(training), images_per_prompt=2)
    found = run_evaluation(asked)
    likeness, extractor = found["likeness"], Extractor.load(str(clip), "features")
    assert likeness["features"] == {
        "name": str(clip), "digest": extractor.digest, "numbers": 4, "real": 12, "training": 15
    }  # fmt: skip
    assert [(way["steps"], way["calls"]) for way in found["samples"]["models"][0]["ways"]] == [(1, 1), (2, 2)]
    rows, learned = survey(pictures).usable(), survey(training).usable()
    files = [tmp_path / "out" / name for name in found["samples"]["models"][0]["ways"][1]["pictures"]]
    seen = extractor.of_pictures([Image.open(file) for file in files])
    real, trained = (extractor.of_pictures([row.opened().picture for row in some]) for some in (rows, learned))
    near = memorisation(seen, trained, real, 2)
    expected = {
        "fd": frechet_distance(seen, real, 2),
        **prdc(seen, real, 2),
        **caption_similarity(seen, extractor.of_captions([row.caption for row in rows]), torch.arange(24) // 2, 2),
        "nearer_to_training": near.share,
    }
    way = likeness["ways"]["ddim, 2 steps"]
    for name, values in expected.items():
        (row,) = way["metrics"][name]
        assert row["mean"] == pytest.approx(values.mean().item(), rel=1e-6, abs=1e-9), name
        error = mean_over_pictures(values).standard_error
        assert row["standard_error"] == pytest.approx(error, rel=1e-6, abs=1e-9), name
    assert way["neighbours"]["base"]["training"] == near.training.tolist()
    page = (tmp_path / "out" / "report.html").read_text()
    assert str(clip) in page and extractor.digest in page and "nearest neighbours of base" in page


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"pictures": 3},
            ["fd by", "(4 features) needs 6 pictures", "there are 3 drawn and 3 held out", "prdc by", "needs 12"],
        ),
        ({"train_data": "few", "metrics": "memorisation"}, ["needs 4 pictures, and there are 3 trained on;"]),
        ({"features": "nowhere/at all"}, ["features: nowhere/at all is no folder, and no Hub id"]),
        ({"features": None, "train_data": None}, ["give --features", "give --train-data"]),
        ({"train_data": "no"}, ["the picture folder no does not exist"]),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_drawn(
    tiny: Path,
    pictures: Path,
    clip: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    build_picture_folder(tmp_path / "few", 3)
    build_picture_folder(tmp_path / "learned", 12)
    with pytest.raises(UserError) as error:
        run_evaluation(config(tiny, pictures, clip, tmp_path / "out", **{"train_data": "learned", **changes}))
    for message in messages:
        assert re.search(re.escape(message), str(error.value)), message
    assert not (tmp_path / "out").exists()


def test_the_demo_is_seen_by_its_own_extractor_and_has_no_fit_to_prompts(tmp_path: Path) -> None:
    asked = load(EvaluateConfig, {"model": "demo", "metrics": list(LIKENESS), "device": "cpu", "out": str(tmp_path)})
    contest = look(asked, [], None)
    assert contest.features == "demo" and len(contest.training) == 240
    with pytest.raises(UserError, match="demo reads no captions; for those take one of CLIP's kind"):
        Sight.of(asked, contest, torch.device("cpu"))
    sight = Sight.of(asked.model_copy(update={"metrics": ("fd",)}), contest, torch.device("cpu"))
    assert sight is not None and sight.real.shape == (60, 40)


def test_an_extractor_that_reads_nothing_gives_no_fit_to_prompts(
    tiny: Path, pictures: Path, clip: Path, tmp_path: Path
) -> None:
    ViTModel(ViTConfig(**SEES)).save_pretrained(str(tmp_path / "vit"))
    (tmp_path / "vit" / "preprocessor_config.json").write_text((clip / "preprocessor_config.json").read_text())
    with pytest.raises(UserError, match="reads no captions"):
        run_evaluation(
            config(
                tiny, pictures, clip, tmp_path / "out", features=str(tmp_path / "vit"), metrics="clip", train_data=None
            )
        )
