"""Do imports run down only? The house's levels, stated once and read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import adq_wds

PACKAGE = Path(adq_wds.__file__).parent
# Each room may import the rooms on lines below its own, and core; files inside one room may import each other.
LEVELS = [
    ["cli"],
    ["demo"],
    ["jobs"],
    ["embedding", "planning", "writing"],
    ["registry"],
    ["stream"],
    ["reading"],
    ["pipes", "report"],
    ["mae", "saliency"],
    ["models"],
    ["tables"],
    ["engines"],
    ["remote"],
    ["samples"],
    ["shards"],
    ["files", "score"],
    ["protocols", "checks", "errors", "signatures"],
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(["adq_wds", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            if node.module == "adq_wds":
                yield from (f"adq_wds.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_every_import_runs_down(path: Path) -> None:
    module = module_of(path)
    if module in ("adq_wds", "adq_wds.__main__"):
        return
    for name in imports(path):
        if not name.startswith("adq_wds."):
            if room_of(module) == "core":
                assert name.split(".")[0] not in ("torch", "torchvision", "timm", "pyarrow"), (
                    f"{module} imports {name}"
                )
            continue
        here, there = room_of(module), room_of(name)
        if there == here or there == "core":
            continue
        assert here != "core", f"core imports {name}"
        assert there in LEVEL, f"{name} has no level; add its room to LEVELS"
        assert LEVEL[there] > LEVEL[here], f"{module} imports {name}, which is not below it"


def test_there_is_no_circle_of_files() -> None:
    """Not even inside a room: each file can be read after those that it imports."""
    modules = {module_of(path): path for path in files()}
    below = {
        module: {name for name in _modules(path, modules) if name not in (module, "adq_wds")}
        for module, path in modules.items()
        if module not in ("adq_wds", "adq_wds.__main__")
    }
    while below:
        leaves = {module for module, names in below.items() if not names & below.keys()}
        assert leaves, f"circles among {sorted(below)}"
        below = {module: names for module, names in below.items() if module not in leaves}


def _modules(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The files that a file imports: ``from room import file`` means the file, not the room."""
    names = list(imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return (name for name in names if name in known)


def test_every_file_has_a_level() -> None:
    for path in files():
        module = module_of(path)
        if module not in ("adq_wds", "adq_wds.__main__") and room_of(module) != "core":
            assert room_of(module) in LEVEL, module


def test_nothing_in_the_source_unpickles_or_evaluates() -> None:
    """S6: no pickle, eval, exec, yaml.load, shell, extractall; torch.load and np.load only in their safe forms."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cPickle", "dill", "marshal", "shelve"} & set(names), path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "os.system", "yaml.load", "pickle.loads"), (path, called)
            assert not called.endswith((".extractall", ".extract")), (path, called)
            assert keywords.get("shell") != "True", (path, called)
            if called.endswith("torch.load") and called != "safetensors.torch.load":
                assert keywords.get("weights_only") == "True", path
            if called in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", path


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, adq_wds; print([m for m in ('numpy', 'torch', 'pyarrow', 'timm', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
