"""Options read from the source are those that Python sees."""

import inspect
from collections.abc import Iterable
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from adq_wds import signatures
from adq_wds.checks import Count, Ratio
from adq_wds.cli import arguments
from adq_wds.signatures import options_of

FUNCTIONS = sorted(
    {
        value
        for module in (arguments, signatures)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and value.startswith("adq_wds.")
    }
)


def keyword_only(function: str) -> tuple[Any, dict[str, inspect.Parameter]]:
    module, _, name = function.rpartition(".")
    found = getattr(import_module(module), name)
    parameters = inspect.signature(found).parameters.values()
    return found, {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def members(hint: Any) -> set[Any]:
    """The types in a union; of a generic that is no `Literal` and none of ours its origin."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(members, get_args(hint)))
    ours = hint in (Ratio, Count) or get_origin(hint) is Literal
    return {hint if ours or get_origin(hint) is None else get_origin(hint)}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_names_and_defaults_are_those_of_the_function(function: str) -> None:
    _, parameters = keyword_only(function)
    assert {name: option.default for name, option in options_of(function).items()} == {
        name: parameter.default for name, parameter in parameters.items()
    }


@pytest.mark.parametrize("function", FUNCTIONS)
def test_types_are_those_of_the_function(function: str) -> None:
    found, _ = keyword_only(function)
    only_for_types = {"MaskedAutoencoder": object}
    hints = get_type_hints(found, localns=only_for_types, include_extras=True)
    for name, option in options_of(function).items():
        types = members(hints[name])
        assert option.none == (type(None) in types), name
        assert option.choices == tuple(
            word for each in types if get_origin(each) is Literal for word in get_args(each)
        )
        assert option.many == (Iterable in types), name
        for word, kind in (("bool", bool), ("Ratio", Ratio), ("Count", Count), ("int", int)):
            assert (option.type == word) == (kind in types), name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_option_is_said_in_the_docstring(function: str) -> None:
    assert all(
        option.help for name, option in options_of(function).items() if name not in ("progress", "out")
    )


SOURCE = '''"""A module
from adq_wds.elsewhere import keep
"""
from adq_wds.checks import Count
HALF = "a" + "b"
"""What this is."""
Words = Literal["x", "y"] | None


class Way:
    """A way.

    Attributes:
        fast: not
            slow. Or so.
    """


def call(
    first, *, text: str = HALF, words: Words = None, n: Count = 1 << 3, fast: bool = True, other: float | None = None
) -> None:
    """Do it.

    Args:
        first: no option.
        text: 5.5 % of it: e.g. this.
            And more.
        words, n: both
        fast: so, as in `Way`.

    Raises:
        other: not an argument.
    """


def odd(*, x: int = len("abc")) -> None: ...
'''


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signatures.pkgutil.get_data
    monkeypatch.setattr(
        signatures.pkgutil,
        "get_data",
        lambda package, file: SOURCE.encode() if file == "made_up.py" else real(package, file),
    )


def test_a_function_is_read_as_it_stands(module: None) -> None:
    options = options_of("adq_wds.made_up.call")
    read = {
        name: (option.type, option.default, option.choices, option.none, option.help)
        for name, option in options.items()
    }
    assert read == {
        "text": ("str", "ab", (), False, "5.5 % of it: e.g. this"),
        "words": ("str", None, ("x", "y"), True, "both"),
        "n": ("Count", 8, (), False, "both"),
        "fast": ("bool", True, (), False, "not slow"),
        "other": ("float", None, (), True, ""),
    }


@pytest.mark.parametrize("name", ["nothing", "HALF", "Way", "odd"])
def test_what_is_no_function_with_plain_defaults_is_refused(name: str, module: None) -> None:
    with pytest.raises(LookupError, match=name if name != "odd" else "len"):
        options_of(f"adq_wds.made_up.{name}")
