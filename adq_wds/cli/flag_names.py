"""How does an error that names Python's arguments read on the command line? With the command's flags in their place."""

from __future__ import annotations

import re
import shlex
from collections.abc import Set

_NAMED = re.compile(
    r"""(?<!\w)b?'(?:[^'\\]|\\.)*'|(?<!\w)b?"(?:[^"\\]|\\.)*"      # what was read: values, keys, fields
    |\bshard\ \S+?[,:]|(?<!\S)\S*[/\\]\S*                           # and from where
    |(?P<pair>\(shard,\ key\))
    |^(?P<first>[a-z_]+)(?=\ must\ )
    |(?<![\w./=-])(?P<name>[a-z_]+)(?:
        =(?:(?P<value>True|False|None|-?\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?|'[^']*'|"[^"]*")(?![\w/=-]|\.\w)
           |(?P<open>(?=[\[(]))
           |(?![^\s,;:.)]))
        |(?![\w/=:-]|\.\w))""",
    re.VERBOSE,
)
_QUOTES = ("'", '"')
_SAID_TWICE = re.compile(r"(--[\w-]+)(?: [^\s()]+)? \((\1\b[^()]*)\)")  # --views 20_000 (--views 20000)


def flagged(text: str, flags: Set[str]) -> str:
    """The text of an error, with the names of Python's arguments as a command's flags.

    Those are ``name=value``, ``name=``, every name with an underscore, and a name that begins the text before "must";
    and the pair (shard, key), which is a line with a tab in the file of ``--must-include``.
    Other words may be English, and what is in quotes, paths and names of shards was never ours.

    >>> flagged("give patch_keep=0.5, not size=, in 'size=3'", {"--patch-keep", "--size"})
    "give --patch-keep 0.5, not --size, in 'size=3'"
    """
    return _SAID_TWICE.sub(r"\2", _NAMED.sub(lambda found: _flag(found, flags), text))


def _flag(found: re.Match[str], flags: Set[str]) -> str:
    if found["pair"] is not None:
        return "SHARD<TAB>KEY" if "--must-include" in flags else found[0]
    whole, name, value = found[0], found["first"] or found["name"], found["value"]
    flag = f"--{(name or '').replace('_', '-')}"
    if flag not in flags or (whole == found["name"] and "_" not in whole):
        return whole
    if value is None or value == "True":
        return flag if found["open"] is None else f"{flag} "
    if value == "False":
        without = f"--no{flag[1:]}"
        return without if without in flags else whole
    if value == "None":
        return "--label none" if name == "label" else whole
    return f"{flag} {shlex.quote(value[1:-1]) if value[0] in _QUOTES else value}"
