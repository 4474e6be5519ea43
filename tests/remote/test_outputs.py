"""What is written to stores that machines share: the bytes of a local run, read back from there."""

import io
import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.engines import alone
from adq_wds.engines.engine import ThisProcess
from adq_wds.engines.shared import Shared, lock_for
from adq_wds.jobs.run import run_job
from adq_wds.remote import ranged_file
from adq_wds.remote.store import RemoteFile
from adq_wds.remote.url_path import UrlPath, as_path
from adq_wds.tables import parts
from tests import folders
from tests.embedded import shard_of

boto3 = pytest.importorskip("boto3")
pytest.importorskip("obstore")
SECRET = "s3cret-key"  # noqa: S105
RUN = ("--encoder", "thumbnail", "--keep", "0.5", "--bins", "3", "--workers", "1", "--quiet")


@dataclass
class Store:
    """An empty folder at a URL.

    Attributes:
        url: of the folder.
        all: reads the bytes of every file below it, by path.
        spoil: writes a file below it, by none of our code.
    """

    url: str
    all: Callable[[], dict[str, bytes]]
    spoil: Callable[[str, bytes], object]


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT": endpoint, "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=endpoint, **keys)


def in_s3(s3: Any) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)

    def contents() -> dict[str, bytes]:
        listed = s3.list_objects_v2(Bucket=bucket, Prefix="run/").get("Contents", [])
        keys = [entry["Key"] for entry in listed]
        return {
            key.removeprefix("run/"): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys
        }

    return Store(
        f"s3://{bucket}/run",
        contents,
        lambda name, data: s3.put_object(Bucket=bucket, Key=f"run/{name}", Body=data),
    )


def in_memory() -> Store:
    import fsspec

    memory, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/run"

    def contents() -> dict[str, bytes]:
        return {name.removeprefix(f"{folder}/"): memory.cat_file(name) for name in memory.find(folder)}

    def spoil(name: str, data: bytes) -> None:
        memory.pipe_file(f"{folder}/{name}", data)

    return Store(f"memory:/{folder}", contents, spoil)


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    return in_s3(request.getfixturevalue("s3")) if request.param == "s3" else in_memory()


@pytest.fixture
def memory() -> Store:
    return in_memory()


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    sizes = {"a": range(12), "b": range(12, 30), "c": range(30, 38)}
    return [str(shard_of(tmp_path / f"{name}.tar", samples)) for name, samples in sizes.items()]


def test_a_run_in_a_store_has_the_bytes_of_a_local_one(
    store: Store, shards: list[str], tmp_path: Path, capsys: Any
) -> None:
    local = tmp_path / "run"
    for out in (str(local), store.url):
        assert main(["run", *shards, *RUN, "--write", "-o", out]) == 0
    assert store.all() == folders.contents(local)
    assert f"{store.url}/plan.parquet" not in capsys.readouterr().err
    before = store.all()
    assert main(["run", *shards, *RUN, "--write", "-o", store.url, "--json"]) == 0
    assert '"nothing_to_do": true' in capsys.readouterr().out
    assert store.all() == before


@pytest.mark.parametrize("store", [pytest.param("s3", marks=pytest.mark.slow), "memory"], indirect=True)
def test_each_step_reads_and_writes_a_store(
    store: Store, shards: list[str], tmp_path: Path, capsys: Any
) -> None:
    local = tmp_path / "run"
    for out in (str(local), store.url):
        assert main(["embed", *shards, "--encoder", "thumbnail", "-o", f"{out}/features", "-q"]) == 0
        assert (
            main(["plan", f"{out}/features", "--keep", "0.5", "--bins", "3", "-o", f"{out}/plan.parquet"])
            == 0
        )
        assert main(["codebook", f"{out}/features", "--bins", "3", "-o", f"{out}/cb.safetensors"]) == 0
        assert main(["index", *shards, "-o", f"{out}/index.parquet"]) == 0
        assert main(["write", *shards, "--plan", out, "-o", f"{out}/small/%06d.tar"]) == 0
    assert store.all() == folders.contents(local)
    capsys.readouterr()
    for listed in ("features", "plan.parquet", "index.parquet"):
        assert main(["verify", f"{store.url}/{listed}", *shards]) == 0
        assert "38 ok, 0 differ" in capsys.readouterr().out
    assert main(["verify", f"{store.url}/small/index.parquet", f"{store.url}/small/000000.tar"]) == 0
    assert main(["index", f"{store.url}/small/_info.json", "-o", str(tmp_path / "i.parquet")]) == 0
    for shown in (f"{store.url}/plan.parquet", f"{store.url}/cb.safetensors", store.url):
        assert main(["show", shown, "-q"]) == 0


@pytest.mark.parametrize("store", [pytest.param("s3", marks=pytest.mark.slow), "memory"], indirect=True)
def test_what_is_in_a_store_opens_as_what_is_local(store: Store, shards: list[str], tmp_path: Path) -> None:
    local, out = tmp_path / "run", store.url
    for to in (str(local), out):
        features = adq.embed_shards(shards, "thumbnail", f"{to}/features")
        adq.build_plan(features, bins=3, keep=0.5, out=f"{to}/plan.parquet")
        adq.fit_codebook(features, bins=3, out=f"{to}/cb.safetensors")
    assert adq.Features(f"{out}/features").hash == adq.Features(local / "features").hash
    one = adq.Features(f"{out}/features/", shards=["b.tar"])
    assert (one.files[0].embedding() == adq.Features(local / "features").files[1].embedding()).all()
    plan, codebook = adq.load_plan(f"{out}/plan.parquet"), adq.load_codebook(f"{out}/cb.safetensors")
    assert plan.table().equals(adq.load_plan(local / "plan.parquet").table())
    assert codebook.hash == adq.load_codebook(local / "cb.safetensors").hash
    for opened in (plan, codebook):
        assert len(pickle.dumps(opened)) < 1000  # its path and hash
        assert pickle.loads(pickle.dumps(opened)).hash == opened.hash  # noqa: S301
    keys = [
        [s["__key__"] for s in adq.ShardDataset(shards, plan=f"{to}/plan.parquet")] for to in (local, out)
    ]
    assert keys[0] == keys[1]
    samples = [{**sample, "__url__": shards[0]} for sample in folders.samples_in(Path(shards[0]))]
    kept = adq.Subsample(f"{out}/plan.parquet").apply(samples)
    assert [s["__key__"] for s in kept] == keys[0][: len(kept)]
    assert kept


@pytest.mark.parametrize("store", [pytest.param("s3", marks=pytest.mark.slow), "memory"], indirect=True)
def test_tables_in_parts_are_written_to_a_store_and_read_there(
    store: Store, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ONE_FILE", 1)
    monkeypatch.setattr(parts, "PART_SHARDS", 2)
    local = tmp_path / "run"
    for out in (str(local), store.url):
        features = adq.embed_shards(shards, "thumbnail", f"{out}/features")
        adq.build_plan(features, bins=3, keep=0.5, out=f"{out}/plan.parquet")
        assert main(["index", *shards, "-o", f"{out}/index.parquet", "-q"]) == 0
    there = store.all()
    assert there == folders.contents(local)
    assert len([name for name in there if "/part-" in name]) == 2 * 2
    plan = adq.load_plan(f"{store.url}/plan.parquet")
    assert plan.table().equals(adq.load_plan(local / "plan.parquet").table())
    keys = [
        [s["__key__"] for s in adq.ShardDataset(shards, plan=f"{to}/plan.parquet")]
        for to in (local, store.url)
    ]
    assert keys[0] == keys[1] != []
    assert main(["verify", f"{store.url}/index.parquet", *shards, "-q"]) == 0
    monkeypatch.setattr(parts, "ONE_FILE", 9)
    adq.build_plan(adq.Features(local / "features"), bins=3, keep=0.6, out=f"{store.url}/plan.parquet")
    assert [name for name in store.all() if name.startswith("plan")] == ["plan.parquet"], "old parts go"


def test_a_file_read_by_ranges_is_the_file(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_file, "BLOCK", 64)
    rng = np.random.default_rng(0)
    data = rng.bytes(1000)
    memory.spoil("f.bin", data)
    plain, ranged = io.BytesIO(data), ranged_file.RangedFile(f"{memory.url}/f.bin")
    for _ in range(300):
        start, n = int(rng.integers(0, 1100)), int(rng.integers(-1, 200))
        for file in (plain, ranged):
            file.seek(start)
        assert ranged.read(n) == plain.read(n)
        assert ranged.tell() == plain.tell() or start > 1000
    assert ranged.seek(-10, io.SEEK_END) == 990
    assert ranged.read() == data[-10:]


def test_features_are_opened_by_their_footers_and_read_by_columns(
    memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(tmp_path / "big.tar", 300)
    made = adq.embed_shards(str(shard), "thumbnail", f"{memory.url}/features")
    monkeypatch.setattr(ranged_file, "BLOCK", 64 << 10)  # Arrow asks for as much
    n_bytes: list[int] = []
    ranges = RemoteFile.read_ranges

    def counted(self: RemoteFile, asked: Any) -> list[bytes]:
        n_bytes.extend(end - start for start, end in asked)
        return ranges(self, asked)

    monkeypatch.setattr(RemoteFile, "read_ranges", counted)
    (opened,) = adq.Features(f"{memory.url}/features")
    assert n_bytes == [64 << 10]
    n_bytes.clear()
    opened.embedding()
    assert len(n_bytes) == 1
    assert n_bytes[0] < 2 * opened.n * made.width + 4000  # and headers of pages


class Killed(BaseException):
    """The process ends here."""


def test_a_killed_run_goes_on_where_it_was(
    memory: Store, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", *shards, *RUN, "--write", "-o"]
    assert main([*command, str(tmp_path / "run")]) == 0
    whole = folders.contents(tmp_path / "run")
    put, n_puts = UrlPath.put, 0

    def killed_at(last: int) -> Callable[[UrlPath, Path], None]:
        def put_or_die(self: UrlPath, path: Path) -> None:
            nonlocal n_puts
            n_puts += 1
            if n_puts == last:
                raise Killed
            put(self, path)

        return put_or_die

    for last in (2, 3, 4):  # features of b, of c after those of b; the plan after the bins
        n_puts = 0
        monkeypatch.setattr(UrlPath, "put", killed_at(last))
        with pytest.raises(Killed):
            main([*command, memory.url])
        there = memory.all()
        assert there.items() <= whole.items()
        assert len(there) < len(whole)
    monkeypatch.setattr(UrlPath, "put", put)
    assert main([*command, memory.url]) == 0
    assert memory.all() == whole


def test_a_damaged_object_is_named_and_features_are_made_again(
    memory: Store, shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["run", *shards, *RUN, "-o", memory.url]) == 0
    whole = memory.all()
    data = bytearray(whole["plan.parquet"])
    data[200] ^= 1
    for name, damaged, text in (
        ("plan.parquet", bytes(data), "damaged"),
        ("plan.parquet", whole["plan.parquet"][:-9], "not a readable Parquet file"),
        ("plan.parquet", b"PAR1" + b"\xff" * 8, "a footer of 4,294,967,295 bytes in a file of 12"),
        ("plan.parquet", b"", "not a readable Parquet file"),
    ):
        memory.spoil(name, damaged)
        with pytest.raises(adq.PlanError, match=f"plan.parquet.*{text}"):
            adq.load_plan(f"{memory.url}/{name}").table()
    memory.spoil("features/b.parquet", whole["features/b.parquet"][:-100])
    with pytest.raises(adq.FeaturesError, match=r"b\.parquet: not a readable Parquet file"):
        adq.Features(f"{memory.url}/features")
    assert main(["run", *shards, *RUN, "-o", memory.url]) == 0
    assert memory.all() == whole
    assert "embedding the shard again" in caplog.text


def test_a_codebook_that_claims_too_much_is_refused_before_it_is_fetched(memory: Store) -> None:
    memory.spoil("cb.safetensors", (1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(adq.CodebookError, match=r"a header of .* bytes in a file of 10"):
        adq.load_codebook(f"{memory.url}/cb.safetensors")
    memory.spoil("run.json", bytes((1 << 26) + 1))
    with pytest.raises(OSError, match="67,108,865 bytes, at most 67,108,864"):
        as_path(f"{memory.url}/run.json").read_text()


def test_what_is_missing_is_named(store: Store) -> None:
    with pytest.raises(adq.PlanError, match=r"plan\.parquet: no such file"):
        adq.load_plan(f"{store.url}/plan.parquet")
    with pytest.raises(adq.CodebookError, match=r"cb\.safetensors: no such file"):
        adq.load_codebook(f"{store.url}/cb.safetensors")
    with pytest.raises(adq.FeaturesError, match="no features here"):
        adq.Features(f"{store.url}/features")


def test_a_bucket_that_is_missing_or_refuses_is_named_before_any_work(
    s3: Any, shards: list[str], server: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for endpoint, text in ((None, "not found (404)"), (f"{server.url}/403", "refused (403)")):
        if endpoint:
            monkeypatch.setenv("AWS_ENDPOINT", endpoint)
        assert main(["embed", *shards, "--encoder", "thumbnail", "-o", "s3://nowhere-at-all/f"]) == 1
        err = capsys.readouterr().err
        assert f"cannot write into s3://nowhere-at-all/f: {text}" in err
        assert len(err.splitlines()) == 1
        assert SECRET not in err


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("nonsense://b/f", "nothing here reads nonsense:// URLs: install the fsspec file system"),
        ("http://me:s3cret-key@127.0.0.1:9/f", "an http URL is for reading"),
        ("pipe:cat > s3cret-key", "a 'pipe:' command is no place for a file"),
    ],
)
def test_what_cannot_be_written_to_is_said_without_secrets(
    shards: list[str], out: str, text: str, capsys: Any
) -> None:
    assert main(["embed", *shards, "--encoder", "thumbnail", "-o", out]) == 1
    err = capsys.readouterr().err
    assert text in err
    assert SECRET not in err


def test_without_the_extra_its_name_is_said(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("adq_wds.remote.store.importlib.util.find_spec", lambda name: None)
    assert main(["embed", *shards, "--encoder", "thumbnail", "-o", "s3://bucket/f"]) == 1
    assert "pip install 'adq-wds[cloud]'" in capsys.readouterr().err


def test_no_secret_of_a_url_is_shown() -> None:
    url = "https://me:s3cret-key@host/run/plan.parquet?token=s3cret-key"
    path = as_path(url)
    assert os.fspath(path) == url
    assert SECRET not in f"{path} {path!r}"
    assert str(path.parent / "features") == "https://host/run/features"
    with pytest.raises(adq.PlanError) as error:
        adq.load_plan("http://me:s3cret-key@127.0.0.1:9/plan.parquet?token=s3cret-key")
    assert SECRET not in str(error.value)
    assert SECRET not in str(error.value.__cause__)


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    assert as_path(f"file://{tmp_path}/a%20b") == tmp_path / "a b"


def test_a_name_that_a_url_changes_is_refused(memory: Store, tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a#1.tar", 4)
    with pytest.raises(adq.AdqError, match=r"'a#1\.parquet' reads otherwise in a URL"):
        adq.embed_shards(str(shard), "thumbnail", f"{memory.url}/features")
    with pytest.raises(adq.AdqError, match="the name 'a#1' reads otherwise in a URL"):
        adq.embed_shards(str(shard), "thumbnail", f"{memory.url}/a#1/features")


def test_a_file_that_is_replaced_after_it_was_opened_is_not_read(s3: Any) -> None:
    store = in_s3(s3)
    for data in (b"b" * 1000, b"b" * 2000):
        store.spoil("a", b"a" * 1000)
        file = as_path(f"{store.url}/a").open()
        store.spoil("a", data)
        with pytest.raises(OSError, match="changed on the server"):
            file.read(10)


def test_a_run_that_cannot_write_its_shards_is_refused_before_its_hours_of_work(
    memory: Store, shards: list[str]
) -> None:
    with pytest.raises(ValueError, match="only engine='threads' writes"):
        run_job(
            shards, memory.url, encoder={"spec": "none"}, embed={}, plan={}, write=True, engine="processes"
        )


@pytest.mark.slow
def test_workers_read_shards_and_plan_from_a_store(s3: Any, shards: list[str]) -> None:
    store = in_s3(s3)
    for shard in shards:
        store.spoil(f"data/{Path(shard).name}", Path(shard).read_bytes())
    urls = f"{store.url}/data/{{a,b,c}}.tar"
    assert main(["run", urls, *RUN, "-o", store.url]) == 0
    dataset = adq.ShardDataset(urls, plan=f"{store.url}/plan.parquet", batch_size=4)
    one, two = (list(adq.Loader(dataset, num_workers=n)) for n in (0, 2))
    assert one == two
    assert len(one) == 5


def test_one_job_at_a_time_writes_to_a_folder(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "BEAT", 0.1)
    folder = f"{in_s3(s3).url}/features"
    with lock_for(ThisProcess(), folder, "embed", {}):
        for engine in (ThisProcess(), Shared(folder, beat=0.1)):
            with (
                pytest.raises(adq.AdqError, match="is in use by another job"),
                lock_for(engine, folder, "embed", {}),
            ):
                raise AssertionError
    with lock_for(ThisProcess(), folder, "embed", {}):
        pass
    assert not as_path(folder).is_dir()


def test_a_store_without_leases_is_refused_for_many_and_warned_of_for_one(
    memory: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(adq.AdqError, match="conditional write"):
        Shared(memory.url)
    for _ in range(2):
        with lock_for(ThisProcess(), memory.url, "embed", {}):
            pass
    assert sum("start one at a time" in record.message for record in caplog.records) == 1
