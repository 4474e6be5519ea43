"""Shows names from data on one line of a page: what would move or hide text is written as an escape."""

from __future__ import annotations

from adq_wds.errors import printable

LONGEST = 80


def shown(value: object, longest: int = LONGEST) -> str:
    r"""A value as one line of text; a long one is cut in the middle.

    Control characters, line ends, tabs and marks that turn the direction of text become escapes, as on a terminal.

    >>> shown("caf\u00e9\n\x1b[31m\u202egnp"), shown("abcdefgh", longest=5)
    ('café\\n\\x1b[31m\\u202egnp', 'ab…gh')
    """
    text = printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) <= longest:
        return text
    head = longest // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"
