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


def members(hint: Any) -> set[Any]:
    """The types in a union; of a generic that is no `Literal` and none of ours its origin."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(members, get_args(hint)))
    ours = hint in (Ratio, Count) or get_origin(hint) is Literal
    return {hint if ours or get_origin(hint) is None else get_origin(hint)}


each = pytest.mark.parametrize("function", FUNCTIONS)


@each
def test_an_option_is_the_functions_documented_argument(function: str) -> None:
    module, _, name = function.rpartition(".")
    value = getattr(import_module(module), name)
    parameters = [
        each for each in inspect.signature(value).parameters.values() if each.kind is each.KEYWORD_ONLY
    ]
    only_for_types = {"MaskedAutoencoder": object}
    options, hints = options_of(function), get_type_hints(value, None, only_for_types, include_extras=True)
    assert [(each.name, each.default) for each in parameters] == [
        (o.name, o.default) for o in options.values()
    ]
    for name, option in options.items():
        types = members(hints[name])
        assert option.none == (type(None) in types), name
        literals = [each for each in types if get_origin(each) is Literal]
        assert option.choices == tuple(word for each in literals for word in get_args(each))
        assert option.many == (Iterable in types), name
        for word, kind in (("bool", bool), ("Ratio", Ratio), ("Count", Count), ("int", int)):
            assert (option.type == word) == (kind in types), name
        assert option.help or name in ("progress", "out")


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
