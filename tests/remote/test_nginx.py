"""The stream and the commands over HTTP from nginx, where it is installed."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from tests.stream.conftest import TarSet, ids, write_set

pytest.importorskip("obstore")
CONFIG = """
{2} daemon off; worker_processes 1; pid {0}/pid; error_log {0}/errors;
events {{}}
http {{
  access_log {0}/access;
  client_body_temp_path {0}/1; proxy_temp_path {0}/2; fastcgi_temp_path {0}/3; uwsgi_temp_path {0}/4; scgi_temp_path {0}/5;
  server {{ listen 127.0.0.1:{1}; location / {{ root {0}/www; }} location /slow/ {{ alias {0}/www/; limit_rate 200k; }} }}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, TarSet, Path]]:
    """Its URL, the shards that it serves, and its access log."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    tar_set = write_set(folder / "www", [30, 14, 25])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not read the folder
    (folder / "conf").write_text(CONFIG.format(folder, port, user))
    process = subprocess.Popen(
        [program, "-c", str(folder / "conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            if time.monotonic() > deadline or process.poll() is not None:
                pytest.skip("nginx does not start here")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", tar_set, folder / "access"
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("place", ["", "/slow"])
def test_kept_samples_come_by_range(nginx: tuple[str, TarSet, Path], tmp_path: Path, place: str) -> None:
    url, tar_set, log = nginx
    query = f"?test={place[1:] or 'fast'}"
    urls = f"{url}{place}/t-{{000..002}}.tar{query}"
    local = list(adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True))
    for cache in (None, tmp_path / "cache"):
        found = list(adq.ShardDataset(urls, plan=tar_set.plan, shuffle=True, cache=cache))
        assert ids(found) == ids(local)
        assert [(s["txt"], s["cls"]) for s in found] == [(s["txt"], s["cls"]) for s in local]
    lines = [line for line in log.read_text().splitlines() if query in line]
    statuses = [line.split('" ')[1].split()[0] for line in lines]
    assert set(statuses) == {"206"}


def test_embedding_indexing_verifying_and_writing_take_urls(
    nginx: tuple[str, TarSet, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, tar_set, _ = nginx
    urls = f"{url}/t-{{000..002}}.tar"
    assert main(["index", urls, "-o", str(tmp_path / "i.parquet")]) == 0
    assert main(["verify", str(tmp_path / "i.parquet"), urls]) == 0
    assert main(["write", urls, "--plan", tar_set.plan, "-o", f"{tmp_path}/small/%06d.tar"]) == 0
    assert "69 samples of 3 shards in the index: 69 ok" in capsys.readouterr().out
    written = adq.ShardDataset(str(tmp_path / "small"))
    assert [s["__key__"] for s in written] == [key for _, key in tar_set.kept]


def test_a_run_over_http_is_a_run_over_files(
    nginx: tuple[str, TarSet, Path], make_shard: object, tmp_path: Path
) -> None:
    url, tar_set, _ = nginx
    shard = make_shard("a.tar", 40)  # type: ignore[operator]
    shutil.copy(shard, Path(tar_set.urls[0]).parent / "a.tar")
    options = ["--keep", "0.25", "--encoder", "thumbnail", "-o"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(["run", f"{url}/a.tar?token=s3cret", *options, str(tmp_path / "r")]) == 0
    assert main(["run", str(shard), *options, str(tmp_path / "l")]) == 0
    plans = [adq.load_plan(tmp_path / name / "plan.parquet") for name in "rl"]
    assert plans[0].hash == plans[1].hash
    for file in (tmp_path / "r").rglob("*"):
        if file.is_file():
            assert b"s3cret" not in file.read_bytes(), file
