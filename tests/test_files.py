"""Files are whole or not there; folders have one writer."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adq_wds.errors import AdqError
from adq_wds.files import atomic_path, canonical_json, lock, make_folder, write_text


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (KeyError("x"), KeyError, "x"),
        *((OSError(code, "full"), AdqError, r"cannot write .*a.txt: no space left")
          for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    ],
)  # fmt: skip
def test_a_file_appears_whole_or_the_old_one_stays_alone(
    raised: Exception, kind: type[Exception], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    with pytest.raises(kind, match=text), atomic_path(path) as partial:  # noqa: PT012 - the write comes first
        partial.write_text("half")
        raise raised
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_really_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    """F27, by a limit on the file size in a process of its own."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import resource, signal, sys\n"
        "from adq_wds.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"write_text({str(path)!r}, 'x' * 100_000)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"AdqError: cannot write {path}: no space left" in out.stderr
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_impossible_targets_are_refused_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(AdqError, match="it is a folder; give a file name"):
        write_text(tmp_path, "x")
    with pytest.raises(AdqError, match=r"cannot write .*nowhere.*No such file"):
        write_text(tmp_path / "nowhere" / "a", "x")
    (tmp_path / "file").touch()
    with pytest.raises(AdqError, match="cannot make the folder"):
        make_folder(tmp_path / "file" / "below")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_second_job_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = f"from adq_wds.files import lock\nwith lock({str(tmp_path)!r}):\n    print('held', flush=True)\n    input()\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(AdqError, match=rf"is in use by pid {process.pid} on .* since"), lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    with lock(tmp_path):  # the dead hold nothing
        pass


def test_a_folder_is_free_and_clean_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_went_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may remove the file between our opening and our locking it; the old file protects nothing."""
    real, calls = fcntl.flock, []

    def flock(handle: int, flags: int) -> None:
        calls.append(flags)
        if len(calls) == 1:
            (tmp_path / ".adq.lock").unlink()
        real(handle, flags)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(AdqError, match=rf"in use by pid {os.getpid()}"), lock(tmp_path):
            pass


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": [1, 0.1], "a": "é"}) == canonical_json({"a": "é", "b": [1, 0.1]})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
