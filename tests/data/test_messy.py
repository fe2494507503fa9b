"""A folder with everything wrong that was seen in folders of others: all of it is named, and the rest is trained on.

Oracle: the list of what was put there.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixart_ft.config.reading import load
from pixart_ft.config.train import TrainConfig
from pixart_ft.data.folders import read_folder, survey
from pixart_ft.data.seen import look_at
from pixart_ft.errors import UserError
from pixart_ft.training.encode import read_pictures, warn_of_copies
from pixart_ft.training.start import dry_run
from tests.helpers.pictures import wide_profile
from tests.helpers.runs import train

GOOD = ["a photo.jfif", "deep/a.png", "deep/far/a.png", "linked/b.png", "long.png", "moving.gif", "no_end", "wide.png"]


def picture(path: Path, colour: str = "red", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new("RGB", (64, 64), colour)
    made.paste("blue", (0, 0, 32, 32))
    made.save(path, **{"format": "JPEG" if path.suffix in ("", ".jfif") else None, **options})
    return path


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Eight pictures that can be used (`GOOD`) and eight that cannot."""
    folder, elsewhere = tmp_path / "messy", tmp_path / "elsewhere"
    for index, name in enumerate(GOOD):
        if not name.startswith("linked"):
            picture(folder / name, f"rgb({40 + 20 * index}, 0, 0)")
            (folder / name).with_suffix(".txt").write_text("ein Bär, 熊 🐻", encoding="utf-8")
    picture(folder / "wide.png", "green", icc_profile=wide_profile())
    (folder / "long.txt").write_text("a cat and " * 2000)
    picture(elsewhere / "b.png", "pink").with_suffix(".txt").write_text("b")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)  # round and round
    (folder / "same").symlink_to(folder / "deep")
    # what cannot be used
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    picture(folder / "phone.png").rename(folder / "phone.heic")
    for name in ("alone.png", "upper.png", "another.png", "blank.png"):
        picture(folder / name)
    (folder / "upper.TXT").write_text("captioned, nearly")
    (folder / "another.caption").write_text("captioned, nearly")
    (folder / "blank.txt").write_text(" \n")
    for name in ("cut.png", "none.jpg"):
        picture(folder / name).with_suffix(".txt").write_text("a")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-60])
    (folder / "none.jpg").write_bytes(b"no picture")
    # neither picture nor caption
    (folder / "LICENSE.txt").write_text("free")
    (folder / "notes.pdf").write_text("not looked at")
    return folder


LEFT = {
    "links that lead nowhere (mend or delete them)": ["gone.png -> "],
    "pictures of a type that is not read (convert to PNG, or move them out)": ["phone.heic"],
    "pictures without a caption (give each a .txt beside it, or a row in metadata.jsonl)": [
        "alone.png",
        "another.png",
        "blank.png",
        "upper.png",
    ],
    "captions by another name (rename them)": ["another.caption -> another.txt", "upper.TXT -> upper.txt"],
}


@pytest.mark.filterwarnings("ignore:  text files without a picture")
def test_everything_wrong_is_named_and_counts_reconcile(messy: Path) -> None:
    account = survey(messy)
    assert [row.name for row in account.rows] == sorted([*GOOD, "cut.png", "none.jpg"])
    assert {kind: len(names) for kind, names in account.wrong.items()} == {kind: len(n) for kind, n in LEFT.items()}
    for kind, names in LEFT.items():
        assert all(found.startswith(name) for found, name in zip(account.wrong[kind], names, strict=True))
    assert account.pictures == len(account.rows) + 6
    with pytest.raises(UserError, match=r"cannot be used as it is:[^$]*--data.strict false") as caught:
        read_folder(messy)
    assert all(name in str(caught.value) for names in LEFT.values() for name in names)
    unread = {row: one for row, one in zip(account.rows, look_at(account.rows), strict=True) if isinstance(one, str)}
    assert [row.name for row in unread] == ["cut.png", "none.jpg"]
    rest = account.without(unread)
    assert [row.name for row in rest.rows] == sorted(GOOD) and rest.pictures == len(rest.rows) + 8
    with pytest.raises(UserError, match=r"cannot be read .*: 2\n.*cut.png: .*\n.*none.jpg: .*\n.*--data.strict false"):
        rest.usable()


@pytest.mark.filterwarnings("ignore:  text files without a picture", "ignore:of the prompts", "ignore:.*tokens")
def test_training_goes_on_with_the_rest_where_it_may(
    messy: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "run.folder": tmp_path / "run",
        "model.base": tiny,
        "data.folder": messy,
        "data.held_out_fraction": 0.4,
        "data.resolution": 64,
        "data.cache": tmp_path / "cache",
        "train.steps": 1,
        "train.batch_size": 2,
        "optim.warmup_steps": 0,
        "train.mixed_precision": "no",
        "validation.pictures": 2,
        "validation.timesteps": 2,
    }
    tree: dict[str, dict[str, object]] = {}
    for key, value in options.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = str(value) if isinstance(value, Path) else value
    names = ("alone.png", "gone.png", "phone.heic", "upper.TXT", "cut.png", "none.jpg")
    with pytest.raises(UserError, match="cannot be used as it is") as refused:
        dry_run(load(TrainConfig, tree, {"data.strict": True}))
    assert all(name in str(refused.value) for name in names)
    with pytest.warns(UserWarning) as caught:
        train(options)
    told = "\n".join(str(warning.message) for warning in caught)
    assert all(name in told for name in names)
    line = "in data.folder     16 pictures: 5 trained on, 2 measured, 1 held out beyond validation.pictures, 8 left out"
    assert f"{line}; 1 caption or text file without a picture\n" in capsys.readouterr().out


def test_nothing_is_said_of_a_folder_without_fault(pictures: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        account = survey(pictures)
        assert account.usable() == account.rows and account.without({}) == account
    assert (account.pictures, account.orphans, account.wrong) == (12, 0, {})


def test_links_are_followed_once_and_by_the_real_name_where_there_is_one(tmp_path: Path) -> None:
    picture(tmp_path / "data/real/a.png").with_suffix(".txt").write_text("a")
    (tmp_path / "data/a_link").symlink_to(tmp_path / "data/real")
    (tmp_path / "data/real/up").symlink_to(tmp_path)
    (tmp_path / "data/real/self.png").symlink_to(tmp_path / "data/real/self.png")
    account = survey(tmp_path / "data")
    assert [row.name for row in account.rows] == ["real/a.png"]
    assert list(account.wrong.values()) == [[f"real/self.png -> {tmp_path / 'data/real/self.png'}"]]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    picture(tmp_path / "locked/b.png")
    whole = Path.iterdir

    def refused(self: Path) -> object:
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", refused)  # a test may run as root, who may read all
    with pytest.raises(UserError, match=r"folders that cannot be read: 1\n    .*locked: permission denied"):
        read_folder(tmp_path)


# Tables of captions


@pytest.mark.parametrize(("end", "comma"), [("csv", ","), ("tsv", "\t")])
def test_a_quotation_mark_that_is_not_closed_is_found_where_it_is_opened(tmp_path: Path, end: str, comma: str) -> None:
    lines = ["file_name,text", "a.png,red", 'b.png,"a cat', "c.png,blue", 'd.png,"a ""big"" dog"']
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    table = tmp_path / f"metadata.{end}"
    table.write_text("\n".join(lines).replace(",", comma))
    with pytest.raises(UserError, match=rf"not doubled\?\): 1\n    metadata.{end}, the row that begins in line 3:"):
        read_folder(tmp_path)
    table.write_text("\n".join(lines).replace('"a cat', '"a cat"').replace(",", comma))
    assert [row.caption for row in read_folder(tmp_path)] == ["red", "a cat", "blue", 'a "big" dog']


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        (
            "metadata.csv",
            "file_name, text\na.png,a",
            r'text or caption: it has "file_name", " text"; write text instead of',
        ),
        (
            "metadata.csv",
            "File_Name,text\na.png,a",
            r'file_name: it has "File_Name", "text"; write file_name instead of',
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "captions": "a"}', r'write caption instead of "captions"'),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": ["a", "b"]}',
            r"no text \(write one.*\n.*line 1: a.png: \['a', 'b'",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 0}', r"that are no text .*\n.*line 1: a.png: 0"),
        ("split/train/metadata.jsonl", '{"file_name": "a.png", "text": "a"}', r"or give its folder: .*split/train\)"),
        ("a.TXT", "a", r"rename them\): 1\n    a.TXT -> a.txt"),
        ("a.png.txt", "a", r"rename them\): 1\n    a.png.txt -> a.txt"),
        ("a.caption", "a", r"rename them\): 1\n    a.caption -> a.txt"),
        ("00000.tar", "", r"unpack them into files, or give .*\): 1\n    00000.tar"),
        ("train.parquet", "", r"unpack them into files, or give .*\): 1\n    train.parquet"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": ["a", "b"]}',
            r"no text \(write one; or give the folder in data\.sources, with caption: text\): 1",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:  text files without a picture")
def test_a_near_miss_is_pointed_at(tmp_path: Path, name: str, content: str, hint: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=hint):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x.parquet", r"give it in data\.sources: \[\{parquet: .*x\.parquet\}\]"),
        ("x.tar", r"give it in data\.sources: \[\{webdataset: .*x\.tar\}\]"),
        ("x.zip", "unpack it"),
        ("metadata.jsonl", "give the folder: "),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_called_one(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"{name} is a file \(data.folder\); {hint}"):
        read_folder(tmp_path / name)


def test_text_files_that_say_something_else_than_the_metadata_are_told(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "a bee"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"something else than metadata.jsonl, which counts: 1\n    b.txt$"):
        assert [row.caption for row in read_folder(tmp_path)] == ["a", "a bee"]


# Held out


def test_a_copy_of_a_trained_picture_among_the_held_out_is_told(tmp_path: Path) -> None:
    for folder, names in (("train", "ab"), ("held", "cd")):
        for name in names:
            path = picture(tmp_path / folder / f"{name}.png", f"rgb({ord(name)}, 0, 0)")
            path.with_suffix(".txt").write_text(name)
    shutil.copy(tmp_path / "train/a.png", tmp_path / "held/c.png")
    tree = {"data": {"folder": str(tmp_path / "train"), "held_out": str(tmp_path / "held")}}
    pictures = read_pictures(load(TrainConfig, tree))
    digests = [str(hash(row.content())) for row in (*pictures.train, *pictures.held)]
    with pytest.warns(UserWarning, match=r"held-out pictures that are trained on too, .*: 1\n    c.png = a.png"):
        warn_of_copies(pictures.train, pictures.held, digests)
    assert [line.split(maxsplit=2)[2] for line in pictures.facts()] == [
        "2 pictures: 2 trained on",
        "2 pictures: 2 measured",
    ]
