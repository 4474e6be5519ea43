"""Do `pipe:` commands run only where the program allows it, and end whole, in time, and without a word of theirs? S4."""

import contextlib
import gzip
import logging
import os
import selectors
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.index import index_shards
from adq_wds.jobs.verify import verify_shards
from adq_wds.remote.backend import Access
from adq_wds.remote.fetch import Fetch
from adq_wds.remote.open_shard import open_shard
from adq_wds.tables.spans import scan_spans, source_stamp
from adq_wds.writing.write_shards import write_kept
from tests.programs import soon
from tests.stream.conftest import TarSet, contents, write_set

TOKEN = "s3cret"  # noqa: S105


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> TarSet:
    return write_set(tmp_path_factory.mktemp("commands"), [12, 5])


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a command would make, if it ran."""
    return tmp_path / "ran"


def read(command: str, *, timeout: float = 60.0) -> bytes:
    with open_shard(f"pipe:{command}", fetch=Fetch(allow_pipe=True, access=Access(timeout))) as view:
        return view[:]


def processes(word: str) -> list[int]:
    """Those that run with a word among their arguments."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes().decode("utf-8", "replace"):
                pids.append(int(path.parent.name))
    return pids


def left_of(word: str) -> list[int]:
    """Those that do not go: one that is killed takes a moment."""
    soon(lambda: not processes(word))
    return processes(word)


@pytest.fixture
def no_process_outlives(request: pytest.FixtureRequest) -> Iterator[str]:
    """A word for commands; none that holds it runs afterwards."""
    if not os.path.exists("/proc/self/cmdline"):
        pytest.skip("needs /proc")
    word = f"adq{os.getpid()}x{abs(hash(request.node.name)) % 10**6}"
    yield word
    left = left_of(word)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


# ---- refused

FORMS = ["pipe:{}", "PIPE:{}", "  pipe:{}", "Pipe: {}", "{tar}::pipe:{}", "pipe:{};cat {tar}"]
CALLS: dict[str, Callable[[list[str], TarSet, Path], object]] = {
    "ShardDataset": lambda urls, tars, out: adq.ShardDataset(urls),
    "ShardDataset with a plan": lambda urls, tars, out: adq.ShardDataset(urls, plan=tars.plan),
    "ShardDataset, False": lambda urls, tars, out: adq.ShardDataset(urls, allow_pipe=False),
    "embed_shards": lambda urls, tars, out: adq.embed_shards(urls, out=out),
    "index_shards": lambda urls, tars, out: index_shards(urls, out),
    "verify_shards": lambda urls, tars, out: verify_shards(tars.plan, urls),
    "Plan.from_keys": lambda urls, tars, out: adq.Plan.from_keys(urls, None),
    "write_kept": lambda urls, tars, out: write_kept(urls, None, out / "%06d.tar"),
    "write_kept with a plan": lambda urls, tars, out: write_kept(urls, tars.plan, out / "%06d.tar"),
}
COMMANDS = {
    "run": lambda urls, tars, out: ["run", *urls, "-o", out],
    "run --dry-run": lambda urls, tars, out: ["run", *urls, "-o", out, "--dry-run"],
    "embed": lambda urls, tars, out: ["embed", *urls, "-o", out],
    "embed --dry-run": lambda urls, tars, out: ["embed", *urls, "-o", out, "--dry-run"],
    "index": lambda urls, tars, out: ["index", *urls, "-o", out],
    "write": lambda urls, tars, out: ["write", *urls, "--plan", tars.plan, "-o", f"{out}/%06d.tar"],
    "write, no plan": lambda urls, tars, out: ["write", *urls, "-o", f"{out}/%06d.tar"],
    "verify": lambda urls, tars, out: ["verify", tars.plan, *urls],
}


def forms(marker: Path, tar: str) -> list[str]:
    command = f"touch {marker} #token={TOKEN}"
    return [form.replace("{tar}", tar).replace("{}", command) for form in FORMS]


@pytest.mark.parametrize("call", CALLS)
def test_a_command_is_refused_without_being_run_or_quoted(
    call: str, tars: TarSet, tmp_path: Path, marker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for url in forms(marker, tars.urls[0]):
            with pytest.raises(ValueError, match="is a command, and running it is refused") as error:
                CALLS[call]([tars.urls[1], url], tars, tmp_path / "out")
            assert TOKEN not in str(error.value)
    assert not marker.exists()
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_with_exit_code_2(
    command: str, tars: TarSet, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in forms(marker, tars.urls[0]):
        words = map(str, COMMANDS[command]([tars.urls[1], url], tars, tmp_path / "out"))
        assert main([*words]) == 2
        out, err = capsys.readouterr()
        assert "is a command, and running it is refused" in err
        assert TOKEN not in err + out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "reads",
    [lambda url: open_shard(url).__enter__(), lambda url: scan_spans(url, shard="a.tar"), source_stamp],
    ids=["open_shard", "scan_spans", "source_stamp"],
)
def test_what_is_below_them_refuses_too(reads: Callable[[str], object], marker: Path) -> None:
    for url in (f"pipe:touch {marker} {TOKEN}", f" PIPE:touch {marker} {TOKEN}"):
        with pytest.raises(adq.ShardError, match="a 'pipe:' URL runs a command, and is ref") as error:
            reads(url)
        assert TOKEN not in str(error.value)
    assert not marker.exists()


def test_a_plan_or_an_index_names_no_command(tars: TarSet, marker: Path) -> None:
    """The names are a stranger's; only `urls` are the program's."""
    with pytest.raises(adq.PlanError, match=r"(not in|is not among) the"):
        adq.ShardDataset([f"pipe:touch {marker}"], plan=tars.plan, allow_pipe=True)
    assert not marker.exists()


@pytest.mark.parametrize("known", ["plan", "none"])
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_allowed_commands_stream_as_their_files(
    tars: TarSet, tmp_path: Path, known: str, n_workers: int, cached: bool
) -> None:
    urls = [f"pipe:cat {tars.urls[0]}", f"pipe:gzip -c {tars.urls[1]}"]
    plan = tars.plan if known == "plan" else None
    cache = tmp_path / "c" if cached else None
    dataset = adq.ShardDataset(urls, plan=plan, allow_pipe=True, cache=cache, batch_size=4)
    found = adq.Loader(dataset, num_workers=n_workers)
    assert contents(found) == contents(adq.ShardDataset(tars.urls, plan=plan))


def test_with_a_cache_a_command_runs_once(tars: TarSet, tmp_path: Path) -> None:
    log = tmp_path / "log"
    url = f"pipe:echo x >> {log}; cat {tars.urls[0]}"
    dataset = adq.ShardDataset([url], allow_pipe=True, cache=tmp_path / "c")
    for _ in range(3):
        assert len(list(dataset)) == 12
    assert log.read_text() == "x\n"


def test_a_slow_command_is_waited_for_as_long_as_it_writes(
    tars: TarSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its parts may take the whole timeout."""
    tar, data = Path(tars.urls[1]), Path(tars.urls[1]).read_bytes()
    waits, select = [], selectors.DefaultSelector.select

    def noted(self: Any, timeout: float) -> Any:
        waits.append(timeout)
        return select(self, timeout)

    monkeypatch.setattr(selectors.DefaultSelector, "select", noted)
    part = f"dd if={tar} bs=2048 2>/dev/null"
    slowly = f"for i in $(seq 0 7); do {part} skip=$i count=1; sleep 0.05; done; {part} skip=8"
    assert read(slowly, timeout=200.0) == data
    assert len(waits) > 1
    assert set(waits) == {200.0}


ENDED = "its command ended with exit code"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("exit 3", f"{ENDED} 3: run it by hand to see why"),
        (f"false {TOKEN}", f"{ENDED} 1"),
        (f"no-such-program --token {TOKEN} 2>&1 >/dev/null | cat >&2; exit 127", f"{ENDED} 127"),
        ("kill -9 $$", f"{ENDED} -9"),
        ("cat {tar}; exit 22", f"{ENDED} 22"),
        (f"echo 'authorization: {TOKEN}' >&2; exit 1", f"{ENDED} 1"),
        ("true", "empty, expected a tar file"),
        ("head -c 700 {tar}", "truncated|declares"),
        ("gzip -c {tar} | head -c 300", "truncated: the gzip stream ends early"),
        (f"echo {TOKEN} is not a tar | head -c 600", None),
    ],
)
def test_a_failing_command_is_an_error_without_a_word_of_it(
    tars: TarSet, command: str, text: str | None, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    command = command.replace("{tar}", tars.urls[0]) + f" #{TOKEN}"
    with caplog.at_level(logging.DEBUG), pytest.raises(adq.ShardError, match=text) as error:
        adq.ShardDataset([f"pipe:{command}"], allow_pipe=True)
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    cause: BaseException | None = error.value
    while cause is not None and text is not None:  # what it writes as a tar is data
        assert TOKEN not in str(cause)
        cause = cause.__cause__ or cause.__context__


@pytest.mark.parametrize(
    "command", ["sleep 600", "head -c 700 {tar}; sleep 600", "cat {tar}; exec >&-; sleep 600"]
)
def test_a_stalling_command_ends_at_the_timeout(tars: TarSet, no_process_outlives: str, command: str) -> None:
    text = f"(its command wrote nothing for 0.3 s|{ENDED} none after 0.3 s)"
    with pytest.raises(adq.ShardError, match=text):
        read(f"true {no_process_outlives}; {command.replace('{tar}', tars.urls[0])}", timeout=0.3)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("yes", "not a tar file"),
        ("cat /dev/zero", r"more than Limits.padding_bytes"),
        ("cat /dev/urandom", "not a tar file"),
        ("cat {tar}; cat /dev/zero", "more than Limits.padding_bytes"),
        ("cat {tar}; yes", "data after the end-of-archive marker"),
        ("gzip -c {tar}; cat /dev/zero", "as no packed shard does: refused"),
        ("while :; do printf '' | gzip -c; done", "as no packed shard does: refused"),
    ],
)
def test_an_endless_command_is_refused_at_once(
    tars: TarSet, command: str, text: str, no_process_outlives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ended, while somebody still holds the error."""
    monkeypatch.setattr("adq_wds.remote.expand._IDLE", 10_000 if "while" in command else 1 << 20)
    command = f"true {no_process_outlives}; " + command.replace("{tar}", tars.urls[0])
    with pytest.raises(adq.ShardError, match=text) as held:
        read(command)
    assert held.value.__traceback__ is not None
    assert left_of(no_process_outlives) == []


def test_what_a_command_left_in_the_background_ends_with_it(tars: TarSet, no_process_outlives: str) -> None:
    data = Path(tars.urls[0]).read_bytes()
    sleeper = f"sh -c 'sleep 600; : {no_process_outlives}'"
    assert read(f"{sleeper} >/dev/null & cat {tars.urls[0]}") == data
    with pytest.raises(adq.ShardError, match="its command wrote nothing for 1 s"):  # it holds the pipe open
        read(f"{sleeper} & cat {tars.urls[0]}", timeout=1)
    assert left_of(no_process_outlives) == []


def test_a_stream_that_is_left_ends_its_commands(tmp_path: Path, no_process_outlives: str) -> None:
    """It runs one ahead: 64 samples before the first that it needs."""
    tars, started = write_set(tmp_path, [200, 5]), tmp_path / "started"
    command = f"pipe:true {no_process_outlives}; touch {started}; cat {tars.urls[1]}; sleep 600"
    stream = iter(adq.ShardDataset([tars.urls[0], command], plan=tars.plan, allow_pipe=True, timeout=2.0))
    for _ in range(70):
        next(stream)
    assert soon(started.exists)
    del stream


def test_a_command_reads_nothing_from_our_input(tars: TarSet) -> None:
    """A worker's standard input is nobody's to read; a program that asks gets an end."""
    assert read(f"cat; cat {tars.urls[1]}") == Path(tars.urls[1]).read_bytes()


def test_names_of_commands_are_their_tars(tars: TarSet) -> None:
    command = f"curl -H 'token: {TOKEN}' https://me:{TOKEN}@h/x/t-000.tar?k={TOKEN} || cat {tars.urls[0]}"
    for each in (command, f"cat {shlex.quote(tars.urls[0])}"):
        with pytest.raises(adq.ShardError, match=f"^shard t-000.tar: {ENDED} 3: run it by hand to see why$"):
            read(f"{each}; exit 3")


def test_a_packed_command_is_unpacked_in_pieces(tars: TarSet) -> None:
    data = Path(tars.urls[0]).read_bytes()
    octal = "".join(f"\\{byte:03o}" for byte in gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    assert read(f"printf '{octal[:400]}'; sleep 0.05; printf '{octal[400:]}'") == data
