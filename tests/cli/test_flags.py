"""The command's flags are those of `flags.txt`: what scripts rely on changes knowingly, or not at all.

After a change that is meant: ``python -m tests.cli.test_flags``.
"""

import argparse
from pathlib import Path

from adq_wds.cli.arguments import make_parser

FILE = Path(__file__).parent / "flags.txt"


def flags() -> list[str]:
    """A line for each flag: command, flag and aliases, default, then choices and number of words where there are some."""
    commands = make_parser().commands.items()
    return [_line(name, command, action) for name, command in commands for action in command._actions]


def _line(name: str, command: argparse.ArgumentParser, action: argparse.Action) -> str:
    words = [name, *(action.option_strings or [action.dest]), f"= {command.get_default(action.dest)!r}"]
    words += [f"of {tuple(action.choices)}"] if action.choices else []
    words += [f"x {action.nargs}"] if action.nargs not in (None, 0) else []
    return " ".join(words + (["required"] if action.required else []))


def test_flags_defaults_and_choices_are_those_that_are_listed() -> None:
    assert sorted(flags()) == FILE.read_text().splitlines()


def test_every_flag_has_help_that_names_flags() -> None:
    for name, command in make_parser().commands.items():
        command.format_help()
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
            for flag in action.option_strings:
                python = flag.removeprefix("--").replace("-", "_")
                assert "_" not in python or python not in action.help, f"{name} {flag}: {action.help}"


if __name__ == "__main__":
    FILE.write_text("\n".join(sorted(flags())) + "\n")
