"""Reads the options of a function from its source: names, types, defaults, and the help in its docstring's `Args:`.

So an option is defined once, in the function's signature: the command makes its flag from it, and a run.json
may set it. The source is read, not imported: jobs import torch and Arrow, which would make ``adq --help``
slow.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

PLAN = "adq_wds.planning.build_plan.build_plan"
EMBED = "adq_wds.embedding.embed_shards.embed_shards"
ENCODER = "adq_wds.models.timm_encoder.timm_encoder"
SELECT = "adq_wds.jobs.select.select_samples"
VARY = "adq_wds.jobs.vary.vary_shards"
SDEDIT = "adq_wds.models.diffusion.load_sdedit"

_TYPES = ("bool", "Count", "int", "Ratio", "float", "str")  # of a union, the first of these is an option's
_STATEMENT = re.compile(r"^(?=[^\s)\]}\"])", re.MULTILINE)
# Of a function or class: all up to its docstring's end.
_HEAD = re.compile(r'[^"]*(?:"[^"]+"[^"]*)*"""[\s\S]*?"""')
_ENTRY = re.compile(r"^    (?P<names>\w+(?:, \w+)*): +(?P<text>\S.*(?:\n {5,}.*)*)", re.MULTILINE)
_SAME_AS = re.compile(r"as in `(?P<name>\w+)`")
_SENTENCE = re.compile(r"\.(?=\s+[A-Z(]|\s*$)|:$")


@dataclass(frozen=True)
class Option:
    """One keyword-only argument of a function.

    Attributes:
        name: its name.
        type: "bool", "int", "float", "str", or one of `checks`: "Ratio", "Count".
        default: its default value.
        help: its first sentence in the docstring.
        choices: its allowed words, where its type is a `Literal`.
        many: whether it is a list.
        none: whether it may be None.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    many: bool = False
    none: bool = False


@cache
def options_of(function: str) -> dict[str, Option]:
    """The keyword-only arguments of a function, by name.

    Args:
        function: its full name, ``adq_wds.planning.build_plan.build_plan``.

    Raises:
        LookupError: no function of the package has that name, or its default is no plain value.
    """
    module, _, name = function.rpartition(".")
    home, node = _find(module, name)
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"{function} is not a function")
    sentences = _help_of_arguments(home, node)
    return {
        argument.arg: Option(
            argument.arg,
            default=None if default is None else _value(home, default),
            help=sentences.get(argument.arg, ""),
            **_type_of(home, argument.annotation),
        )
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }


@cache
def default_of(function: str, name: str) -> Any:
    """The default of an argument that may also be given by position.

    Raises:
        LookupError: as `options_of`, or the argument has no default.
    """
    module, _, function_name = function.rpartition(".")
    home, node = _find(module, function_name)
    if isinstance(node, ast.FunctionDef):
        for argument, default in zip(reversed(node.args.args), reversed(node.args.defaults), strict=False):
            if argument.arg == name:
                return _value(home, default)
    raise LookupError(f"{function} has no default for {name}")


@cache
def _statements(module: str) -> list[str]:
    """The source of each top-level statement of a module; parsing whole modules would slow the start."""
    package, _, rest = module.partition(".")
    source = pkgutil.get_data(package, rest.replace(".", "/") + ".py") or b""
    return _STATEMENT.split(source.decode("utf-8"))


@cache
def _find(module: str, name: str) -> tuple[str, ast.AST]:
    """The module that defines a name, imports followed, and its definition (up to the docstring's end) or value.

    Raises:
        LookupError: it is not defined in the package.
    """
    definition = re.compile(rf"(?:(?P<head>def|class) )?{name}\b(?(head)|(?= = ))")
    for statement in _statements(module):
        if match := definition.match(statement):
            head = _HEAD.match(statement) if match["head"] else None
            node = ast.parse(head[0] if head else statement).body[0]  # a string about it may follow
            return module, node.value if isinstance(node, ast.Assign) else node
        if statement.startswith(("from adq_wds.", "if TYPE_CHECKING:")) and name in statement:
            for inner in ast.walk(ast.parse(statement)):
                if isinstance(inner, ast.ImportFrom) and str(inner.module).startswith("adq_wds."):
                    for alias in inner.names:
                        if name == (alias.asname or alias.name):
                            return _find(str(inner.module), alias.name)
    raise LookupError(f"{module}.{name} is not defined in adq_wds")


def _value(module: str, node: ast.AST) -> Any:
    """The value of a default: a literal, the name of one, a sum or a shift of these."""
    if isinstance(node, ast.Name):
        return _value(*_find(module, node.id))
    if isinstance(node, ast.BinOp):
        left, right = _value(module, node.left), _value(module, node.right)
        return left << right if isinstance(node.op, ast.LShift) else left + right
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise LookupError(f"{module}: the default {ast.unparse(node)} is no literal") from None


def _type_of(module: str, annotation: ast.AST | None) -> dict[str, Any]:
    """The fields `type`, `choices`, `many` and `none` of an annotation."""
    members = list(_members(module, annotation))
    names = {member.id for member in members if isinstance(member, ast.Name)}
    generics = [
        (ast.unparse(member.value), member.slice) for member in members if isinstance(member, ast.Subscript)
    ]
    literals = [inner for outer, inner in generics if outer == "Literal"]
    words = [ast.literal_eval(inner) for inner in literals]
    return {
        "type": next((name for name in _TYPES if name in names), "str"),
        "choices": tuple(word for each in words for word in (each if isinstance(each, tuple) else (each,))),
        "many": any(outer in ("Iterable", "Sequence") for outer, _ in generics),
        "none": any(isinstance(member, ast.Constant) and member.value is None for member in members),
    }


def _members(module: str, annotation: ast.AST | None) -> Iterator[ast.AST]:
    """The types in a union, aliases of ours followed."""
    if isinstance(annotation, ast.BinOp):
        yield from _members(module, annotation.left)
        yield from _members(module, annotation.right)
        return
    if isinstance(annotation, ast.Name) and annotation.id not in _TYPES:
        try:
            home, value = _find(module, annotation.id)
        except LookupError:
            return  # a type of another package, which the command cannot give
        if not isinstance(value, ast.ClassDef):
            yield from _members(home, value)
    elif annotation is not None:
        yield annotation


def _help_of_arguments(module: str, node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """The first sentence on each argument; "as in `other`" is looked up in `other`."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    section = re.search(r"^(?:Args|Attributes):\n((?: .*\n?|\n)*)", text, re.MULTILINE)
    sentences: dict[str, str] = {}
    for entry in _ENTRY.finditer(section[1] if section else ""):
        sentence = _SENTENCE.split(" ".join(entry["text"].split()), maxsplit=1)[0].replace("`", "")
        names, other = entry["names"].split(", "), _SAME_AS.search(entry["text"])
        sentences |= dict.fromkeys(names, sentence)
        if other is not None:
            home, definition = _find(module, other["name"])
            if isinstance(definition, (ast.FunctionDef, ast.ClassDef)):
                others = _help_of_arguments(home, definition)
                sentences |= {name: others[name] for name in names if name in others}
    return sentences
