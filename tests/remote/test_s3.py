"""S3 as users have it: an S3 API on loopback, from the plan to the stream."""

import os
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from tests.stream.conftest import TarSet, contents, write_set

boto3 = pytest.importorskip("boto3")
pytest.importorskip("obstore")
KEYS = {"access_key_id": "me", "secret_access_key": "s3cret-key", "region": "us-east-1"}


@pytest.fixture(scope="module")
def tar_set(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> TarSet:
    """Three shards, also under s3://bucket/data/."""
    made = write_set(tmp_path_factory.mktemp("s3"), [9, 14, 5])
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": "s3cret-key", "region_name": "us-east-1"}
    s3 = boto3.client("s3", endpoint_url=endpoint, **keys)
    s3.create_bucket(Bucket="bucket")
    for url in made.urls:
        s3.upload_file(url, "bucket", f"data/{Path(url).name}")
    return made


def test_a_plan_reads_shards_in_s3_with_options(endpoint: str, tar_set: TarSet, tmp_path: Path) -> None:
    urls, options = "s3://bucket/data/t-{000..002}.tar", {**KEYS, "endpoint": endpoint}
    local = contents(adq.ShardDataset(tar_set.urls, plan=tar_set.plan))
    for cache in (None, tmp_path / "cache"):
        dataset = adq.ShardDataset(urls, plan=tar_set.plan, storage_options=options, cache=cache)
        assert contents(dataset) == local
        assert "s3cret" not in repr(dataset)


def test_what_is_not_there_is_named_without_secrets(endpoint: str, tar_set: TarSet) -> None:
    options = {**KEYS, "endpoint": endpoint}
    for bucket, text in (("bucket/nowhere", "not found"), ("other", "not found")):
        urls = f"s3://{bucket}/t-{{000..002}}.tar"
        with pytest.raises(adq.ShardError, match=f"shard t-000.tar: {text}") as error:
            list(adq.ShardDataset(urls, plan=tar_set.plan, storage_options=options))
        assert "s3cret" not in str(error.value)


def test_the_commands_read_s3_by_the_environment(
    endpoint: str, tar_set: TarSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "s3cret-key", "REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT": endpoint, "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    urls = "s3://bucket/data/t-{000..002}.tar"
    assert main(["index", urls, "-o", str(tmp_path / "i.parquet")]) == 0
    assert main(["verify", tar_set.plan, urls]) == 0
    assert main(["write", urls, "--plan", tar_set.plan, "-o", str(tmp_path / "small" / "%06d.tar")]) == 0
    out = capsys.readouterr().out
    assert "28 samples of 3 shards in the plan: 28 ok, 0 differ, 0 missing" in out
    local = adq.ShardDataset(tar_set.urls, plan=tar_set.plan)
    written = adq.ShardDataset(os.fspath(tmp_path / "small"))
    assert [s["__key__"] for s in written] == [s["__key__"] for s in local]
