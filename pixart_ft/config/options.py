"""The words of a command line: which option each value belongs to, and what is wrong with them."""

import json
from collections.abc import Iterable, Mapping

from pixart_ft.config.reading import add_unknown
from pixart_ft.config.text import is_text, no_text, visible

SWITCHES = {"help": "this text"}
REPEATABLE = {"prompt", "lora", "lora_scale", "runs"}


def split_options(
    arguments: Iterable[str],
    known: Iterable[str],
    flags: Iterable[str] = (),
    switches: Iterable[str] = SWITCHES,
    lists: Mapping[str, bool] | None = None,
) -> tuple[dict[str, list[str]], list[str]]:
    """The values given to each known option, in order, and what could not be understood. Dashes become _.

    flags: options that mean true where no value follows; switches take none; lists, if of numbers (true), take all
    numbers that follow. Only those of `REPEATABLE` may be given twice.
    """
    flags, switches, lists = set(flags), set(switches), lists or {}
    known = [*known, *switches]
    given: dict[str, list[str]] = {}
    problems = []
    words = ["--help" if word == "-h" else word for word in arguments]
    name = ""
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            several = " (several as '[a, b]')" if name in lists else ""
            quoted = f"; in quotes if it belongs to --{name}{several}" if name else ""
            problems.append(f"{word}: not an option; options begin with --{quoted}")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        is_switch, has_value = name in switches, bool(words) and not words[0].startswith("--")
        if not equals and not is_switch and has_value:
            value = words.pop(0)
            while lists.get(name) and words and is_number(value.rpartition(", ")[2]) and is_number(words[0]):
                value += f", {words.pop(0)}"
        if not is_text(value):
            problems.append(no_text(f"--{name}", value))
            value = visible(value)
        if name not in known:
            add_unknown(problems, name, known)
        elif is_switch and equals:
            problems.append(f"{word}: takes no value")
        elif name in flags and not (equals or has_value):
            given.setdefault(name, []).append("true")
        elif not (is_switch or equals or has_value):
            problems.append(f"{word}: needs a value")
        else:
            given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1 and name not in REPEATABLE and name not in switches:
            shown = " and ".join(dict.fromkeys(json.dumps(visible(value)) for value in values))
            problems.append(f"--{name}: given {len(values)} times ({shown}); give it once")
    return given, problems


def is_number(word: str) -> bool:
    """Whether it is one, inf and nan among them."""
    try:
        float(word)
    except ValueError:
        return False
    return True
