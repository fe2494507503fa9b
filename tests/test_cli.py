"""The command line, in this process and, where the process matters, in another. Oracle: expected output."""

import contextlib
import errno
import io
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixart_ft import __version__, cli
from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.reading import keys
from pixart_ft.config.train import HUB_BASE, PlanConfig, TrainConfig, load_config
from pixart_ft.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that has nothing in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def problems(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of the report of a wrong command line."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    return err.strip().removeprefix("error: ").split("\n  - ")


def understood(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> Any:
    """The configuration that a command line stands for."""
    received: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setitem(cli.COMMANDS, name, replace(cli.COMMANDS[name], run=lambda *given: received.extend(given)))
        assert cli.main([name, *arguments]) == 0
    return received[0]


def test_the_bare_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"pixart-ft {name}" in out for name in ("train", "cache", "doctor", "generate", "evaluate", "push"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train", TrainConfig), ("doctor", PlanConfig), ("generate", GenerateConfig), ("evaluate", EvaluateConfig)],
)
def test_help_shows_every_key(name: str, kind: type[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--optim.nonsense", "3", "--help"]) == 0
    out = capsys.readouterr().out
    shown = " ".join(out.split())
    for key, field in keys(kind).items():
        assert f"--{key if '.' in key else key.replace('_', '-')} {field.description} (" in shown
    assert HUB_BASE in shown
    assert max(map(len, out.splitlines())) <= cli.WIDTH
    assert "(number >= 1e-10, <= 1; default 0.0001)" in shown or kind in (GenerateConfig, EvaluateConfig)


@pytest.mark.parametrize("arguments", ["train --help", "generate -h", "--version"])
def test_help_is_instant(arguments: str) -> None:
    code = (
        f"import sys; from pixart_ft.cli import main; assert main({arguments.split()!r}) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_dashes_and_underscores_are_the_same(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--config",
        "quickstart",
        "--train.steps=70",
        "--optim.learning-rate",
        "2e-4",
        "--run.name=here",
    ]
    config = understood(monkeypatch, "train", *arguments)
    overrides = {"train.steps": "70", "optim.learning_rate": "2e-4", "run.name": "here"}
    assert config == load_config("quickstart", overrides)
    assert config.run.folder == Path("runs/here")
    assert list(elsewhere.iterdir()) == []


def test_prompts_may_be_given_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--prompt",
        "a cat: on a mat",
        "--prompt=no",
        "--lora",
        "run",
        "--lora-scale",
        "-0.5",
        "--seed",
        "3",
    ]
    config = understood(monkeypatch, "generate", *arguments)
    assert config.prompts == ("a cat: on a mat", "no")
    assert (config.lora, config.lora_scale, config.seed) == ((Path("run"),), (-0.5,), 3)


def test_numbers_may_be_given_one_by_one_and_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ["--prompt", "a", *(word for name in "abcd" for word in ("--lora", name))]
    scales = ["--lora-scale", "0.5", "1", "--lora-scale=2", "--lora-scale", "[3]"]
    assert understood(monkeypatch, "generate", *runs, *scales).lora_scale == (0.5, 1, 2, 3)


def test_prompts_of_the_sample_grid_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "quickstart", "--prompt", "a cat", "--prompt", "[b]"]
    config = understood(monkeypatch, "train", *arguments)
    assert config.validation.prompts == ("a cat", "[b]")
    both = problems(capsys, "train", *arguments, "--validation.prompts", "c")
    assert both[0].endswith("--prompt and --validation.prompts exclude each other; give one")


def test_words_that_need_quotes_are_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = problems(capsys, "generate", "--prompt", "red", "apple")
    assert one == "configuration: apple: not an option; options begin with --; in quotes if it belongs to --prompt"


@pytest.mark.parametrize("typed", ["256 512", "256,512", "256, 512", "[256, 512]", "=256,512"])
def test_lists_of_numbers_need_no_brackets(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    option = f"--data.resolution{typed}" if typed.startswith("=") else "--data.resolution"
    words = [] if typed.startswith("=") else [typed] if ", " in typed else typed.split()
    config = understood(monkeypatch, "train", "--config=quickstart", option, *words, "--optim.decay", "linear")
    assert config.data.resolution == (256, 512) and config.optim.decay == "linear"
    between = understood(monkeypatch, "train", "--config=quickstart", "--diffusion.timestep_range", "0", "6e2")
    assert between.diffusion.timestep_range == (0, 600)


def test_lists_that_are_no_numbers_are_told_how_to_write_several(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = problems(capsys, "train", "--config=quickstart", "--logging.trackers", "tensorboard", "wandb")
    assert one.endswith(
        "wandb: not an option; options begin with --; in quotes if it belongs to --logging.trackers "
        "(several as '[a, b]')"
    )
    (one,) = problems(capsys, "train", "--config=quickstart", "--data.resolution", "256", "51", "512")
    assert "data.resolution[1] is 51; expected [integer >= 16" in one


def test_the_version_and_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out.startswith(f"pixart_ft {__version__}, torch ")


def test_only_training_offers_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for command, offered in (("train", True), ("generate", False)):
        assert cli.main([command, "--help"]) == 0
        assert ("quickstart" in capsys.readouterr().out) is offered


def test_a_warning_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it was given, nor that place's source. As in a shell: pytest catches warnings itself."""
    line = (
        "from pixart_ft import cli; import warnings; cli._run = lambda words: warnings.warn('so and so'); cli.main([])"
    )
    run = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "warning: so and so\n"


@pytest.mark.parametrize("flag", ["compare", "tiling", "inversion", "corrector_first"])
@pytest.mark.parametrize("given", ["{}", "{} true", "{}=true", "{} --seed 3", "{}=false", "{} false"])
def test_true_or_false_may_be_said_by_the_name_alone(flag: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"inversion": ["--image", "a.png"], "corrector_first": ["--sampler", "score_sde"]}.get(flag, [])
    arguments = given.format(f"--{flag.replace('_', '-')}").split()
    config = understood(monkeypatch, "generate", "--prompt", "a", *needs, *arguments)
    assert getattr(config, flag) is ("false" not in given)
    assert config.seed == (3 if "seed" in given else 0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (
            "train --config quickstart --model.base nope --data.folder gone --init-from runs/x@3",
            ["nope", "gone", "x@3"],
        ),
        ("train --config lora_512 --data.folder gone --resume auto --dry-run", ["picture folder gone"]),
        ("train --config quickstart --data.held-out gone --run.folder here", ["picture folder gone", "here is a file"]),
        (
            "generate --prompt a --lora gone --image no.png --dry-run",
            ["there is no gone", "image: there is no file no"],
        ),
        ("generate --prompts-file no.txt --model nope", ["no folder 'nope'", "prompts_file: there is no file no.txt"]),
    ],
)
def test_wrong_paths_are_all_named_at_once_without_torch(line: str, named: list[str], elsewhere: Path) -> None:
    (elsewhere / "here").touch()
    code = (
        "import sys; from pixart_ft.cli import main; assert main(sys.argv[1:]) == 2; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'numpy')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, *line.split()], env=environment, capture_output=True, text=True, check=True
    )
    assert all(words in run.stderr for words in named)
    assert [path.name for path in elsewhere.iterdir()] == ["here"]


def test_a_name_alone_is_no_value_for_other_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(capsys, "generate", "--prompt", "a", "--steps", "--seed") == [
        "configuration: 2 problems",
        "--steps: needs a value",
        "--seed: needs a value",
    ]
    (one,) = problems(capsys, "generate", "--prompt", "a", "--tiling", "twice")
    assert one == 'configuration: tiling is "twice"; expected true | false'


def test_mistakes_of_the_line_and_of_the_file_come_in_one_report(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "my.yaml").write_text("adapter: {rnak: 3}\ntrain: {steps: many}\n")
    line = "train stray --config my.yaml --dryrun --optim.lr 3 --resume a --init-from=b --dry-run=1"
    assert problems(capsys, *line.split(), "--run.seed", "--adapter=8") == [
        "my.yaml: 10 problems",
        "stray: not an option; options begin with --",
        "dryrun: unknown key; did you mean dry_run?",
        "optim.lr: unknown key; did you mean optim.learning_rate?",
        "--dry-run=1: takes no value",
        "--run.seed: needs a value",
        "adapter: a section, not a key; its keys are adapter.kind, adapter.rank, adapter.alpha, adapter.targets, "
        "adapter.dropout, adapter.rslora, adapter.dora, adapter.init, adapter.trainable, adapter.whole, "
        "adapter.peft_type, adapter.options",
        "--resume and --init-from exclude each other; give one",
        "adapter.rnak: unknown key; did you mean adapter.rank?",
        'train.steps is "many"; expected integer >= 1, <= 100,000,000',
        'data.folder is required: folder of pictures with captions, or "demo"; or data.sources with some to train on',
    ]


def test_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(capsys, "trian") == [
        "unknown command 'trian'; choose train, cache, doctor, generate, evaluate, export, convert or push"
    ]
    assert "shipped name: cosine_512, dreambooth, full_1024" in problems(capsys, "train", "--config", "nope")[0]
    both = problems(capsys, "generate", "--prompt", "a", "--prompts", "[b]")
    assert both == ["configuration: --prompt and --prompts exclude each other; give one"]


def test_the_command_receives_the_configuration_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[object] = []
    command = cli.COMMANDS["train"]
    monkeypatch.setitem(cli.COMMANDS, "train", replace(command, run=lambda *given: received.extend(given)))
    assert cli.main(["train", "--config", "quickstart", "--resume", "auto", "--run.seed", "2"]) == 0
    assert received == [
        load_config("quickstart", {"run.seed": "2"}),
        {"config": "quickstart", "resume": "auto"},
    ]


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("data.folder: no pictures"), 2, "error: data.folder: no pictures\n"),
        (OSError(errno.ENAMETOOLONG, "", "a"), 2, "error: a: the name is too long; choose a shorter one\n"),
        (OSError(errno.EROFS, "", "a"), 2, "error: a: the file system is read-only; choose another place\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped after step 7"), 130, "stopped after step 7\n"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: object, options: object) -> None:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=fail))
    assert cli.main(["train", "--config", "quickstart"]) == code
    assert capsys.readouterr().err == message


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object, options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=fail))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", "--config", "quickstart"])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("train.py", ["--config", "quickstart"]), ("generate.py", ["--prompt", "a", "--model", "demo"])],
)
def test_the_scripts_are_the_same_program_from_any_folder(
    script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert cli.main([script.removesuffix(".py"), *arguments, "--help"]) == 0
    assert run.stdout == capsys.readouterr().out


def test_a_reader_that_stops_early_is_no_error() -> None:
    """`pixart-ft train --help | head -1` ends quietly."""
    line = [sys.executable, "-m", "pixart_ft.cli", "train", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_an_option_given_twice_is_refused_unless_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--config", "quickstart", "--config=quickstart", "--train.steps", "50", "--train.steps=60"]
    assert problems(capsys, *train, "--adapter.rank", "2", "--dry-run") == [
        f"{ROOT}/configs/quickstart.yaml: 2 problems",
        '--config: given 2 times ("quickstart"); give it once',
        '--train.steps: given 2 times ("50" and "60"); give it once',
    ]
    generate = ["generate", "--prompt", "a", "--prompt", "b", "--images-per-prompt", "1", "--images_per_prompt", "2"]
    assert problems(capsys, *generate) == [
        'configuration: --images_per_prompt: given 2 times ("1" and "2"); give it once'
    ]
    assert problems(capsys, "generate", "--prompt", "a", "--compare", "--compare")[0].startswith(
        'configuration: --compare: given 2 times ("true")'
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_what_the_system_refuses_is_one_message_in_every_command() -> None:
    program = [sys.executable, "-m", "pixart_ft.cli"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*program, "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the output, or a file of it: no space is left on the disk; make room, or choose another place\n",
    )


TAKES_EMPTY = {"prompt", "caption", "prompts", "validation.prompts", "negative_prompt"}
NEEDED = {
    "train": {"config": "quickstart"},
    "cache": {"config": "quickstart"},
    "convert": {"file": "a", "out": "b"},
    "evaluate": {"runs": "a"},
    "export": {"run": "a", "to": "peft", "out": "b"},
    "push": {"run": "a", "repo": "b/c"},
}


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_a_mistake_for_every_option(
    command: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unset shell variable is neither the default, nor the current folder, nor the lack of the option."""
    needed = NEEDED.get(command, {"prompt": "a"})
    options = {*keys(cli.COMMANDS[command].config), *cli.COMMANDS[command].options} - TAKES_EMPTY
    for option in options:
        others = [f"--{name}={given}" for name, given in needed.items() if name != option]
        (problem,) = problems(capsys, command, *others, f"--{option}={value}")
        assert f"{option.replace('_', '-')} is empty" in problem.replace("_", "-"), option


def test_an_empty_value_in_a_file_is_a_mistake_too(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "my.yaml").write_text("run: {folder: ''}\ndata: {folder: ' '}\nadapter: {targets: [to_q, '']}\n")
    assert problems(capsys, "train", "--config", "my.yaml") == [
        "my.yaml: 3 problems",
        "run.folder is empty; give path, or leave it out",
        "data.folder is empty; give text or null, or leave it out",
        "adapter.targets is empty; give [text, ...] (not empty), or leave it out",
    ]
    assert understood(monkeypatch, "generate", "--prompt", "", "--negative-prompt=").prompts == ("",)  # they mean it


def test_a_thread_that_the_disk_refuses_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's writer is one; a fault of another kind is still shown."""

    def failing(raised: Exception) -> None:
        def fail() -> None:
            raise raised

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    for raised, shown in ((OSError(errno.ENOSPC, "", "a"), False), (RuntimeError("ours"), True)):
        monkeypatch.setattr(cli, "_run", lambda arguments, raised=raised: failing(raised))
        assert cli.main([]) == 0
        assert ("Traceback" in capsys.readouterr().err) == shown


def test_a_plan_is_printed_where_the_output_has_no_encoding() -> None:
    """A program that catches the output in a StringIO, as notebooks' tools do, gets the letters themselves."""
    with contextlib.redirect_stdout(io.StringIO()) as caught:
        cli._print_plan(["a fact"], GenerateConfig(prompts=("日本",)))
    assert caught.getvalue().startswith("# a fact\n") and "日本" in caught.getvalue()


def test_folders_that_would_be_read_as_one_another_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are read with all folders below: a run or held-out pictures in there would be trained on."""
    Path("pics/held").mkdir(parents=True)
    Path("link").symlink_to("pics")
    train = ("train", "--data.folder", "pics", "--model.base", "demo", "--run.folder")
    for run in ("pics/run", "link/run"):
        assert any(f"run.folder: {run} lies inside data.folder pics" in line for line in problems(capsys, *train, run))
    for held_out in ("pics", "pics/held", ".", "link"):
        lines = problems(capsys, *train, "run", "--data.held_out", held_out)
        assert any(f"data.held_out: {held_out} and data.folder pics share pictures" in line for line in lines)
    lines = problems(capsys, *train, "run", "--data.prior", "pics/held")
    assert any("data.prior: pics/held and data.folder pics share pictures; keep" in line for line in lines)
    Path("other").mkdir()
    lines = problems(capsys, *train, "run", "--data.prior", "other", "--data.held_out", "other")
    assert any("data.held_out: other and data.prior other share pictures" in line for line in lines)
