"""From a run to the Hub and back. Oracles: a Hub on this machine, asked by the real huggingface_hub, and pixels."""

import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from pixart_ft.cli import main
from pixart_ft.config import yaml_text
from pixart_ft.config.push import PushConfig
from pixart_ft.config.train import load_config
from pixart_ft.errors import UserError
from pixart_ft.runs.hub import without_secrets
from pixart_ft.sampling.text_to_image import TextToImage
from pixart_ft.sharing.push import pack
from pixart_ft.training.places import check_training
from pixart_ft.training.report import publish
from tests.helpers.adapters import make_adapter
from tests.helpers.hub import NAME, TOKEN, Hub, Repository, reachable
from tests.helpers.runs import command, short_run, train

ROOT = Path(__file__).parents[2]
BASE = "owner/base"
PROMPT = "a red circle"


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    """It has the tiny base already."""
    with reachable(tmp_path / "hub-cache") as server:
        yield server.add(BASE, tiny)


def options_of(kind: str, pictures: Path, work: Path) -> dict[str, Any]:
    """Of a run of two steps."""
    options = short_run(Path(BASE), pictures, work / "run", work / "cache")
    options |= {"train.steps": 2, "train.batch_size": 2, "optim.warmup_steps": 0, "data.held_out_fraction": 0.2}
    options |= {"validation.every": 0, "validation.timesteps": 1, "validation.steps": 1, "train.checkpoint_every": 0}
    if kind == "full":
        options = {key: value for key, value in options.items() if not key.startswith("adapter.")}
        options |= {"adapter.kind": "full", "diffusion.objective": "simple", "validation.prompts": []}
    return options


def trained(kind: str, tiny: Path, pictures: Path, work: Path) -> Path:
    with reachable(work / "hub-cache") as server:
        server.add(BASE, tiny)
        return train(options_of(kind, pictures, work))


@pytest.fixture(scope="module")
def finished(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a LoRA of the Hub's base (read only)."""
    return trained("lora", tiny, pictures, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished_model(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that trained the whole network (read only)."""
    return trained("full", tiny, pictures, tmp_path_factory.mktemp("finished_model"))


def drawn(out: Path, *arguments: str) -> bytes:
    """The pixels that `generate` draws."""
    given = ["--prompt", PROMPT, "--steps", "2", "--device", "cpu", "--out", str(out)]
    assert main(["generate", *arguments, *given]) == 0
    (path,) = out.glob("000-*.png")
    return Image.open(path).tobytes()


def push(run: Path | str, *arguments: str) -> int:
    return main(["push", str(run), "--repo", NAME, *arguments])


@pytest.mark.parametrize(("run", "option"), [("finished", "--lora"), ("finished_model", "--model")])
def test_round_trip(run: str, option: str, hub: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Train, push, delete everything here, draw by the Hub id: the same pixels, and again without the Hub."""
    here = Path(shutil.copytree(request.getfixturevalue(run), tmp_path / "here"))
    expected = drawn(tmp_path / "before", option, str(here))
    assert push(here) == 0
    shutil.rmtree(here)
    shutil.rmtree(tmp_path / "hub-cache")
    assert drawn(tmp_path / "after", option, f"{NAME}@step-000002") == expected
    asked = len(hub.lines)
    with pytest.MonkeyPatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert drawn(tmp_path / "offline", option, f"{NAME}@step-000002") == expected
    assert len(hub.lines) == asked


@pytest.mark.parametrize(("run", "kind"), [("finished", "lora"), ("finished_model", "full")])
def test_a_training_may_start_from_the_hub(
    run: str, kind: str, hub: Hub, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert push(request.getfixturevalue(run)) == 0
    given = {"data.folder": str(pictures), "run.folder": str(tmp_path / "run"), "model.base": BASE}
    source = check_training(load_config({}, given | {"adapter.kind": kind}), init_from=NAME)
    assert source is not None and source.name == NAME and source.metadata.step == 2


def test_what_goes_up_and_what_does_not(hub: Hub, finished: Path) -> None:
    assert push(finished, "--license", "mit", "--tags", "[flat, shapes]", "--trigger-words", "zwx") == 0
    files = hub.models[NAME].files
    final = finished / "final" / "adapter"
    for path in final.iterdir():
        assert files[path.name] == path.read_bytes()
    everything = b"\n".join([*files.values(), *(name.encode() for name in files)])
    for secret in (str(finished.parent), str(Path.home()), TOKEN, PROMPT, "red-circle"):
        assert secret.encode() not in everything, secret
    (sample,) = (finished / "samples" / "step-000002").glob("*.png")
    shown = Image.open(io.BytesIO(files["samples/00-seed0.png"]))
    assert shown.tobytes() == Image.open(sample).convert("RGB").tobytes()
    assert not getattr(shown, "text", {})
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["license"], data["base_model"], data["instance_prompt"]) == ("mit", BASE, "zwx")
    assert {"pixart-sigma", "lora", "flat", "shapes"} <= set(data["tags"])
    assert data["widget"] == [{"text": "-", "output": {"url": "samples/00-seed0.png"}}]


def test_the_card_has_the_facts_of_the_run(hub: Hub, finished: Path) -> None:
    assert push(finished, "--show-prompts") == 0
    card = hub.models[NAME].files["README.md"].decode()
    assert ModelCard(card).data.to_dict()["widget"][0]["text"] == PROMPT  # asked for
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    losses = [record["held_out"]["loss"] for record in records if "held_out" in record]
    first, last = (f"{loss['mean']:.4f} ± {loss['standard_error']:.4f}" for loss in (losses[0], losses[-1]))
    assert f"| loss | {first} | {last} |" in card
    for row in ("| learned variance | trained", "| rank, alpha | 4, 8 |", "| steps | 2; pictures seen: 4 |"):
        assert row in card
    assert "| pictures | 10 |" in card and "| pictures held out | 2 |" in card and "| size | 64 pixels |" in card
    assert "learning_rate 0.01" in card and "| seed | 0 |" in card


def test_the_settings_train_again_with_other_pictures(finished: Path) -> None:
    file = pack(PushConfig(run=str(finished), repo=NAME)).files["config.yaml"]
    assert isinstance(file, bytes)
    again = load_config(yaml_text.parse(file.decode()), {"data.folder": "elsewhere"})
    known = load_config(finished / "config.yaml")
    assert again.model == known.model and again.optim == known.optim and again.adapter == known.adapter
    assert again.validation.prompts == () != known.validation.prompts


@pytest.mark.parametrize("run", ["finished", "finished_model"])
def test_the_code_of_a_card_runs(
    run: str, hub: Hub, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock pipeline then has the network that this package draws with, and ComfyUI its file."""
    monkeypatch.chdir(tmp_path)
    assert push(request.getfixturevalue(run)) == 0
    card = hub.models[NAME].files["README.md"].decode()
    draw, export = re.findall(r"```bash\n(?:pixart-ft )(.+?)\n```", card)
    assert main([*shlex.split(draw), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert main(shlex.split(export)) == 0
    (file,) = tmp_path.glob("name_comfy/*.safetensors" if run == "finished" else "name_comfy/*_original.safetensors")
    assert any("blocks.0.attn.qkv" in key for key in load_file(file))
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.+?)\n```", card, flags=re.S):
        # the stock pipeline looks its sizes up in a table, and has none for a base as small as this one
        block = block.replace(
            'pipeline("a red apple")', 'pipeline("a red apple", use_resolution_binning=False, num_inference_steps=1)'
        )
        exec(block, found)
    ours, stock = found["model"].transformer, found["pipeline"].transformer
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 32)))
    with torch.no_grad():
        a, b = (net(x, timestep=torch.tensor([500]), encoder_hidden_states=text)[0] for net in (ours, stock))
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


REFUSED = [  # the request, the answer, what is said
    ("POST /api/repos/create", 401, "does not know who asks (401)"),
    ("POST /api/repos/create", 403, "your token may not do this (403)"),
    ("POST /api/models/owner/name/commit", 404, "has no such model (404)"),
    ("POST /api/models/owner/name/commit", 409, "being changed by somebody else (409)"),
    ("POST /api/models/owner/name/commit", 500, "does not work at the moment (500)"),
    ("POST /api/models/owner/name/tag", 503, "does not work at the moment (503)"),
    ("PUT /large", 0, "cannot be reached"),
]


@pytest.mark.parametrize(("request_line", "status", "said"), REFUSED)
def test_a_push_that_is_refused_goes_on_later(
    request_line: str, status: int, said: str, hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail(request_line, status)
    assert push(finished) == 2
    error = capsys.readouterr().err
    assert said in error and "the same command goes on" in error
    assert "Traceback" not in error and TOKEN not in error
    hub.heal()
    assert push(finished) == 0
    model = hub.models[NAME]
    assert "adapter_model.safetensors" in model.files and model.tags == {"step-000002": model.branches["main"]}


@pytest.mark.parametrize("request_line", ["create", "preupload", "objects/batch", "PUT", "/commit", "/tag", "/refs"])
@pytest.mark.parametrize("status", [0, 500])
def test_what_passes_is_tried_again(request_line: str, status: int, hub: Hub, finished: Path) -> None:
    hub.fail(request_line, status, times=2)
    assert push(finished) == 0
    assert "step-000002" in hub.models[NAME].tags


def test_what_was_uploaded_is_not_uploaded_again(hub: Hub, finished: Path) -> None:
    hub.fail("POST /api/models/owner/name/commit", 500)
    assert push(finished) == 2
    assert hub.models[NAME].files == {} != hub.large
    hub.heal()
    hub.lines.clear()
    assert push(finished) == 0
    assert not [line for line in hub.lines if line.startswith("PUT")]
    commits = len(hub.models[NAME].commits)
    assert push(finished) == 0  # and once more changes nothing
    assert len(hub.models[NAME].commits) == commits


@pytest.mark.parametrize("repo", ["name", "a/b/c", "ow ner/name", "owner/na..me", "owner/-name", "owner/" + "n" * 97])
def test_an_illegal_name_is_refused(repo: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(finished), "--repo", repo]) == 2
    assert "expected owner/name" in capsys.readouterr().err


def test_a_push_needs_a_token_and_the_hub(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reachable(tmp_path, token=None) as hub:
        assert push(finished) == 2
        assert "pushing needs a token that may write to owner; log in" in capsys.readouterr().err
        assert not hub.lines
    assert push(finished) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_dry_run_shows_all_and_asks_nobody(hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(finished, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"repository  {NAME}, main, tag step-000002\n")
    assert f"{(finished / 'final/adapter/adapter_model.safetensors').stat().st_size:,}  adapter_model" in shown
    assert f"# {NAME.partition('/')[2]}\n" in shown
    assert not hub.lines


def test_a_private_repository_is_private_or_nothing_is_pushed(
    hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models[NAME] = Repository()
    assert push(finished, "--private") == 2
    assert "is there already, for all to see" in capsys.readouterr().err
    assert hub.models[NAME].files == {}
    del hub.models[NAME]
    assert push(finished, "--private") == 0
    assert hub.models[NAME].private
    assert push(finished, "--private") == 0


def test_wrong_metadata_of_the_card_is_told(hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(finished, "--license", "nonsense") == 2
    assert "license" in capsys.readouterr().err
    assert hub.models[NAME].files == {}


def test_another_kind_of_result_is_not_put_on_top(
    hub: Hub, finished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, tiny)
    assert push(finished) == 2
    assert f"repo: {NAME} holds a whole model, and this is an adapter" in capsys.readouterr().err


def test_a_tag_stays_where_it_is(hub: Hub, finished: Path, tmp_path: Path, tiny: Path) -> None:
    assert push(finished) == 0
    first = dict(hub.models[NAME].tags)
    hub.models[NAME].commit("main", hub.models[NAME].files | {"samples/99-seed0.png": b""})
    other = make_adapter(tiny, tmp_path / "other", step=2)
    with pytest.warns(UserWarning, match="has the tag step-000002 already"):
        assert push(other, "--base", BASE) == 0
    assert hub.models[NAME].tags == first
    assert not [name for name in hub.models[NAME].files if name.startswith("samples/")]  # they were another result's


def test_it_goes_to_the_branch_asked_for(hub: Hub, finished: Path, tmp_path: Path) -> None:
    assert push(finished, "--revision", "trial") == 0
    model = hub.models[NAME]
    assert model.files == {} and "README.md" in model.commits[model.branches["trial"]]
    assert drawn(tmp_path / "out", "--lora", f"{NAME}@trial")


def test_the_base_may_be_a_folder(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", step=3)
    with pytest.warns(UserWarning, match=r"its base is a folder of this machine .*--base owner/name"):
        assert push(adapter) == 0
    files = hub.models[NAME].files
    assert str(tiny).encode() not in b"".join(files.values())
    assert f"--lora {NAME} --model FOLDER_OF_THE_BASE" in files["README.md"].decode()
    here = drawn(tmp_path / "here", "--lora", str(adapter))
    assert drawn(tmp_path / "there", "--lora", NAME, "--model", str(tiny)) == here
    assert push(adapter, "--base", BASE) == 0
    assert drawn(tmp_path / "then", "--lora", NAME) == here
    with pytest.raises(UserError, match=r"base is 'x'; expected a Hub id"):
        pack(PushConfig(run=str(adapter), repo=NAME, base="x"))
    (adapter / "null_caption.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"null_caption\.safetensors has 7 bytes instead of"):
        pack(PushConfig(run=str(adapter), repo=NAME))


# At the end of a run


def test_a_run_ends_on_the_hub(hub: Hub, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("lora", pictures, tmp_path) | {"train.steps": 1, "hub.repo": NAME, "hub.license": "mit"}
    hub.fail("POST /api/repos/create", 403)
    with pytest.warns(UserWarning) as warned:
        assert main(["train", *command(options)]) == 0
    (said,) = (str(one.message) for one in warned if "hub.repo" in str(one.message))
    assert "your token may not do this (403)" in said
    hub.heal()
    later = said.partition("push it later: ")[2].split()
    assert later[-4:] == ["push", str(tmp_path / "run"), "--repo", NAME]
    publish(tmp_path / "run", load_config({}, {"data.folder": "x", "hub.repo": NAME, "hub.license": "mit"}).hub)
    assert b"license: mit" in hub.models[NAME].files["README.md"]
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err + said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_what_would_stand_in_the_way_of_a_push_is_told_before_a_run(pictures: Path, tmp_path: Path) -> None:
    options = options_of("lora", pictures, tmp_path) | {"model.base": "demo", "hub.base": BASE}
    with reachable(tmp_path / "cache", token=None), pytest.raises(UserError) as raised:
        train(options, hub__repo=NAME)
    assert "hub.repo: pushing needs a token" in str(raised.value)
    assert "hub.base is for a base that is a folder, and demo is known everywhere" in str(raised.value)
    with pytest.raises(UserError, match=r"hub\.license is \"mit\", unused while hub\.repo is null"):
        load_config({}, {"data.folder": "x", "hub.license": "mit"})
    assert not (tmp_path / "run").exists()


# Loading by id


def test_another_programs_adapter_is_had_from_the_hub(hub: Hub, finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", "kohya", "--out", str(tmp_path / "kohya")]) == 0
    hub.add("me/theirs", tmp_path / "kohya")
    with pytest.warns(UserWarning, match=r"^me/theirs is another program's adapter \(kohya names\)"):
        there = TextToImage.load(BASE, lora="me/theirs")
    assert there.adapters[0].path == "me/theirs"
    generator, ours = torch.Generator().manual_seed(0), TextToImage.load(BASE, lora=finished)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 32)))
    with torch.no_grad():
        a, b = (
            one.transformer(x, timestep=torch.tensor([500]), encoder_hidden_states=text)[0] for one in (ours, there)
        )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/nothing", "has no such model (404)"),
        (f"{NAME}@nowhere", "has no such revision"),
        ("owner/base", "is neither an adapter folder nor a run folder"),
        ("owner/na..me", "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_is_not_on_the_hub_is_told(
    name: str, said: str, hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished) == 0
    hub.lines.clear()
    assert main(["generate", "--lora", name, "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and TOKEN not in error
    assert not (tmp_path / "out").exists()
    assert not [line for line in hub.lines if "/resolve/" in line and "safetensors" in line]


@pytest.mark.parametrize(
    ("status", "said"), [(401, "(401)"), (403, "(403)"), (404, "(404)"), (500, "(500)"), (0, "cannot be reached")]
)
@pytest.mark.parametrize("option", ["--lora", "--model"])
def test_a_hub_that_refuses_is_told_in_one_message(
    option: str, status: int, said: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("", status)
    assert main(["generate", option, NAME, "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and TOKEN not in error


def test_a_private_model_asks_for_the_token(
    hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push(finished, "--private") == 0
    monkeypatch.delenv("HF_TOKEN")
    assert main(["generate", "--lora", NAME, "--prompt", "a"]) == 2
    assert "log in with `hf auth login`" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert drawn(tmp_path / "out", "--lora", NAME)


def test_a_folder_of_the_same_spelling_wins(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_adapter(tiny, Path(NAME))
    assert drawn(tmp_path / "out", "--lora", NAME)
    assert main(["generate", "--lora", "owner/nmae", "--prompt", "a"]) == 2
    assert "there is no owner/nmae; did you mean owner/name?" in capsys.readouterr().err
    assert not hub.lines


def test_in_python_too(hub: Hub, finished: Path) -> None:
    assert push(finished) == 0
    model = TextToImage.load(BASE, lora=NAME)
    assert [one.path for one in model.adapters] == [NAME]
    both = TextToImage.load(BASE, lora=[finished, f"{NAME}@step-000002"], lora_scale=[0.5, 0.25])
    assert [(one.scale, one.sha256) for one in both.adapters] == [(s, model.adapters[0].sha256) for s in (0.5, 0.25)]
    with pytest.raises(UserError, match=r"model\.base names the revision 'a'; give one"):
        TextToImage.load(f"{BASE}@a", revision="b")


def test_a_pushed_model_says_what_it_is(hub: Hub, finished_model: Path) -> None:
    """Its null caption, its variance and its schedule come along, not the base's."""
    assert push(finished_model) == 0
    here, there = TextToImage.load(finished_model), TextToImage.load(NAME)
    assert there.abilities.variance == "stale" and there.base.name == NAME
    assert torch.equal(here.text.known[""], there.text.known[""])
    assert here.fingerprint == there.fingerprint


# Tokens


@pytest.mark.parametrize("token", ["hf_" + "Ab3" * 10, "hf_" + "Ab3" * 10 + " x", "hf_" + "Ab3" * 10 + "é"])
def test_no_error_shows_a_token(
    token: str, hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the Hub does not know, and ones that no header may hold."""
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(finished) == 2
    assert main(["push", str(finished), "--repo", f"https://{token.split()[0]}@huggingface.co/owner/name"]) == 2
    assert "Ab3Ab3" not in capsys.readouterr().err
    assert without_secrets(f"Bearer {TOKEN}") == "***"


def test_the_blocks_of_the_guide_run(hub: Hub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/hub.md, in their order, with this base and this step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my_dog").symlink_to(finished)
    blocks = re.findall(r"```python\n(.+?)\n```", (ROOT / "docs" / "hub.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", BASE).replace("step-000500", "step-000002"), found)
    assert "me/my_dog" in hub.models and found["model"].adapters[0].path == "me/my_dog@step-000002"
