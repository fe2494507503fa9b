"""The keys of a source of pictures. Oracle: the messages, and a configuration written and read back."""

from pathlib import Path

import pytest

from pixart_ft.config.reading import to_yaml
from pixart_ft.config.train import load_config
from pixart_ft.errors import UserError

SOURCES = """
data:
  sources:
    - {folder: ~/a, repeats: 2, background: "#102030"}
    - {parquet: [a.parquet, b/*.parquet], image: jpg, caption: [short, long], caption_weights: [1, 3]}
    - {webdataset: shards, caption: txt, use: prior}
    - {dataset: owner/name, subset: small, split: test, revision: abc, use: held_out}
  prior_weight: 0.5
"""


def test_sources_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SOURCES)
    config = load_config(tmp_path / "a.yaml")
    assert [source.kind for source in config.data.sources] == ["folder", "parquet", "webdataset", "dataset"]
    assert config.data.sources[0].folder == str(Path.home() / "a") and config.data.sources[2].caption == ("txt",)
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "b.yaml") == config
    for typed in ("[{folder: x}]", "{folder: x}"):
        assert load_config({}, {"data.sources": typed}).data.every_source().keys() == {"data.sources[0]"}


def test_the_short_forms_are_sources() -> None:
    data = {"folder": "a", "mask": "alpha", "held_out": "b", "prior": "c", "sources": [{"folder": "d"}]}
    every = load_config({"data": data}).data.every_source().items()
    assert {key: (source.folder, source.use, source.mask) for key, source in every} == {
        "data.folder": ("a", "train", "alpha"),
        "data.held_out": ("b", "held_out", None),
        "data.prior": ("c", "prior", None),
        "data.sources[0]": ("d", "train", None),
    }
    with pytest.raises(UserError, match=r'data\.mask is "alpha", unused while data\.folder is null'):
        load_config({"data": {"mask": "alpha", "sources": [{"folder": "d"}]}})


def test_all_mistakes_of_the_sources_are_told_at_once() -> None:
    wrong = [
        {"folder": "a", "dataset": "b"},
        {"captoin": "text", "folder": "a"},
        {"parquet": "a", "split": "test", "repeats": 3, "weight": 1.0},
        {"folder": "a", "use": "test", "image": 3},
        {"folder": "a", "caption": ["x", "y"], "caption_weights": [1], "background": "whit"},
        {"webdataset": "a", "use": "held_out", "repeats": 2},
        {},
    ]
    with pytest.raises(UserError) as caught:
        load_config({"data": {"folder": "x", "sources": wrong}, "optim": {"lr": 1}})
    assert sorted(str(caught.value).split("\n  - ")[1:]) == [
        "data.sources[0]: it names folder and dataset; give one of folder, dataset, parquet, webdataset",
        "data.sources[1].captoin: unknown key; did you mean caption?",
        "data.sources[2]: split is for dataset alone; leave it out; repeats and weight both say how often it is shown; "
        "give one",
        "data.sources[3].image is 3; expected text (not empty) or null",
        'data.sources[3].use is "test"; expected train | held_out | prior',
        "data.sources[4]: 1 caption_weights for 2 columns of caption; "
        'background is "whit"; expected a colour such as white or "#808080"',
        "data.sources[5]: what is held out is measured once; leave repeats and weight out",
        "data.sources[6]: it names no place; give one of folder, dataset, parquet, webdataset",
        "optim.lr: unknown key; did you mean optim.learning_rate?",
    ]
    weighed = {"data": {"folder": "x", "sources": [{"folder": "a", "weight": 1}]}}
    with pytest.raises(UserError, match="of one use some have a weight and others none"):
        load_config(weighed)
    with pytest.raises(UserError, match=r"data\.held_out_fraction is 0\.1, unused while one of data\.sources is held"):
        load_config(
            {"data": {"folder": "x", "sources": [{"folder": "a", "use": "held_out"}], "held_out_fraction": 0.1}}
        )
    with pytest.raises(UserError, match=r"data\.folder is required: .*; or data\.sources with some to train on"):
        load_config({"data": {"sources": [{"folder": "a", "use": "prior"}]}})
    measured = {"folder": "x", "sources": [{"folder": "a", "use": "held_out"}]}
    assert load_config({"data": measured, "validation": {"report": True}}).validation.report
