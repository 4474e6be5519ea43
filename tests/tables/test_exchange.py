"""A selection survives every form that it is written in, whatever its keys are."""

import csv
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.cli.parser import keys_in
from adq_wds.tables.exchange import FORMATS
from tests.conftest import Caplog, Capsys, write_tar
from tests.tampering import explained, small_plan

HOSTILE = [
    "plain", "a,b", 'qu"ote', "it's", "=SUM(1)", "+1", "-2", "@x", "ключ", "مفتاح", "鍵", "👨‍👩‍👧", "\u202ertl", "tab\tkey",
    "sp ace ", "\ufeffbom", "dir/k", "line\u2028sep", "back\\slash", "%s", "<script>", "null", "1e5", "'; DROP",
]  # fmt: skip
KEY_LISTS = ["txt", "csv", "jsonl"]


def tar_of(path: Path, keys: list[str]) -> Path:
    """A shard with two members for each key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, [(f"{k}.{f}", f"{f} of {k}".encode()) for k in keys for f in ("txt", "cls")])


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards whose first key is the same."""
    return [
        str(tar_of(tmp_path / name, ["twice", *HOSTILE[i::2]])) for i, name in enumerate(["a.tar", "b.tar"])
    ]


@pytest.fixture
def plan(shards: list[str]) -> adq.Plan:
    """Keeps all but every third sample, and one of the two of the same key."""
    n = len(HOSTILE) + 2
    return adq.Plan.from_indices(shards, [i for i in range(n) if i == 0 or (i % 3 and i != n // 2)])


@pytest.fixture
def alone(tmp_path: Path) -> tuple[str, adq.Plan]:
    """A shard and a plan of it, whose keys tell the samples apart."""
    shard = str(tar_of(tmp_path / "c.tar", HOSTILE))
    return shard, adq.Plan.from_keys(shard, HOSTILE[::2])


@pytest.mark.parametrize("to", [*KEY_LISTS, "indices"])
def test_a_selection_is_read_back_equal(to: str, plan: adq.Plan, shards: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"keep.{'npy' if to == 'indices' else to}"
    plan.export(to, path)
    assert adq.Plan.from_file(shards, path).hash == plan.hash
    before = path.read_bytes()
    plan.export(to, path, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("to", ["csv", "jsonl"])
def test_keys_with_newlines_survive_csv_and_jsonl(to: str, tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "a.tar", ["new\nline", "re\rturn", "both\r\n", "x"])
    plan = adq.Plan.from_keys(str(shard), ["new\nline", "re\rturn", "both\r\n"])
    plan.export(to, tmp_path / f"keep.{to}")
    assert adq.Plan.from_file(str(shard), tmp_path / f"keep.{to}").hash == plan.hash


def test_txt_refuses_a_key_with_a_newline_and_writes_nothing(tmp_path: Path) -> None:
    plan = adq.Plan.from_keys(str(tar_of(tmp_path / "a.tar", ["new\nline"])), None)
    with pytest.raises(adq.PlanError, match=r"key 'new\\nline' holds a newline.*write csv or jsonl"):
        plan.export("txt", tmp_path / "keep.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_txt_is_what_must_include_reads(plan: adq.Plan, tmp_path: Path) -> None:
    plan.export("txt", tmp_path / "keep.txt")
    read = [key if isinstance(key, str) else key[1] for key in keys_in(str(tmp_path / "keep.txt"))]
    assert read == plan.keys()


def test_csv_leaves_formulas_as_they_are_and_warns(plan: adq.Plan, tmp_path: Path, caplog: Caplog) -> None:
    with caplog.at_level(logging.WARNING, "adq_wds"):
        plan.export("csv", tmp_path / "keep.csv")
    assert "keys begin with = + - or @, which a spreadsheet runs as formulas" in caplog.text
    with open(tmp_path / "keep.csv", encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == plan.keys()


def test_indices_are_positions_among_all_samples(tmp_path: Path) -> None:
    small_plan().export("indices", tmp_path / "keep.npy")
    kept = small_plan().table()["kept"].to_numpy()
    assert np.load(tmp_path / "keep.npy").tolist() == np.flatnonzero(kept).tolist()


def test_indices_of_shards_that_count_otherwise_are_warned_of(tmp_path: Path, caplog: Caplog) -> None:
    shards = [str(tar_of(tmp_path / f"s-{i}.tar", [f"k{i}"])) for i in (10, 9)]
    with caplog.at_level(logging.WARNING, "adq_wds"):
        adq.Plan.from_keys(shards, ["k9"]).export("indices", tmp_path / "keep.npy")
    assert "s-10.tar comes before s-9.tar" in caplog.text
    assert np.load(tmp_path / "keep.npy").tolist() == [1]
    with pytest.raises(ValueError, match=r"'s-10.tar' comes before 's-9.tar'; give the shards in that order"):
        adq.Plan.from_indices(shards[::-1], [1])


def test_a_mask_and_indices_give_one_plan(plan: adq.Plan, shards: list[str], tmp_path: Path) -> None:
    mask = plan.table()["kept"].to_numpy()
    np.save(tmp_path / "mask.npy", mask)
    assert adq.Plan.from_indices(shards, mask).hash == plan.hash
    assert adq.Plan.from_indices(shards, np.flatnonzero(mask).astype(np.uint16)[::-1]).hash == plan.hash
    assert adq.Plan.from_file(shards, tmp_path / "mask.npy").hash == plan.hash


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 99], "index 99 is out of range; the shards hold 26 samples"),
        ([-1], "index -1 is out of range"),
        ([3, 3], "index 3 is given 2 times"),
        ([True], "the mask has 1 entries, the shards hold 26 samples"),
        ([0.5], "dtype float64; expected"),
        ([[1]], r"shape \(1, 1\)"),
        (["a"], "dtype <U1; expected"),
    ],
)
def test_indices_that_name_no_samples_are_refused(indices: Any, message: str, shards: list[str]) -> None:
    with pytest.raises(ValueError, match=message):
        adq.Plan.from_indices(shards, indices)


def test_a_parquet_filter_is_one_that_readers_take(alone: tuple[str, adq.Plan], tmp_path: Path) -> None:
    _, plan = alone
    pq.write_table(plan.table(), tmp_path / "table.parquet")
    plan.export("parquet-filter", tmp_path / "keep.json")
    filters = json.loads((tmp_path / "keep.json").read_text())
    assert pq.read_table(tmp_path / "table.parquet", filters=filters)["key"].to_pylist() == plan.keys()


def test_a_condition_in_sql_selects_the_kept_keys(alone: tuple[str, adq.Plan], tmp_path: Path) -> None:
    _, plan = alone
    plan.export("lancedb", tmp_path / "keep.sql")
    with sqlite3.connect(":memory:") as db:
        db.execute("CREATE TABLE t (key TEXT)")
        db.executemany("INSERT INTO t VALUES (?)", [(key,) for key in HOSTILE])
        rows = db.execute(f"SELECT key FROM t WHERE {(tmp_path / 'keep.sql').read_text()}").fetchall()  # noqa: S608
    assert [key for (key,) in rows] == plan.keys()


def test_tags_list_keys_by_reason(tmp_path: Path) -> None:
    adq.load_plan(explained(tmp_path / "plan.parquet")).export("tags", tmp_path / "tags.json")
    tags = json.loads((tmp_path / "tags.json").read_text())
    assert tags == {"kept": ["k0"], "quota": ["k1"], "duplicate": ["k2"], "excluded": ["k3"]}
    small_plan().export("tags", tmp_path / "old.json")  # version 1
    tags = json.loads((tmp_path / "old.json").read_text())
    assert {name: len(keys) for name, keys in tags.items()} == {"kept": 8, "quota": 14, "left out": 2}


def test_webshart_indexes_give_the_bytes_of_kept_members(tmp_path: Path) -> None:
    shards = [str(tar_of(tmp_path / name, ["k0", "k1", "k2"])) for name in ("x/a.tar", "y/a.tar")]
    plan = adq.Plan.from_keys(shards, [("x/a.tar", "k1"), ("y/a.tar", "k0")])
    plan.export("webshart", tmp_path / "indexes")
    for name, key in (("x/a", "k1"), ("y/a", "k0")):
        files = json.loads((tmp_path / "indexes" / f"{name}.json").read_text())["files"]
        raw = (tmp_path / f"{name}.tar").read_bytes()
        payloads = {member: raw[e["offset"] : e["offset"] + e["length"]] for member, e in files.items()}
        assert payloads == {f"{key}.{field}": f"{field} of {key}".encode() for field in ("txt", "cls")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["indexes", "x", "y"]
    with pytest.raises(adq.AdqError, match="indexes is not empty; give a new folder"):
        plan.export("webshart", tmp_path / "indexes", overwrite=True)


def test_webshart_refuses_samples_whose_members_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(
        adq.PlanError, match=r"shard a.tar, key 'k0': where its members lie is not in the plan"
    ):
        small_plan().export("webshart", tmp_path / "old")
    shard = tar_of(tmp_path / "a.tar", ["ключ"])
    with pytest.raises(adq.PlanError, match=r"shard a.tar, key 'ключ': .*not ASCII"):
        adq.Plan.from_keys(str(shard), None).export("webshart", tmp_path / "long")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("to", ["parquet-filter", "lancedb", "tags"])
def test_a_form_of_keys_only_refuses_a_key_in_several_shards(to: str, plan: adq.Plan, tmp_path: Path) -> None:
    with pytest.raises(adq.PlanError, match=r"shard a.tar, key 'twice': also in b.tar, .*write csv or jsonl"):
        plan.export(to, tmp_path / "keep")
    assert not (tmp_path / "keep").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_an_empty_selection_is_written_and_warned_of(to: str, tmp_path: Path, caplog: Caplog) -> None:
    shard = str(tar_of(tmp_path / "a.tar", ["x", "y"]))
    plan = adq.Plan.from_keys(shard, [])
    with caplog.at_level(logging.WARNING, "adq_wds"):
        plan.export(to, tmp_path / "keep")
    assert "the plan keeps no sample" in caplog.text
    if to in KEY_LISTS or to == "indices":
        suffix = "npy" if to == "indices" else to
        plan.export(to, tmp_path / f"keep.{suffix}")
        assert adq.Plan.from_file(shard, tmp_path / f"keep.{suffix}").hash == plan.hash
    if to == "parquet-filter":
        pq.write_table(plan.table(), tmp_path / "t.parquet")
        assert not pq.read_table(tmp_path / "t.parquet", filters=json.loads((tmp_path / "keep").read_text()))


def test_a_file_that_exists_is_replaced_only_when_asked(plan: adq.Plan, tmp_path: Path) -> None:
    (tmp_path / "keep.csv").write_text("mine")
    with pytest.raises(adq.AdqError, match=r"keep.csv exists; give another name, or overwrite=True"):
        plan.export("csv", tmp_path / "keep.csv")
    with pytest.raises(adq.AdqError, match="it is a folder; give a file name"):
        plan.export("csv", tmp_path)
    assert (tmp_path / "keep.csv").read_text() == "mine"


def test_an_unknown_form_lists_all(plan: adq.Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no format 'litdata'; expected one of txt, csv, .*webshart"):
        plan.export("litdata", tmp_path / "x")


def npy(header: str) -> str:
    """The text of a .npy file of that header, in latin-1."""
    return f"\x93NUMPY\x01\0{chr(len(header))}\0{header}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.csv", "shard,name\na,b\n", r"no column 'key' among \['shard', 'name'\]"),
        ("k.csv", "", "no column 'key'"),
        ("k.csv", 'key\n"open', "line 1: not CSV|line 2: not CSV"),
        ("k.csv", "shard,key\na.tar\n", "line 2: expected a key, and maybe its shard, as text; got"),
        ("k.jsonl", '"x"\n{"shard": "a.tar"}\n', "line 2: expected a key"),
        ("k.jsonl", "[1, 2]\n", r"line 1: expected .* got \[1, 2\]"),
        ("k.jsonl", "{", "line 1: not JSON"),
        ("k.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("k.npy", "text", "not an array of indices or a mask"),
        ("k.npy", "", "not an array of indices or a mask"),
        (
            "k.npy",
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",)}"),
            "not an array",
        ),
        ("k.npy", npy("{'descr': ["), "not an array of indices or a mask"),
        ("k.txt", "\xff", "not UTF-8 text"),
        ("k.txt", None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_list_is_named(
    name: str, text: str | None, message: str, shards: list[str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(adq.PlanError, match=f"{name}.*({message})"):
        adq.Plan.from_file(shards, tmp_path / name)


def test_a_list_of_another_ending_or_of_pickles_is_refused(shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the ending .txt, .csv, .jsonl, or .npy"):
        adq.Plan.from_file(shards, tmp_path / "keep.parquet")
    np.save(tmp_path / "keep.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(adq.PlanError, match="not an array of indices"):
        adq.Plan.from_file(shards, tmp_path / "keep.npy")


def test_lists_that_people_make_are_read(shards: list[str], tmp_path: Path) -> None:
    wanted = adq.Plan.from_keys(shards, ["plain", ("a.tar", "twice")]).hash
    lists: dict[str, str] = {
        "k.txt": "\ufeffplain\r\na.tar\ttwice\r\n",
        "k.csv": "\ufeffkey,score,shard\r\nplain,1,\r\ntwice,2,a.tar\r\n",
        "k.jsonl": '"plain"\n\n["a.tar", "twice"]\n',
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert adq.Plan.from_file(shards, tmp_path / name).hash == wanted, name


def test_the_command_exports(plan: adq.Plan, tmp_path: Path, capsys: Capsys) -> None:
    plan.save(tmp_path / "plan.parquet")
    out = tmp_path / "keep.csv"
    assert main(["export", str(tmp_path), "--to", "csv", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{plan.n_kept} kept samples in {out}\n"
    assert main(["export", str(tmp_path), "--to", "csv", "-o", str(out)]) == 1
    assert "give another name, or --overwrite" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--to", "csv", "-o", str(out), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "format": "csv", "kept": plan.n_kept}


@pytest.mark.parametrize("words", [["export", "--help"], ["export", "p", "--to", "wds", "-o", "x"]])
def test_the_command_lists_the_forms(words: list[str], capsys: Capsys) -> None:
    with pytest.raises(SystemExit):
        main(words)
    shown = capsys.readouterr()
    assert all(name in shown.out + shown.err for name in FORMATS)
    if "--help" in words:
        assert all(f"{name} " in shown.out and form.help in shown.out for name, form in FORMATS.items())
