"""FORMAT.md names every column, header key and field of the files that are written."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from adq_wds.stream.state import State
from tests.conftest import MakeShard

ROOT = Path(__file__).parent.parent
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "FORMAT.md").read_text(encoding="utf-8"), re.M | re.S)
)
GOLDEN = ROOT / "tests" / "golden"
TITLES = {
    "index": "Index", "features": "Features", "bins": "Bins", "plan": "Plan", "soft": "Soft labels", "codebook": "Codebook",
}  # fmt: skip


def section(title: str) -> str:
    """The text of the section whose title begins so, after what all tables share."""
    (text,) = [text for name, text in SECTIONS.items() if name.strip("`").startswith(title)]
    return SECTIONS["What all tables share"] + text


def unnamed(names: Any, text: str) -> list[str]:
    return sorted(name for name in names if f"`{name}`" not in text)


def deep_keys(value: Any) -> set[str]:
    """Keys of a header and of the objects below it, without hashes by column and what is named by users."""
    if isinstance(value, list):
        return set().union(*map(deep_keys, value))
    if not isinstance(value, dict):
        return set()
    keys = set(value)
    for name, below in value.items():
        if name not in ("columns", "scores", "tensors", "reasons", "settings"):
            keys |= deep_keys(below)
    return keys


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.rglob("*.parquet")), ids=lambda path: str(path.relative_to(GOLDEN))
)
def test_every_column_and_header_key_of_golden_tables_is_named(path: Path) -> None:
    file = pq.ParquetFile(path)
    header = json.loads(file.metadata.metadata[b"adq_wds"])
    kind = header["format"].removeprefix("adq_wds.")
    text = section(TITLES[kind])
    assert unnamed(file.schema_arrow.names, text) == []
    assert unnamed(deep_keys(header), text) == []
    if kind == "plan":
        assert unnamed(header["settings"], text) == []


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.safetensors")), ids=lambda path: path.parent.name)
def test_every_tensor_and_header_key_of_codebooks_is_named(path: Path) -> None:
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["adq_wds"].split(" ", 1)[1])
        assert unnamed([*file.keys(), *header], section("Codebook")) == []


def test_every_version_is_told_apart() -> None:
    """A later version of a table names, in FORMAT.md, what it has that the one before lacks."""
    from adq_wds.tables import bins, codebook, features_file, index, plan, soft_labels, views

    assert f"{plan.VERSION} |\n" in section("Plan")
    assert f"{features_file.VERSION} |\n" in section("Features")
    others = {bins: "Bins", codebook: "Codebook", index: "Index", soft_labels: "Soft labels", views: "Views"}
    for module, title in others.items():
        assert f"ersion {module.VERSION}" in section(title), title


def test_every_field_of_a_saved_state_is_named() -> None:
    state = State("hash", 0, 0, True, False, 64, 8, 0).as_dict()
    assert unnamed(state, section("Saved state")) == []


def test_every_key_of_a_run_and_its_shards_is_named(make_shard: MakeShard, tmp_path: Path) -> None:
    from adq_wds.cli.main import main

    shard, out = make_shard("a-000000.tar", 12), tmp_path / "run"
    flags = ["--keep", "0.5", "--encoder", "thumbnail", "--write", "-o", str(out), "-q"]
    assert main(["run", str(shard), *flags]) == 0
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert unnamed([*run, *run["arguments"], *run["shards"][0]], section("run.json")) == []
    info = json.loads((out / "shards" / "_info.json").read_text(encoding="utf-8"))
    assert main(["verify", str(out), str(shard), "-o", str(tmp_path), "--label", "none", "-q"]) == 0
    check = json.loads((tmp_path / "a-000000.json").read_text(encoding="utf-8"))
    assert unnamed([*check, *check["source"]], section("Checks")) == []
    keys = {*info, *info["splits"]["train"]}
    assert [key for key in sorted(keys) if f'"{key}"' not in section("New shards")] == []


def test_every_key_of_the_demo_is_named() -> None:
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    assert unnamed(demo.keys() - {"command"}, section("demo.json")) == []
