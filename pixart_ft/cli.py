"""The command line: `pixart-ft train`, `doctor`, `generate` and the others. Parse, build, call.

Every key of a configuration is an option, `--optim.learning_rate 2e-4` or `--optim.learning_rate=2e-4`;
dashes and underscores are the same, and a key that is true or false needs no value to be true. Torch is imported only
by a command that runs, so help is instant.
"""

import dataclasses
import io
import itertools
import json
import os
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pixart_ft.config.evaluate import EvaluateConfig
from pixart_ft.config.export import ConvertConfig, ExportConfig
from pixart_ft.config.generate import GenerateConfig
from pixart_ft.config.key_types import expected, holds_numbers, is_empty, item_of
from pixart_ft.config.options import REPEATABLE, SWITCHES, is_number, split_options
from pixart_ft.config.push import PushConfig
from pixart_ft.config.reading import Config, default, keys, load, shipped_configs, to_yaml
from pixart_ft.config.text import visible
from pixart_ft.config.train import PlanConfig, TrainConfig
from pixart_ft.diffusion.names import unknown_word
from pixart_ft.errors import UserError
from pixart_ft.files import reason_of, versions

WIDTH = 110
DRY_RUN = {"dry_run": "check all but the weights, print what would run and its configuration as YAML, write nothing"}
MAY_BE_EMPTY = {"prompt", "caption"}  # of the commands' own options, those for which an empty text means something


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its configuration, and its own options beside the configuration's keys."""

    summary: str
    usage: str
    config: type[Config]
    prompts: str  # the key that --prompt fills, "" for none
    options: Mapping[str, str]  # name -> description; each takes a value
    run: Callable[[Any, Mapping[str, str]], object]  # of the configuration, and the options and switches given
    switches: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> description; these take no value
    argument: str = ""  # the key that a first word without dashes fills, or all of them if it is a list


def _train(config: TrainConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.training.places import check_training  # without torch: a wrong path is known at once

    resume, init_from = options.get("resume"), options.get("init_from")
    source = check_training(config, resume, init_from)
    if "dry_run" in options:
        from pixart_ft.training.start import dry_run

        _print_plan(dry_run(config, resume), config)
        return
    from pixart_ft.training.run import train

    train(config, resume, source, "accept_changes" in options)


def _generate(config: GenerateConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.sampling.places import check_generation  # without torch: a wrong path is known at once

    adapters = check_generation(config)
    from pixart_ft.sampling.command import dry_run, generate

    if "dry_run" in options:
        _print_plan(dry_run(config, adapters), config)
    else:
        generate(config, adapters, Path(options["from"]) if "from" in options else None)


def _evaluate(config: EvaluateConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.evaluation.places import check_evaluation  # without torch: a wrong path is known at once

    entries = check_evaluation(config)
    from pixart_ft.evaluation.command import evaluate
    from pixart_ft.training.processes import Together, join

    accelerator = join(os.environ, mixed_precision="no")
    with Together(accelerator):
        evaluate(config, entries, accelerator)


def _cache(config: TrainConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.training.caching import cache, verify

    for line in verify(config) if "verify" in options else cache(config):
        print(line)


def _doctor(config: PlanConfig, options: Mapping[str, str]) -> None:
    card = _positive(options["card"], "--card", "GB of memory") if "card" in options else None
    from pixart_ft.training.doctor import examine, show_caption

    if "caption" in options:
        show_caption(config, options["caption"])
        return
    given = any(getattr(config, section).model_fields_set for section in PlanConfig.model_fields)
    sheet, plot = (Path(options[name]) if name in options else None for name in ("sheet", "plot"))
    examine(config if given else None, None if card is None else round(card * 2**30), sheet, plot)


def _convert(config: ConvertConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.model.convert import convert

    print("\n".join(convert(config)))


def _export(config: ExportConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.adapters.export import export

    print("\n".join(export(config)))


def _push(config: PushConfig, options: Mapping[str, str]) -> None:
    from pixart_ft.sharing.push import dry_run, push

    if "dry_run" in options:
        print("\n".join(dry_run(config)))
    else:
        push(config)


def _print_plan(facts: Sequence[str], config: Config) -> None:
    """What a dry run found, as comments, and the configuration: one YAML file together. [] prints none."""
    if facts:
        text = to_yaml(config, ascii_only=not _prints(to_yaml(config)))
        print("\n".join([*(f"# {line}" for line in facts), text]), end="")


COMMANDS = {
    "train": Command(
        "fine-tune on a folder of captioned pictures",
        "pixart-ft train --config NAME|FILE [--section.key value ...]",
        TrainConfig,
        "validation.prompts",
        {
            "config": "YAML file or shipped name; without it the defaults below",
            "prompt": "one prompt of the sample grid; give it again for more",
            "resume": "continue this run: auto = from its newest whole checkpoint, or a checkpoint folder",
            "init_from": "start a new run from the weights of an adapter or model folder, a run folder, or RUN@STEP",
        },
        _train,
        {"accept_changes": "with resume: go on though what the run is trained on has changed", **DRY_RUN},
    ),
    "cache": Command(
        "encode the pictures and captions of a training ahead of it",
        "pixart-ft cache --config NAME|FILE [--section.key value ...] [--verify]",
        TrainConfig,
        "validation.prompts",
        {
            "config": "of the training: YAML file or shipped name",
            "prompt": "one prompt of the sample grid; give it again for more",
        },
        _cache,
        {"verify": "only read all that is in data.cache, and name and remove what is damaged"},
    ),
    "doctor": Command(
        "check this machine, and whether a training fits on it",
        "pixart-ft doctor [--config NAME|FILE] [--section.key value ...] [--card GB]\n"
        "                   [--sheet FILE] [--plot FILE] [--caption TEXT]",
        PlanConfig,
        "validation.prompts",
        {
            "config": "of the training: YAML file or shipped name; without it and any key, the machine alone",
            "prompt": "one prompt of the sample grid; give it again for more",
            "card": "memory in GB of an NVIDIA GPU that computes in bfloat16, to plan for in place of this machine",
            "sheet": "write a PNG of pictures as the VAE sees them, with their captions, the worst of them marked",
            "caption": "show the tokens of a caption or prompt, what of it T5 sees and what not, and nothing else",
            "plot": "PNG file for a picture of the noise: alpha_bar, SNR, timesteps, weights and law of t",
        },
        _doctor,
    ),
    "generate": Command(
        "draw pictures",
        'pixart-ft generate --prompt "..." [--lora RUN] [--key value ...]',
        GenerateConfig,
        "prompts",
        {
            "config": "YAML file with the keys below",
            "from": "draw this PNG again by the recipe in it; other options replace what it says",
            "prompt": "one prompt; give it again for more",
        },
        _generate,
        DRY_RUN,
    ),
    "evaluate": Command(
        "measure fine-tunes against their base, on pictures that none has seen",
        "pixart-ft evaluate RUN [RUN ...] --data FOLDER --out FOLDER [--key value ...]",
        EvaluateConfig,
        "",
        {"config": "YAML file with the keys below"},
        _evaluate,
        argument="runs",
    ),
    "export": Command(
        "write what a run trained as other programs read it",
        "pixart-ft export RUN --to peft|diffusers|comfy|kohya|merged --out FOLDER [--key value ...]",
        ExportConfig,
        "",
        {"config": "YAML file with the keys below"},
        _export,
        argument="run",
    ),
    "convert": Command(
        "turn a model in the authors' own layout into a diffusers folder, or back",
        "pixart-ft convert FILE --out FOLDER [--key value ...]",
        ConvertConfig,
        "",
        {"config": "YAML file with the keys below"},
        _convert,
        argument="file",
    ),
    "push": Command(
        "put what a run trained on the Hub",
        "pixart-ft push RUN --repo OWNER/NAME [--key value ...]",
        PushConfig,
        "",
        {"config": "YAML file with the keys below"},
        _push,
        {"dry_run": "show what would be there, with its card, and ask nobody"},
        argument="run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted.

    A training whose other process has ended leaves with 3, see `training.processes`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal lacks is escaped, and stops nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before, warnings.formatwarning = warnings.formatwarning, _plain_warning
    hook, threading.excepthook = threading.excepthook, _thread_failed
    try:
        _run(arguments)
        sys.stdout.flush()  # a full disk that the output goes to is told of here
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nobody is left to print to
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it once more at exit
    except OSError as error:  # what the system refuses where nobody has said it better
        if (reason := reason_of(error)) is None:
            raise
        print(f"error: {error.filename or 'the output, or a file of it'}: {reason}", file=sys.stderr)
        if error.filename is None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # else Python fails once more at exit
        return 2
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may have been closed
            print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning, threading.excepthook = before, hook
    return 0


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """What the system refuses to TensorBoard's writing thread, the main one is told of at its next write."""
    if not (isinstance(failure.exc_value, OSError) and reason_of(failure.exc_value)):
        threading.__excepthook__(failure)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] in ("-V", "--version"):
        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(unknown_word(name, "command", COMMANDS))
    command = COMMANDS[name]
    if command.argument:
        several = command.argument in REPEATABLE
        named = list(itertools.takewhile(lambda word: not word.startswith("-"), rest if several else rest[:1]))
        rest = [part for word in named for part in (f"--{command.argument}", word)] + rest[len(named) :]
    kinds = {name: (field.annotation, *get_args(field.annotation)) for name, field in keys(command.config).items()}
    flags = [name for name, kind in kinds.items() if bool in kind]
    lists = {name: holds_numbers(field) for name, field in keys(command.config).items() if item_of(field)}
    known, switches = [*keys(command.config), *command.options], [*command.switches, *SWITCHES]
    given, problems = split_options(rest, known, flags, switches, lists)
    if "help" in given:
        print(help_text(command))
        return
    config = _config(command, given, problems)
    own = (*command.options, *command.switches)
    command.run(config, {option: given[option][-1] for option in own if option in given})


def _positive(word: str, option: str, what: str) -> float:
    """The number that was given to an option. Raises UserError unless it is one above 0."""
    if not is_number(word) or not 0 < float(word) < float("inf"):
        raise UserError(f"{option} is {json.dumps(visible(word))}; expected {what}, a number above 0")
    return float(word)


def _prints(text: str) -> bool:
    """Whether the terminal, or the file in its place, has every letter of it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # a StringIO in its place has none, and takes every letter
    except UnicodeEncodeError:
        return False
    return True


def _config(command: Command, given: Mapping[str, list[str]], problems: list[str]) -> Config:
    """The configuration that the command line describes; every mistake of line and file in one report."""
    overrides: dict[str, str | list[str]] = {
        key: values if len(values) > 1 and key in REPEATABLE else values[-1]
        for key, values in given.items()
        if key in keys(command.config)
    }
    if "prompt" in given:
        overrides[command.prompts] = given["prompt"]
    for one, other in (
        ("prompt", command.prompts),
        ("resume", "init_from"),
        ("config", "from"),
        ("caption", "card"),
        ("caption", "sheet"),
        ("caption", "plot"),
    ):
        if one in given and other in given:
            problems.append(f"--{one} and --{other.replace('_', '-')} exclude each other; give one")
    if "accept_changes" in given and "resume" not in given:
        problems.append("--accept-changes goes with --resume; give both or none")
    for option in command.options:
        if option not in MAY_BE_EMPTY and is_empty(given.get(option)):
            problems.append(f"--{option.replace('_', '-')} is empty; give its value, or leave it out")
    if "from" in given and not is_empty(given["from"]):
        from pixart_ft.pictures.recipes import config_of

        picture = Path(given["from"][-1])
        values = config_of(picture, overrides)
        return load(command.config, values, overrides, problems=problems, origin=str(picture), yields=True)
    source: Any = given["config"][-1] if "config" in given else {}
    return load(command.config, source, overrides, problems=problems)


def overview() -> str:
    """The commands."""
    lines = [f"  pixart-ft {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Fine-tune PixArt-Sigma, and generate with it.",
            "",
            *lines,
            "",
            "COMMAND --help lists its keys; --version tells the version.",
        ]
    )


def help_text(command: Command) -> str:
    """Usage, options, and every key with its meaning, what it accepts and its default."""
    lines = [f"{command.summary}\n\n  {command.usage}\n\noptions"]
    for name, description in {**command.options, **command.switches, **SWITCHES}.items():
        lines += _entry(f"--{name.replace('_', '-')}", description)
    if command.config.shipped:
        shipped = f"shipped configurations: {', '.join(shipped_configs()) or 'none'}"
        lines += ["", *textwrap.wrap(shipped, WIDTH, subsequent_indent="  ")]
    section = None
    for key, field in keys(command.config).items():
        if (place := key.rpartition(".")[0]) != section:
            section = place
            part = command.config.model_fields[section].annotation if section else None
            lines += ["", f"{section}: {part.__doc__}" if part else "keys"]
        flag = key.replace("_", "-") if not section else key
        given = "required" if field.is_required() else f"default {_plain(default(field))}"
        lines += _entry(f"--{flag}", f"{field.description} ({expected(field)}; {given})")
    return "\n".join(lines)


def _plain_warning(message: Warning | str, *place: object, **line: object) -> str:
    """A warning as a user reads it: without the place in the package that gave it."""
    return f"warning: {str(message).lstrip()}\n"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _entry(flag: str, text: str) -> list[str]:
    return textwrap.wrap(f"  {flag:<34}{text}", WIDTH, subsequent_indent=" " * 36, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
