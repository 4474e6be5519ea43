"""Is nothing that a URL may hold in secret ever said or stored, whatever goes wrong? S4."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import urlsplit

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.index import index_shards
from adq_wds.jobs.run import run_job
from adq_wds.jobs.verify import verify_shards
from adq_wds.remote import with_fsspec, with_obstore
from adq_wds.writing.write_shards import write_kept
from tests.conftest import NOBODY, Caplog, Capsys, MonkeyPatch, jpeg, write_tar
from tests.remote.conftest import Server

pytest.importorskip("obstore")
USER, PASSWORD, TOKEN = "s3cretuser", "s3cretpass", "s3crettoken"
Urls = Callable[..., list[str]]
Check = Callable[..., None]


@pytest.fixture(scope="module")
def plan(running: Server) -> str:
    """Two good shards of images in the server's folder, damaged ones beside them, and a plan of the good ones."""
    folder = Path(mkdtemp(dir=running.folder))
    for kind in ("good", "cut", "hurt", "bad"):
        (folder / kind).mkdir()
    for i in range(2):
        keys = range(8 * i, 8 * i + 8)
        fields = [(k, (("jpg", jpeg(k)), ("cls", b"%d" % (k % 2)))) for k in keys]
        members = [(f"s{k:03d}.{e}", d) for k, pairs in fields for e, d in pairs]
        data = bytearray(write_tar(folder / f"good/t-{i}.tar", members).read_bytes())
        (folder / f"cut/t-{i}.tar").write_bytes(data[:3000])
        second = data.index(b".cls")
        data[second + 96 : second + 120] = bytes(24)  # in its header
        (folder / f"hurt/t-{i}.tar").write_bytes(data)
        members[4] = (members[4][0], b"no image")
        write_tar(folder / f"bad/t-{i}.tar", members)
    adq.embed_shards(folder / "good", out=folder / "features")
    adq.build_plan(folder / "features", bins=2, keep=1.0, out=folder / "plan.parquet")
    return str(folder / "plan.parquet")


@pytest.fixture
def urls(server: Server, plan: str) -> Urls:
    """urls("good", fault="ok"): both shards of a kind, with a user, a password and a token."""

    def made(kind: str = "good", *, fault: str = "ok", host: str | None = None) -> list[str]:
        host = host or urlsplit(server.url).netloc
        base = f"http://{USER}:{PASSWORD}@{host}/{fault}/{Path(plan).parent.name}/{kind}"
        return [f"{base}/t-{i}.tar?token={TOKEN}&x=1#{TOKEN}" for i in range(2)]

    return made


@pytest.fixture
def nothing_told(caplog: Caplog, capfd: Capsys, tmp_path: Path) -> Check:
    """nothing_told(errors): no secret in these, in what was logged (ours: at any level), printed, or written."""

    def check(*errors: BaseException) -> None:
        logged = [r for r in caplog.records if r.name.startswith("adq_wds") or r.levelno >= logging.INFO]
        texts = [*capfd.readouterr(), *(record.getMessage() for record in logged)]
        for error in errors:
            seen: BaseException | None = error
            while seen is not None:
                texts += [str(seen), repr(seen)]
                seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        for path in tmp_path.rglob("*"):
            texts.append(str(path))
            with suppress(IsADirectoryError, FileNotFoundError):  # a cancelled fetch removes its partial file
                texts.append(path.read_bytes().decode("latin-1"))
        for text in texts:
            for secret in (USER, PASSWORD, TOKEN):
                assert secret not in text
        assert texts

    caplog.set_level(logging.DEBUG)
    return check


WRONG: dict[str, Callable[[Urls], list[str]]] = {
    "404": lambda urls: urls(fault="404"),
    "401": lambda urls: urls(fault="401"),
    "a page": lambda urls: urls(fault="page"),
    "refused connection": lambda urls: urls(host=NOBODY),
    "bad port": lambda urls: urls(host="127.0.0.1:99999"),
    "broken off": lambda urls: urls(fault="cut"),
    "truncated": lambda urls: urls("cut"),
    "damaged": lambda urls: urls("hurt"),
    "not there": lambda urls: urls("none"),
    "two match one": lambda urls: [urls()[0], urls()[0].replace("/ok/", "/404/")],
    "listed twice": lambda urls: [*urls(), urls()[1]],
    "same but for the token": lambda urls: [*urls(), urls()[1].replace(TOKEN, f"{TOKEN}2")],
    "bad braces": lambda urls: [urls()[0].replace("t-0", "t-{0..")],
    "too many": lambda urls: [urls()[0].replace("t-0", "t-{0..99999999}")],
    "unknown scheme": lambda urls: [url.replace("http:", "nonsense:") for url in urls()],
    "another machine's file": lambda urls: [url.replace("http:", "file:") for url in urls()],
}  # fmt: skip
CALLS: dict[str, Callable[[list[str], str, Path], object]] = {
    "ShardDataset": lambda urls, plan, out: list(adq.ShardDataset(urls, plan=plan, timeout=1.0)),
    "ShardDataset, cache": lambda urls, plan, out: list(adq.ShardDataset(urls, plan=plan, cache=out, timeout=1.0)),
    "ShardDataset, no plan": lambda urls, plan, out: list(adq.ShardDataset(urls, timeout=1.0)),
    "Plan.from_keys": lambda urls, plan, out: adq.Plan.from_keys(urls, None),
    "index_shards": lambda urls, plan, out: index_shards(urls, out / "i.parquet"),
    "verify_shards": lambda urls, plan, out: print(verify_shards(plan, urls).text()),  # noqa: T201
    "embed_shards": lambda urls, plan, out: adq.embed_shards(urls, out=out, workers=0),
    "write_kept": lambda urls, plan, out: write_kept(urls, plan, out / "%06d.tar"),
}  # fmt: skip


SLOW = ("refused connection", "bad port")  # they are tried again


def pairs(firsts: Any, seconds: Any, quick: str) -> list[Any]:
    """All of them; those that are tried again are slow, but one of each."""
    return [
        pytest.param(first, second, marks=[pytest.mark.slow] if first in SLOW and second != quick else [])
        for first in firsts
        for second in seconds
    ]


@pytest.mark.parametrize(("wrong", "call"), pairs(WRONG, CALLS, "ShardDataset"))
def test_errors_logs_and_files_hold_no_secret(
    call: str, wrong: str, urls: Urls, plan: str, tmp_path: Path, server: Server, nothing_told: Check
) -> None:
    server.cut = 100
    out = tmp_path / "out"
    out.mkdir()
    errors: list[BaseException] = []
    try:
        CALLS[call](WRONG[wrong](urls), plan, out)
    except (adq.AdqError, ValueError) as error:
        errors.append(error)
    assert errors or call == "verify_shards"  # which reports instead
    nothing_told(*errors)


@pytest.mark.parametrize(
    "wrong", ["404", "401", "a page", "refused connection", "broken off", "damaged", "not there"]
)
def test_nor_do_those_of_the_other_library(
    wrong: str, urls: Urls, plan: str, server: Server, nothing_told: Check, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("adq_wds.remote.store.importlib.util.find_spec", lambda name: None)
    server.cut = 100
    with pytest.raises(adq.ShardError) as error:
        list(adq.ShardDataset(WRONG[wrong](urls), plan=plan, timeout=1.0))
    nothing_told(error.value)


COMMANDS: dict[str, Callable[[list[str], str, Path], list[str]]] = {
    "run": lambda urls, plan, out: ["run", *urls, "-o", str(out), "--keep", "0.5", "--bins", "2"],
    "run --dry-run": lambda urls, plan, out: ["run", *urls, "-o", str(out), "--dry-run"],
    "embed": lambda urls, plan, out: ["embed", *urls, "-o", str(out)],
    "index": lambda urls, plan, out: ["index", *urls, "-o", str(out)],
    "write": lambda urls, plan, out: ["write", *urls, "--plan", plan, "-o", f"{out}/%06d.tar"],
    "verify": lambda urls, plan, out: ["verify", plan, *urls],
    "verify --json": lambda urls, plan, out: ["verify", plan, *urls, "--json"],
}  # fmt: skip
SOME = ("404", "refused connection", "damaged", "two match one", "listed twice", "bad braces")


@pytest.mark.parametrize(("wrong", "command"), pairs(SOME, COMMANDS, "embed"))
def test_what_a_command_says_holds_no_secret(
    command: str, wrong: str, urls: Urls, plan: str, tmp_path: Path, nothing_told: Check
) -> None:
    assert main(COMMANDS[command](WRONG[wrong](urls), plan, tmp_path / "out")) in (1, 2)
    nothing_told()


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_bad_samples_of_a_url_are_named_without_it(
    on_error: Any, urls: Urls, plan: str, nothing_told: Check, caplog: Caplog
) -> None:
    decode = adq.Decode(image="jpg", label="cls")
    dataset = adq.ShardDataset([urls()[0], urls("bad")[1]], pipes=[decode], on_error=on_error)
    errors: list[BaseException] = []
    if on_error == "raise":
        with pytest.raises(adq.SampleError, match=r"shard t-1.tar, key 's010', field 'jpg': ") as error:
            list(dataset)
        errors.append(error.value)
    else:
        assert len(list(dataset)) == 15
        assert "t-1.tar" in caplog.text
    nothing_told(*errors)


def test_a_good_run_writes_no_secret(urls: Urls, plan: str, tmp_path: Path, nothing_told: Check) -> None:
    """Features, bins, plan, run.json, shards, _info.json, index; a cache too. The plan is that of the files."""
    options: Any = {"encoder": {"spec": "thumbnail"}, "embed": {}, "plan": {"bins": 2, "keep": 0.5}}
    run_job(urls(), tmp_path / "run", write=True, **options)
    local = adq.embed_shards(Path(plan).parent / "good", "thumbnail", tmp_path / "local")
    made = adq.load_plan(tmp_path / "run" / "plan.parquet")
    assert made.hash == adq.build_plan(local, bins=2, keep=0.5).hash
    index_shards(urls(), tmp_path / "i.parquet")
    adq.Plan.from_keys(urls(), None).save(tmp_path / "p.parquet")
    list(adq.ShardDataset(urls(), index=tmp_path / "i.parquet", cache=tmp_path / "c"))
    text = (tmp_path / "run" / "run.json").read_text()
    paths = [shard["path"] for shard in json.loads(text)["shards"]]
    assert paths == [url.split("?")[0].replace(f"{USER}:{PASSWORD}@", "") for url in urls()]
    nothing_told()


def test_storage_options_are_in_no_repr_state_or_error(urls: Urls, plan: str, nothing_told: Check) -> None:
    options = {"client_options": {"default_headers": {"authorization": f"Bearer {TOKEN}"}}}
    dataset = adq.ShardDataset(urls(fault="403"), plan=plan, storage_options=options)
    loader = adq.Loader(dataset)
    print(repr(dataset), dataset, loader.state_dict())  # noqa: T201
    with pytest.raises(adq.ShardError) as error:
        next(iter(dataset))
    nothing_told(error.value)


@pytest.mark.parametrize(
    "kind", [OSError, ValueError, FileNotFoundError, PermissionError, TimeoutError, ConnectionError]
)
@pytest.mark.parametrize(
    "words", ["", "status code: 500", "status code: 302", "kind: Body", "kind: Connect", "TimedOut", "x"]
)
def test_no_word_of_a_librarys_error_is_passed_on(kind: type[Exception], words: str) -> None:
    """They quote URLs and answers."""
    error = kind(f"{words} at http://{USER}:{PASSWORD}@host/a.tar?token={TOKEN}")
    for library in (with_fsspec, with_obstore):
        text = str(library._trouble(error))
        assert text
        assert not [secret for secret in (USER, PASSWORD, TOKEN, "host/") if secret in text]
