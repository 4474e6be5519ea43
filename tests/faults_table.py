"""Prints which tests prove which fault's figure: `python -m tests.faults_table`.

A test proves F7 when its docstring, its module's, or a comment inside it names F7; F2–F5 names four.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"\b([FS])(\d+)(?:\s*[-–]\s*[FS]?(\d+))?\b")
ROWS = [*(f"F{i}" for i in range(1, 47)), *(f"S{i}" for i in range(1, 7))]


def rows_in(text: str) -> set[str]:
    """The rows that a text names.

    >>> sorted(rows_in("F2–F5 by a plan, and S1"))
    ['F2', 'F3', 'F4', 'F5', 'S1']
    """
    return {
        f"{kind}{i}"
        for kind, first, last in ROW.findall(text)
        for i in range(int(first), int(last or first) + 1)
    } & set(ROWS)


def names_by_row() -> dict[str, list[str]]:
    """Names as pytest takes them, by row; a module that names a row stands for its tests."""
    found = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, text in _parts(path):
            for row in rows_in(text):
                found[row].append(f"{path.relative_to(TESTS.parent)}{name}")
    return {row: found[row] for row in ROWS}


def _parts(path: Path) -> Iterator[tuple[str, str]]:
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    yield "", ast.get_docstring(module) or ""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = source.splitlines()[node.lineno : node.end_lineno]
            comments = [line.partition("#")[2] for line in body if "#" in line]
            yield f"::{node.name}", "\n".join([ast.get_docstring(node) or "", *comments])


def main() -> None:
    for row, names in names_by_row().items():
        sys.stdout.write(f"{row:4}" + "\n    ".join(names or ["no test names it"]) + "\n")


if __name__ == "__main__":
    main()
