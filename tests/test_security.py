"""Does anything in a file that a stranger wrote ever run? S1."""

import base64
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.embedding.stored import open_embeddings
from adq_wds.jobs.index import index_shards
from adq_wds.models.checkpoints import PICKLE_SUFFIXES, load_weights
from tests.conftest import jpeg, write_tar
from tests.folders import load_index
from tests.programs import run
from tests.tampering import codebook


class Runs:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved_by(save: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
    """What a function writes into the file among its arguments: `FILE` stands for it."""
    file = io.BytesIO()
    save(*(file if each is FILE else each for each in arguments), **options)
    return file.getvalue()


FILE = object()
SHELL = Runs(os.system, "exit 0")
PROCESS = Runs(subprocess.Popen, ["true"])
NETWORK = Runs(socket.create_connection, ("127.0.0.1", 9), 0.1)
OBJECTS = np.array([SHELL, 1], dtype=object)
PAYLOADS = {
    "pickle 0": pickle.dumps(SHELL, 0),
    "pickle 5": pickle.dumps(PROCESS, 5),
    "pickle of a connection": pickle.dumps(NETWORK),
    "gzip of a pickle": gzip.compress(pickle.dumps(SHELL)),
    "npy of objects": saved_by(np.save, FILE, OBJECTS, allow_pickle=True),
    "npz of objects": saved_by(np.savez, FILE, OBJECTS),
    "torch zip": saved_by(torch.save, {"state_dict": {"w": torch.zeros(2)}, "x": SHELL}, FILE),
    "torch legacy": saved_by(
        torch.save, {"w": torch.zeros(2), "x": PROCESS}, FILE, _use_new_zipfile_serialization=False
    ),
    "YAML": b"!!python/object/apply:os.system ['exit 0']\n",
    "Python": b"__import__('os').system('exit 0')\n",
    "JSON that names code": json.dumps({"__reduce__": "os.system", "py/object": "subprocess.Popen"}).encode(),
}


def main_fails(*command: Any) -> None:
    """Run a command; raise what it says."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main([str(word) for word in command])
    if code:
        kind, _, text = said.getvalue().strip().splitlines()[-1].removeprefix("adq: ").partition(": ")
        raise getattr(adq, kind, ValueError)(f"exit code {code}: {text}")


def stream(tar: Path, **options: Any) -> None:
    list(adq.ShardDataset(str(tar), **options))


def as_member(tar: Path, data: Path) -> Path:
    """A shard whose fields are that file's bytes, under every name that a decoder might act on."""
    names = [
        "jpg", "cls", "json", "txt", "emb.npy", "npy", "npz", "pkl", "pickle", "pyd", "pth", "pt", "ten", "tb", "mp",
    ]  # fmt: skip
    return write_tar(tar, [(f"a.{name}", data.read_bytes()) for name in names])


def resume(dataset: adq.ShardDataset, state: Any) -> None:
    adq.Loader(dataset).load_state_dict(state)


Opener = Callable[[Path, Path], object]  # of the file, and of a folder with good ones
ROLES: dict[str, list[Opener]] = {  # a file's name → all that would open it
    "plan.parquet": [
        lambda file, home: adq.load_plan(file),
        lambda file, home: adq.Subsample(file),
        lambda file, home: stream(home / "in/a.tar", plan=file),
        lambda file, home: main_fails("show", file),
        lambda file, home: main_fails("verify", file, home / "in"),
        lambda file, home: main_fails("write", home / "in", "--plan", file, "-o", home / "out/%d.tar"),
    ],
    "index.parquet": [
        lambda file, home: load_index(file),
        lambda file, home: stream(home / "in/a.tar", index=file),
        lambda file, home: index_shards(home / "in", file),
        lambda file, home: main_fails("verify", file, home / "in"),
    ],
    "codebook.safetensors": [
        lambda file, home: adq.load_codebook(file),
        lambda file, home: adq.AssignBins(file),
        lambda file, home: adq.Subsample(file, keep=0.5),
        lambda file, home: main_fails("show", file),
    ],
    "features/a.parquet": [
        lambda file, home: adq.Features(file.parent),
        lambda file, home: adq.build_plan(file.parent),
        lambda file, home: main_fails("codebook", file.parent, "-o", home / "c.safetensors"),
        lambda file, home: main_fails("verify", file.parent, home / "in"),
    ],
    "bins.parquet": [lambda file, home: adq.Bins.load(file)],
    "stored.npy": [
        lambda file, home: open_embeddings(file),
        lambda file, home: main_fails("embed", home / "in", "--embeddings", file, "-o", home / "f"),
    ],
    "stored.parquet": [
        lambda file, home: open_embeddings(file),
        lambda file, home: main_fails("embed", home / "in", "--embeddings", file, "-o", home / "f"),
    ],
    "model.safetensors": [
        lambda file, home: load_weights(file),
        lambda file, home: adq.encoder("test_resnet", checkpoint=file),
    ],
    **{
        f"model{suffix}": [
            lambda file, home: load_weights(file),
            lambda file, home: load_weights(file, allow_pickle=True),
        ]
        for suffix in PICKLE_SUFFIXES
    },
    "run.json": [lambda file, home: main_fails("run", "--from", file, "-o", home / "out")],
    "_info.json": [
        lambda file, home: index_shards(file, home / "i.parquet"),
        lambda file, home: main_fails("index", file, "-o", home / "i.parquet"),
    ],
    "state": [
        lambda file, home: resume(adq.ShardDataset(str(home / "in/a.tar")), file.read_bytes()),
        lambda file, home: resume(adq.ShardDataset(str(home / "in/a.tar")), {"version": file.read_bytes()}),
    ],
    "shard.tar": [
        lambda file, home: stream(file),
        lambda file, home: main_fails("index", file, "-o", home / "i.parquet"),
        lambda file, home: main_fails("embed", file, "--encoder", "thumbnail", "-o", home / "f"),
    ],
    "member": [
        lambda file, home: stream(as_member(home / "m.tar", file), pipes=[adq.Decode(label=None)]),
        lambda file, home: stream(as_member(home / "m.tar", file), pipes=[adq.AssignBins(codebook(), None)]),
        lambda file, home: main_fails("embed", as_member(home / "m.tar", file), "-o", home / "f", "--label", "none",
                                      "--embeddings", "field:emb.npy"),
        lambda file, home: main_fails("embed", as_member(home / "m.tar", file), "-o", home / "f", "--encoder", "thumbnail"),
    ],
}  # fmt: skip
ANSWERS = {
    "plan.parquet": "PlanError", "index.parquet": "ShardError|AdqError|PlanError", "codebook.safetensors": "CodebookError",
    "features/a.parquet": "FeaturesError", "bins.parquet": "PlanError", "stored.npy": "FeaturesError",
    "stored.parquet": "FeaturesError", "model.safetensors": "AdqError", "run.json": "ValueError", "state": "StateError",
    "_info.json": "ShardError", "shard.tar": "ShardError", "member": "SampleError",
    **{f"model{suffix}": "AdqError|ValueError" for suffix in PICKLE_SUFFIXES},
}  # fmt: skip
FORBIDDEN = (
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
)  # fmt: skip


def make_home(home: Path) -> None:
    (home / "in").mkdir(parents=True)
    fields = [(i, (("jpg", jpeg(i)), ("cls", b"%d" % (i % 2)))) for i in range(9)]
    write_tar(home / "in" / "a.tar", [(f"s{i}.{name}", data) for i, pairs in fields for name, data in pairs])


def open_all(folder: str) -> None:
    """In a process of its own: hand each file in `folder` to all that would open it, and say what came of it."""
    seen: list[str] = []
    home = Path(folder) / "home"
    make_home(home)
    adq.embed_shards(home / "in", "thumbnail", home / "warm")  # what is imported late is imported now
    adq.encoder("test_resnet", pretrained=False)
    sys.addaudithook(lambda event, _: seen.append(event) if event in FORBIDDEN else None)
    for role in ROLES:
        for file in sorted((Path(folder) / "files").glob(f"*/{role}")):
            for number, opener in enumerate(ROLES[role]):
                shutil.rmtree(home / "f", ignore_errors=True)
                try:
                    opener(file, home)
                    answer = ["no error", ""]
                except Exception as error:  # whatever it is: it is looked at by the test
                    answer = [type(error).__name__, str(error)]
                print(  # noqa: T201 - to the process that asked
                    json.dumps([file.parts[-1 - role.count("/") - 1], role, number, *answer, seen]),
                    flush=True,
                )
                seen.clear()
    pickle.loads(PAYLOADS["pickle 0"])  # noqa: S301 - the alarm works
    print(json.dumps(["alarm", "", 0, "", "", seen]), flush=True)  # noqa: T201


def outcomes(folder: Path) -> list[list[Any]]:
    code = f"from tests.test_security import open_all; open_all({str(folder)!r})"
    with contextlib.chdir(folder):
        done = run(code)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_file_under_any_name_runs_anything(tmp_path: Path) -> None:
    """S1: every payload under every name that something opens."""
    for name, data in PAYLOADS.items():
        for role in ROLES:
            path = tmp_path / "files" / name / role
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    assert len(PAYLOADS) * len(ROLES) >= 40
    *rows, alarm = outcomes(tmp_path)
    assert alarm[-1] == ["pickle.find_class", "os.system"]
    assert len(rows) == len(PAYLOADS) * sum(map(len, ROLES.values()))
    for payload, role, number, kind, text, events in rows:
        assert events == [], (payload, role, number)
        assert re.fullmatch(ANSWERS[role], kind), (payload, role, number, kind, text)
        assert role in ("member", "state") or Path(role).name in text or role == "shard.tar", (role, text)


def evil_columns(path: Path) -> Path:
    """The same Parquet file, whose key column says that it is of a pickled extension type."""
    file = pq.ParquetFile(path)
    tag = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(SHELL),
    }
    schema = file.schema_arrow
    i = schema.get_field_index("key")
    changed = schema.set(i, schema.field(i).with_metadata(tag))
    out = path.with_name("changed.parquet")
    with pq.ParquetWriter(out, changed.remove_metadata()) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            writer.write_table(pa.Table.from_arrays(table.columns, schema=changed.remove_metadata()))
        metadata = {k: v for k, v in file.metadata.metadata.items() if k != b"ARROW:schema"}
        writer.add_key_value_metadata(metadata)
    return out


def test_a_pickled_column_type_in_a_table_of_ours_runs_nothing(tmp_path: Path) -> None:
    """S1: as Arrow once unpickled it (CVE-2023-47248)."""
    make_home(tmp_path)
    adq.embed_shards(tmp_path / "in", "thumbnail", tmp_path / "features")
    adq.build_plan(tmp_path / "features", bins=2, out=tmp_path / "plan.parquet")
    index_shards(tmp_path / "in", tmp_path / "index.parquet")
    n = 0
    for role in ("plan.parquet", "index.parquet", "features/a.parquet"):
        good = tmp_path / role
        target = tmp_path / "child" / "files" / "extension" / role
        target.parent.mkdir(parents=True, exist_ok=True)
        evil_columns(good).rename(target)
        arrow = pq.read_metadata(target).metadata[b"ARROW:schema"]
        assert b"arrow.py_extension_type" in base64.b64decode(arrow)
        n += len(ROLES[role])
    *rows, _ = outcomes(tmp_path / "child")
    assert len(rows) == n
    assert [(role, number) for _, role, number, _, _, events in rows if events] == []
