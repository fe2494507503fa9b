"""Text of users. Oracles: the codecs of Python, bytes written by hand, what comes back from a file."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixart_ft import cli
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.reading import load
from pixart_ft.config.text import numbered, read_text
from pixart_ft.data.cache import component_id
from pixart_ft.data.folders import read_folder
from pixart_ft.errors import UserError
from pixart_ft.sampling.command import prompts_of

HALF = "\ud83d"  # the first half of an emoji
NOT_UTF8 = "caf\udce9"  # café in Latin-1, as Python hands on a file name or an argument


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_reads_the_same_however_an_editor_saved_it(tmp_path: Path, mark: str) -> None:
    text, file = "red apple\nañ 漢 🙂\n", tmp_path / "prompts.txt"
    bom = "\ufeff" if mark in ("utf-16-le", "utf-16-be") else ""  # the others write their own
    file.write_bytes((bom + text.replace("\n", "\r\n")).encode(mark))
    assert read_text(file) == text
    assert prompts_of((), file, 1) == ["red apple", "añ 漢 🙂"]
    file.write_bytes(file.read_bytes() + "\ufeffblue\r".encode(mark.removesuffix("-sig")))  # joined by `cat`
    assert read_text(file) == text + "blue\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ntwo\nthr\xe9e\n", "line 3: the bytes e9 are no utf-8 text; save it as UTF-8"),
        (b"\xff\xfeo\0\n\0\x3d\xd8a\0", "line 2: the bytes 3d d8 are no utf-16-le text"),
        ("one\ntwo".encode("utf-16-le"), "line 1: a zero byte"),
    ],
)
def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"prompts.txt {message}"):
        read_text(file)
    with pytest.raises(UserError, match=f"prompts_file: .*prompts.txt {message}"):
        prompts_of((), file, 1)


def test_a_prompt_ends_at_the_end_of_its_line_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028still one\x0cand this\ntwo".encode())
    assert prompts_of((), file, 1) == ["one\u2028still one\x0cand this", "two"]


def test_a_configuration_from_notepad_is_read(tmp_path: Path) -> None:
    file = tmp_path / "draw.yaml"
    file.write_bytes("prompts: [añ]\r\nsteps: 3\r\n".encode("utf-16"))
    config = load(GenerateConfig, file)
    assert (config.prompts, config.steps) == (("añ",), 3)


def test_text_that_no_encoding_holds_is_refused_by_its_key_with_all_else() -> None:
    values = {"prompts": ["good", HALF], "negative_prompt": NOT_UTF8, HALF: 1, "steps": 0}
    with pytest.raises(UserError) as caught:
        load(GenerateConfig, values, {"out": NOT_UTF8, "device": HALF})
    message = str(caught.value)
    message.encode()  # it can be printed and logged
    for part in ("6 problems", r'prompts[1] is "\ud83d"', r'negative_prompt is "caf\udce9"', "out is", "device is"):
        assert part in message
    assert r"\ud83d: unknown key" in message and "steps is 0" in message and "section of keys" not in message


def test_options_that_are_not_utf8_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["train", "--data.folder", NOT_UTF8, "--resume", HALF, f"--{NOT_UTF8}", "1", "--run.name", HALF])
    error = capsys.readouterr().err
    assert code == 2 and "4 problems" in error
    for part in (
        r'--data.folder is "caf\udce9"',
        r'--resume is "\ud83d"',
        r'--run.name is "\ud83d"',
        r"caf\udce9: unk",
    ):
        assert part in error


def test_a_folder_names_every_row_and_file_that_is_no_text(tmp_path: Path) -> None:
    try:
        for name in ("a.png", "b.png", "c.png", f"{NOT_UTF8}.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses such names")
    rows = [{"file_name": "a.png", "text": "whole"}, {"file_name": "b.png", "text": f"an {HALF}"}]
    rows.append({"file_name": f"{NOT_UTF8}.png", "text": "named so in the file"})
    lines = [*map(json.dumps, rows), "[" * 100_000, '{"file_name": "c.png", "text": ' + "9" * 5000 + "}"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    message = str(caught.value)
    message.encode()
    assert "rows of metadata.jsonl with half a surrogate pair, which is no text (write the whole letter): 2" in message
    assert r"metadata.jsonl line 2: b.png: an \ud83d" in message
    assert "pictures whose file names are not UTF-8 (rename them): 1\n    caf\\udce9.png" in message
    assert "lines that are not a JSON object: 2\n    metadata.jsonl line 4\n    metadata.jsonl line 5" in message


def test_a_file_of_a_model_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    names = []
    for name in ("a.json", f"{NOT_UTF8}.json"):
        try:
            (tmp_path / "vae" / name).write_text("{}")
        except OSError:
            pytest.skip("this file system refuses such names")
        names.append(component_id(tmp_path, "vae", dtype=torch.float32))
    assert names[0] != names[1]


def test_captions_from_notepad_and_an_endless_cell(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("añ 漢\r\n".encode("utf-16"))
    assert [row.caption for row in read_folder(tmp_path)] == ["añ 漢"]
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"never closed' + "x" * 200_000)
    with pytest.raises(
        UserError, match=r"not CSV.*: 1\n    metadata\.csv, the row that begins in line 2: field larger"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_is_printed_fits_any_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    prompts = ["日本のりんご", "café №5 🙂", "plain"]
    assert (
        cli.main(
            ["generate", *(word for text in prompts for word in ("--prompt", text)), "--model", "demo", "--dry-run"]
        )
        == 0
    )
    print("日本")  # as a folder's name in the last lines of a run
    out.flush()
    resolved, last = out.buffer.getvalue().decode(encoding).rsplit("\n", 2)[:2]
    assert last == ("日本" if encoding == "utf-8" else r"\u65e5\u672c")
    (tmp_path / "resolved.yaml").write_text(resolved, encoding=encoding)
    assert load(GenerateConfig, tmp_path / "resolved.yaml").prompts == tuple(prompts)
    assert ("日本" in resolved) == (encoding == "utf-8")


def test_a_count_has_the_noun_of_one_or_of_many() -> None:
    assert [numbered(count, "picture") for count in (0, 1, 2000)] == ["0 pictures", "1 picture", "2,000 pictures"]
    assert [numbered(count, "box", "boxes") for count in ("0.5", "1", 2)] == ["0.5 boxes", "1 box", "2 boxes"]
