"""Turns options of functions into flags, parses them, and checks their values before anything heavy is imported."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

from adq_wds import registry
from adq_wds.checks import positive
from adq_wds.core.allocation import check_ratio
from adq_wds.core.rng import check_seed
from adq_wds.errors import printable
from adq_wds.registry import BUILT_IN_SCORES, GONE, HEADS
from adq_wds.signatures import Option, options_of
from adq_wds.tables.key_lists import read_txt

NONE = "none"  # the word for None
_OF_EVERY_COMMAND = ("out", "progress")
_NUMBER = re.compile(r"-\.?\d.*")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that names close flags and commands for one it does not know, as a terminal may show them.

    Attributes:
        commands: the parsers of the commands, by name; empty for a command's own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands: dict[str, Parser] = {}

    @property
    def flags(self) -> set[str]:
        """The flags that a command takes: ``--patch-keep``, ``--no-amp`` and so on."""
        return {flag for flag in self._option_string_actions if flag.startswith("--")}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word == "--":
                break
            if self.commands and not word.startswith("-"):
                if word not in self.commands:
                    self._fail("command", word, self.commands)
                break  # the flags behind it are the command's
            flag, known = word.partition("=")[0], self._option_string_actions
            is_flag = len(word) > 1 and word[0] == "-" and " " not in word and not _NUMBER.fullmatch(word)
            is_known = any(name.startswith(flag) for name in known) or (
                flag[1:2] != "-" and flag[:2] in known
            )
            if is_flag and not is_known:
                self._fail("flag", flag, known)
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        """The help, with the names of Python's arguments as flags."""
        for action in self._actions:
            action.help = flagged(action.help or "", self.flags)
        return super().format_help()

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)

    def _fail(self, kind: str, name: str, known: Any) -> NoReturn:
        close = difflib.get_close_matches(name, known, n=1)
        remedy = GONE.get(name) or (
            f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists them"
        )
        self.error(f"no {kind} {name}; {remedy}")


def add_options(group: Any, function: str, *, without: Iterable[str] = (), **changed: dict[str, Any]) -> None:
    """A flag for each keyword-only argument of a function but ``out`` and ``progress``, which commands add themselves.

    A `Literal` gives choices, with "none" for None; a list takes several words.

    Args:
        group: the command, or a group of its flags.
        function: full name of the function; see `options_of`.
        without: arguments that have no flag.
        changed: other arguments of `add_argument`, by name of the option.
    """
    for name, option in options_of(function).items():
        if name not in (*_OF_EVERY_COMMAND, *without):
            flag = f"--{name.replace('_', '-')}"
            group.add_argument(flag, **{**_how(option), **changed.get(name, {})})


def _how(option: Option) -> dict[str, Any]:
    """The arguments of `add_argument` for an option."""
    how: dict[str, Any] = {"default": option.default, "help": option.help.replace("%", "%%")}
    if option.type == "bool":
        return {**how, "action": argparse.BooleanOptionalAction}
    if option.many:
        return {**how, "nargs": "+"}
    if option.choices and option.type in _TYPES:
        words = (*option.choices, *[NONE] * (option.none and NONE not in option.choices))
        return {**how, "type": _word_or(words, _TYPES[option.type]), "metavar": "|".join((*words, "NUMBER"))}
    if option.choices:
        none = [NONE] if option.none and NONE not in option.choices else []
        return {**how, "choices": (*option.choices, *none)}
    return {**how, "type": _TYPES[option.type]} if option.type in _TYPES else how


def _word_or(words: Sequence[str], number: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse that reads one of some words, or a number."""

    def word_or_number(text: str) -> Any:
        try:
            return text if text in words else number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(words)} nor a number") from None

    return word_or_number


def given(arguments: argparse.Namespace, function: str, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """The command's values for a function's keyword-only arguments, as far as the command has them."""
    values = {}
    for name, option in options_of(function).items():
        if hasattr(arguments, name) and name not in without:
            value = getattr(arguments, name)
            if value == NONE and option.choices and option.none:
                value = None
            values[name] = [] if value is None and option.many and not option.none else value
    return values


def ratio(text: str) -> float:
    """A ratio as people write it.

    >>> ratio("0.2"), ratio("20%")
    (0.2, 0.2)
    """
    return float(f"{text.removesuffix('%').strip()}e-2" if text.endswith("%") else text)


def count(text: str) -> int:
    """An integer; `check_values` refuses numbers below 1."""
    return int(text)


def keys_in(path: str) -> list[str | tuple[str, ...]]:
    """Keys from a file: one a line, or shard and key with a tab between."""
    try:
        return list(read_txt(Path(path)))
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{path}: not UTF-8 text: {error.reason}") from None


_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "Count": count, "Ratio": ratio}
_CHECKS: dict[str, Callable[[Any], object]] = {
    "keep": lambda keep: check_ratio("keep", keep),
    "alpha": lambda alpha: check_ratio("alpha", alpha),
    "seed": check_seed,
    "allocation": lambda name: registry.look_up("allocation", name, registry.ALLOCATIONS),
    "diversity_head": lambda head: registry.look_up("diversity head", head, dict.fromkeys(HEADS)),
    "importance": registry.check_importance,
    "scores": lambda scores: [registry.score(score) for score in scores if score not in BUILT_IN_SCORES],
}


def check_values(command: Parser, arguments: argparse.Namespace) -> None:
    """Check the values that need no data, before torch or Arrow are imported.

    Raises:
        ValueError: a number is out of range, or nothing has that name.
    """
    values = {action: getattr(arguments, action.dest, None) for action in command._actions}
    for action, value in values.items():
        if action.type is count and value is not None:
            positive(action.dest, value)
        if action.type is ratio and isinstance(value, int | float) and 2 <= value <= 100:
            meant = f"for {value:g} % write {value / 100:g} or {value:g}%"
            raise ValueError(f"{action.dest} must be a number in [0, 1], got {value:g}; {meant}")
        if action.dest in _CHECKS and value is not None:
            _CHECKS[action.dest](value)


# ---- Errors and docstrings name Python's arguments; the command shows its flags instead

_NAMED = re.compile(
    r"""(?<!\w)b?'(?:[^'\\]|\\.)*'|(?<!\w)b?"(?:[^"\\]|\\.)*"      # in quotes: values, keys, fields
    |\bshard\ \S+?[,:]|(?<!\S)\S*[/\\]\S*                           # shards and paths
    |(?P<pair>\(shard,\ key\))
    |^(?P<first>[a-z_]+)(?=\ must\ )
    |(?<![\w./=-])(?P<name>[a-z_]+)(?:
        =(?:(?P<value>True|False|None|-?\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?|'[^']*'|"[^"]*")(?![\w/=-]|\.\w)
           |(?![^\s,;:.)]))
        |(?![\w/=:-]|\.\w))""",
    re.VERBOSE,
)
_QUOTES = ("'", '"')
_WITH_ITS_FLAG = re.compile(r"(--[\w-]+)(?: [^\s()]+)? \((\1\b[^()]*)\)")  # --views 20_000 (--views 20000)


def flagged(text: str, flags: Set[str]) -> str:
    """A text with a command's flags in place of the names of Python's arguments.

    Those are ``name=value``, ``name=``, every name with an underscore, and a name that begins the text before "must";
    and the pair (shard, key), which is a line with a tab in the file of ``--must-include``.
    Other words may be English; quotes, paths and names of shards stay as they are.

    >>> flagged("give patch_keep=0.5, not size=, in 'size=3'", {"--patch-keep", "--size"})
    "give --patch-keep 0.5, not --size, in 'size=3'"
    """
    return _WITH_ITS_FLAG.sub(r"\2", _NAMED.sub(lambda match: _flag(match, flags), text))


def _flag(match: re.Match[str], flags: Set[str]) -> str:
    whole, name, value = match[0], match["first"] or match["name"] or "", match["value"]
    if match["pair"] is not None:
        return "SHARD<TAB>KEY" if "--must-include" in flags else whole
    flag = f"--{name.replace('_', '-')}"
    if flag not in flags or (whole == match["name"] and "_" not in whole):
        return whole
    if value is None or value == "True":
        return flag
    if value == "False":
        return f"--no{flag[1:]}" if f"--no{flag[1:]}" in flags else whole
    if value == "None":
        return "--label none" if name == "label" else whole
    return f"{flag} {shlex.quote(value[1:-1]) if value[0] in _QUOTES else value}"
