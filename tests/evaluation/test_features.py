"""Feature extractors. Oracle: the networks called by hand, on pictures prepared by the formula.

Networks are tiny and random, of the real classes; pictures have the network's size, so that nothing is resized.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from pixart_ft.errors import UserError
from pixart_ft.evaluation.features import Extractor
from tests.helpers.tiny import tiny_tokenizer

SIDE, KEY = 32, "extractor"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = SMALL | {"image_size": SIDE, "patch_size": 16}
READS = SMALL | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0}
PREPARES = {"do_resize": False, "do_center_crop": False, "image_mean": [0.2, 0.4, 0.6], "image_std": [0.5, 0.25, 0.2]}


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**SEES))


def clip() -> PreTrainedModel:
    return CLIPModel(CLIPConfig(text_config=READS, vision_config=SEES, projection_dim=8))


def siglip() -> PreTrainedModel:
    return SiglipModel(SiglipConfig(text_config=READS | {"projection_size": 16}, vision_config=SEES))


KINDS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "dinov2": (dinov2, "BitImageProcessor"),
    "clip": (clip, "CLIPImageProcessor"),
    "siglip": (siglip, "SiglipImageProcessor"),
}


def written(folder: Path, network: PreTrainedModel, processor: str) -> Path:
    network.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor} | PREPARES))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("extractors")
    return {name: written(root / name, build(), processor) for name, (build, processor) in KINDS.items()}


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(256, size=(count, SIDE, SIDE, 3)).astype(np.uint8)
    return [Image.fromarray(each) for each in pixels]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_networks_own(folders: dict[str, Path], kind: str) -> None:
    extractor = Extractor.load(str(folders[kind]), KEY)
    some = pictures(5)
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in some]).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor([0.2, 0.4, 0.6])[:, None, None]) / torch.tensor([0.5, 0.25, 0.2])[:, None, None]
    network = type(KINDS[kind][0]()).from_pretrained(str(folders[kind])).eval()
    with torch.no_grad():
        if kind == "dinov2":
            wanted = network(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            wanted = network.vision_model(pixel_values=pixels).pooler_output
            wanted = network.visual_projection(wanted) if kind == "clip" else wanted
    found = extractor.of_pictures(some, batch_size=2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-5)


def test_one_without_a_text_half_reads_no_captions(folders: dict[str, Path]) -> None:
    extractor = Extractor.load(str(folders["dinov2"]), KEY)
    with pytest.raises(UserError, match="reads no captions; for those take one of CLIP's kind"):
        extractor.of_captions(["a red circle"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dinov2"])
def test_features_of_captions_are_the_networks_own(folders: dict[str, Path], kind: str) -> None:
    extractor = Extractor.load(str(folders[kind]), KEY)
    network = type(KINDS[kind][0]()).from_pretrained(str(folders[kind])).eval()
    width = extractor.of_pictures(pictures(1)).shape[1]
    texts = ["a red circle", "blue", "a photo of the green square, cut where the network stops to read " * 3]
    found = extractor.of_captions(texts, batch_size=3)
    assert found.shape == (3, width)
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text, truncation=True, max_length=16).input_ids for text in texts]
    for text, row in zip(
        ids[1:] if kind == "clip" else ids[2:], found[1:] if kind == "clip" else found[2:], strict=True
    ):
        with torch.no_grad():  # alone, so without padding
            alone = network.get_text_features(input_ids=torch.tensor([text])).pooler_output[0]
        torch.testing.assert_close(row, alone.double(), rtol=1e-4, atol=1e-5)


def test_pictures_of_other_sizes_are_prepared_as_the_folder_says(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["clip"], tmp_path / "resizes")
    says = PREPARES | {"do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"} | says))
    extractor = Extractor.load(str(folder), KEY)
    small = pictures(1)[0]
    doubled = small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    torch.testing.assert_close(extractor.of_pictures([doubled]), extractor.of_pictures([small]), rtol=1e-4, atol=1e-5)


def test_the_digest_tells_weights_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    digest = Extractor.load(str(folders["dinov2"]), KEY).digest
    copy = shutil.copytree(folders["dinov2"], tmp_path / "copy")
    assert Extractor.load(str(copy), KEY).digest == digest
    weights = load_file(copy / "model.safetensors")
    weights["layernorm.bias"][3] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert Extractor.load(str(copy), KEY).digest != digest


def test_what_is_no_extractor_is_said(folders: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extractor: no/such/place is no folder, and no Hub id; expected a model of"):
        Extractor.load("no/such/place", KEY)
    with pytest.raises(UserError, match=r"extractor: .* cannot be taken as a feature extractor: .*; expected a model"):
        Extractor.load(str(tiny), KEY)
    torch.manual_seed(0)
    headless = written(tmp_path / "vit", ViTModel(ViTConfig(**SEES), add_pooling_layer=False), "ViTImageProcessor")
    with pytest.raises(UserError, match=r"has no weights for pooler\.dense\.bias; expected a model"):
        Extractor.load(str(headless), KEY)
    with pytest.raises(UserError, match="there is no picture to take features of"):
        Extractor.load(str(folders["clip"]), KEY).of_pictures([])
    broken = shutil.copytree(folders["dinov2"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: each * float("nan") for name, each in weights.items()}, broken / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="gives features that are no numbers"):
        Extractor.load(str(broken), KEY).of_pictures(pictures(2))
