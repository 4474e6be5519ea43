"""Do jobs that meet a full disk, a wrong folder, another job or a wrong clock lose nothing and say what it was? F27, F28."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.files import lock
from tests.conftest import Capsys, MonkeyPatch, jpeg, write_tar
from tests.folders import contents

Filling = Callable[..., tuple[int, str]]


def write_shard(path: Path, n: int, first: int = 0) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + n):
        members += [(f"s{i:05d}.jpg", jpeg(i)), (f"s{i:05d}.cls", b"%d" % (i % 2))]
    write_tar(path, members)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in/a.tar and in/b.tar, and features/ of them; tests work on copies."""
    home = tmp_path_factory.mktemp("home")
    (home / "in").mkdir()
    for i, name in enumerate("ab"):
        write_shard(home / "in" / f"{name}.tar", 40, 40 * i)
    adq.embed_shards(home / "in", "thumbnail", home / "features")
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """A copy of `home`, and the current folder."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


JOBS = {  # by name: the command, and what it writes to
    "embed": "embed in --encoder thumbnail -o {}",
    "plan": "plan features --bins 3 -o {}/plan.parquet",
    "codebook": "codebook features --bins 3 --min-pilot 5 -o {}/codebook.safetensors",
    "index": "index in -o {}/index.parquet",
    "write": "write in --max-samples 20 -o {}/%06d.tar",
    "run": "run in --encoder thumbnail --bins 3 -o {}",
}
WRITERS = {  # every command that writes, with all that it can write
    **JOBS,
    "run": f"{JOBS['run']} --write",
    "embed": f"{JOBS['embed']} --views 10",
    "write-patches": "write in --patch-keep 0.5 --importance random --size 64 -o {}/%06d.tar",
    "patches": "patches in -o {}/sheet.png --importance random --size 64",
    "pack": "pack photos -o {}/%06d.tar",
    "demo": "demo -o {} --encoder thumbnail --seeds 1 --epochs 1",
}


def command(job: str, folder: object, *, jobs: dict[str, str] = JOBS, home: Path | None = None) -> list[str]:
    """The words of a command that writes to a folder; it reads below `home`, or where it runs."""
    words = jobs[job].format(folder).split()
    inputs = ("in", "features", "photos")
    return [str(home / word) if home is not None and word in inputs else word for word in words]


# ---- F27: a full disk

FILL = """
import io, json, os, re, resource, sys
from contextlib import redirect_stderr, redirect_stdout
from adq_wds.cli.main import main

limit = name = None

def fill_up(event, arguments):  # as soon as the file is made that will take the name
    if limit is not None and name and event == "open" and re.fullmatch(f".*/[.]{name}[.].*partial", str(arguments[0])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

sys.addaudithook(fill_up)
for line in sys.stdin:
    name, limit, *command = json.loads(line)
    said = io.StringIO()
    if limit is not None and not name:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main(command)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(json.dumps([code, said.getvalue()]), flush=True)
"""

TARGETS = {  # what is written, by which job, after which change to its surroundings; and whether an old one stays
    "plan.parquet": ("plan", ["--seed", "1"], True),
    "a.parquet": ("embed", [], True),
    "codebook.safetensors": ("codebook", ["--seed", "1"], True),
    "index.parquet": ("index", [], True),
    "000001.tar": ("write", ["--overwrite"], False),
    "run.json": ("run", ["--seed", "1"], False),
}


@pytest.fixture(scope="module")
def filling() -> Iterator[Filling]:
    """filling(name, limit, *command): the command in one other process, on a disk with room for `limit` bytes of it.

    Without a name every file has so much room and no more.
    """
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", FILL], text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None

    def call(name: str | None, limit: int | None, *command: str) -> tuple[int, str]:
        process.stdin.write(json.dumps([name, limit, *command]) + "\n")
        process.stdin.flush()
        code, said = json.loads(process.stdout.readline())
        return code, said

    yield call
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=300)


@pytest.mark.parametrize("name", TARGETS)
def test_a_disk_that_fills_up_costs_no_file_and_is_named(name: str, here: Path, filling: Filling) -> None:
    """F27. Shards that `--overwrite` replaces, and a run.json of another plan, go first; none is ever torn."""
    job, changed, stays = TARGETS[name]
    target = here / "out" / name
    first = command(job, here / "out", home=here)
    second = [*first, *changed]
    assert main(first) == 0
    old = {path.name: path.read_bytes() for path in target.parent.iterdir() if path.is_file()}
    if name in ("a.parquet", "index.parquet"):
        write_shard(here / "in" / "a.tar", 50)
    assert main(second) == 0
    new = target.read_bytes()
    assert (new != old[name]) == (name != "000001.tar")
    for limit in (0, len(new) // 2, len(new) - 1):
        for other, data in old.items():
            (target.parent / other).write_bytes(data)
        code, said = filling(name, limit, *second)
        last = said.splitlines()[-1].partition(" (")[0]
        assert (code, last) == (1, f"adq: AdqError: cannot write {target}: no space left")
        assert (target.read_bytes() == old[name]) if stays else not target.exists()
        assert not list(target.parent.glob(".*"))
        assert not (target.parent / "_info.json").exists()
    assert filling(name, None, *second)[0] == 0
    assert target.read_bytes() == new


@pytest.mark.parametrize("limit", [0, 10, 100, 4_000, 20_000])
@pytest.mark.parametrize("job", WRITERS)
def test_a_full_disk_at_any_write_leaves_nothing(job: str, limit: int, here: Path, filling: Filling) -> None:
    """F42: the lock's own text, scratch files and shared memory included."""
    for folder in ("out", "photos"):
        (here / folder).mkdir()
    (here / "photos" / "a.jpg").write_bytes(jpeg(0))
    code, said = filling(None, limit, *command(job, here / "out", jobs=WRITERS, home=here))
    assert_full(code, said, here / "out")
    if limit < 100:
        assert code == 1
        assert not any((here / "out").iterdir())


def assert_full(code: int, said: str, out: Path) -> None:
    """The job has ended well, or named where there was no room; what is left is whole and under its own name."""
    last = (said.splitlines() or [""])[-1]
    assert code in (0, 1), said
    if code:
        assert last.startswith(("adq: AdqError: ", "adq: FeaturesError: ")), said
        assert str(out) in last or "no shared memory" in last
        assert "File too large" in last or "No space left" in last
    assert not list(out.rglob(".*")), said


FULL = """
import io, json, os, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from adq_wds.cli.main import main

for out, size, command in json.loads(sys.argv[1]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", out], check=True)
    with open(out + "/full", "wb") as full:
        full.write(bytes(65536 - size))
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main(command)
    print(json.dumps([code, said.getvalue(), os.listdir(out), os.stat(out + "/full").st_size]))
"""


def test_a_full_file_system_is_named_and_left_as_it_was(here: Path) -> None:
    """F42 by a small file system of its own, where one may be mounted."""
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(here / "in")]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("needs a mount of its own")
    cases = []
    for job, n_free in itertools.product(["index", "write"], [0, 4_096]):
        out = here / f"{job}-{n_free}"
        out.mkdir()
        cases.append((str(out), n_free, command(job, str(out))))
    run = ["unshare", "-rm", sys.executable, "-c", FULL, json.dumps(cases)]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for (out, n_free, _), line in zip(cases, result.stdout.splitlines(), strict=True):
        code, said, left, n_full = json.loads(line)
        assert (code, n_full) == (1, 65_536 - n_free)
        assert left == ["full"]
        assert_full(code, said, Path(out))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_standard_output_or_error_is_met(stream: str, here: Path) -> None:
    with open("/dev/full", "w") as full:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        result = subprocess.run(
            [sys.executable, "-m", "adq_wds", *command("plan", "out")], text=True, check=False, **streams
        )
    assert (here / "out" / "plan.parquet").exists()
    if stream == "stdout":
        assert result.returncode == 1
        said = "adq: AdqError: cannot write the standard output: No space"
        assert result.stderr.splitlines()[-1].startswith(said)
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0
        assert result.stdout


# ---- F28: a folder that is none, or none of ours


@pytest.mark.parametrize("job", JOBS)
def test_a_missing_folder_is_made(job: str, here: Path) -> None:
    assert main(command(job, "some/new/folder")) == 0
    assert [path for path in (here / "some/new/folder").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("job", JOBS)
def test_a_file_in_the_folders_place_is_named(job: str, here: Path, capsys: Capsys) -> None:
    (here / "file").write_text("mine")
    assert main(command(job, "file/out")) in (1, 2)
    assert "file/out" in capsys.readouterr().err
    assert (here / "file").read_text() == "mine"


READ_ONLY = """
import os, sys
from adq_wds.cli.main import main
import torch  # jobs import it when they begin, and then its files may be out of reach
import adq_wds.jobs.run, adq_wds.planning.fit_codebook, adq_wds.jobs.index, adq_wds.writing.write_shards, adq_wds.models.thumbnail
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # root may write anywhere
import json
for command in json.loads(sys.argv[1]):
    print(main(command), flush=True)
"""


def test_a_read_only_folder_is_named_by_every_job(home: Path) -> None:
    if os.geteuid() == 0 and not all(
        p.stat().st_mode & 0o001 for p in (Path(sys.prefix), *Path(sys.prefix).parents)
    ):
        pytest.skip("only root may read this environment, and root may write into read-only folders")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home, folder, dirs_exist_ok=True)
        out = Path(folder) / "out"
        out.mkdir(mode=0o555)
        Path(folder).chmod(0o755)
        commands = json.dumps([command(job, str(out)) for job in JOBS])
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, commands], capture_output=True, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert done.stdout.split() == ["1"] * len(JOBS), done.stderr
        told = [line for line in done.stderr.splitlines() if line.startswith("adq: ")]
        assert told == [f"adq: AdqError: cannot write into the folder {out}: permission denied"] * len(JOBS)
        assert list(out.iterdir()) == []


# ---- F28: what already stands in the file's place

FILES = {job: JOBS[job].rpartition("/")[2] for job in ("plan", "codebook", "index")}


@pytest.mark.parametrize("job", FILES)
def test_a_folder_in_the_files_place_is_named_and_left(job: str, here: Path, capsys: Capsys) -> None:
    path = here / "out" / FILES[job]
    path.mkdir(parents=True)
    assert main(command(job, "out")) == 1
    assert f"out/{FILES[job]}: " in capsys.readouterr().err
    assert list(path.iterdir()) == []
    assert [p.name for p in path.parent.iterdir()] == [FILES[job]]


@pytest.mark.parametrize("job", FILES)
def test_a_link_stays_a_link_and_its_file_is_written(job: str, here: Path) -> None:
    for folder in ("out", "store"):
        (here / folder).mkdir()
    path = here / "out" / FILES[job]
    path.symlink_to(here / "store" / f"real-{FILES[job]}")
    for _ in range(2):  # a link to nothing yet, then to a file
        assert main(command(job, "out")) == 0
        assert path.is_symlink()
        assert [p.name for p in (here / "store").iterdir()] == [f"real-{FILES[job]}"]


@pytest.mark.parametrize("target", ["itself", "missing/folder/file"])
@pytest.mark.parametrize("job", FILES)
def test_a_link_that_leads_nowhere_is_named(job: str, target: str, here: Path, capsys: Capsys) -> None:
    (here / "out").mkdir()
    path = here / "out" / FILES[job]
    path.symlink_to(path if target == "itself" else here / target)
    assert main(command(job, "out")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("adq: ")
    assert (FILES[job] if target == "itself" else target) in said
    assert path.is_symlink()


# ---- F28: two at once, and the clock


@pytest.mark.parametrize("job", JOBS)
def test_the_second_job_in_a_folder_hears_who_works_there(job: str, here: Path, capsys: Capsys) -> None:
    (here / "out").mkdir()
    with lock("out"):
        assert main(command(job, "out")) == 1
        said = capsys.readouterr().err
        assert f"AdqError: out is in use by pid {os.getpid()} on " in said
        assert "; wait for it, or choose another folder" in said
        assert os.listdir("out") == [".adq.lock"]
    assert main(command(job, "out")) == 0


@pytest.mark.parametrize("job", JOBS)
def test_a_clock_that_goes_backwards_changes_nothing(job: str, here: Path, monkeypatch: MonkeyPatch) -> None:
    assert main(command(job, "forwards")) == 0
    for name in ("time", "monotonic", "perf_counter"):
        ticks: Any = itertools.count(2e9, -3600.0)
        monkeypatch.setattr(time, name, lambda ticks=ticks: next(ticks))
    assert main(command(job, "backwards")) == 0
    monkeypatch.undo()
    assert contents(here / "forwards") == contents(here / "backwards")


@pytest.mark.parametrize("job", ["embed", "index", "run"])
def test_a_shard_replaced_by_an_older_one_is_noticed(job: str, here: Path) -> None:
    path = here / "in" / "a.tar"
    assert main(command(job, "out")) == 0
    before, size = contents(here / "out"), path.stat().st_size
    assert main(command(job, "out")) == 0
    assert contents(here / "out") == before
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xd8", 4096) + 2
    data[at : at + 2] = b"\xff\xe1" if data[at : at + 2] != b"\xff\xe1" else b"\xff\xe0"
    path.write_bytes(data)
    os.utime(path, (0, 0))
    assert path.stat().st_size == size
    assert main(command(job, "out")) == 0
    assert contents(here / "out") != before
    for file in (here / "out").rglob("*.parquet"):
        os.utime(file, (0, 0))  # a result that looks older than its shards still holds
    after = contents(here / "out")
    assert main(command(job, "out")) == 0
    assert contents(here / "out") == after
