"""Write the golden indexes of other libraries, made by these themselves of the shards that `make_shards` writes.

python -m tests.golden.others.make tests/golden/others     # with megatron-energon 7, webshart and wids installed
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NAMES = ["plain-000000.tar", "folders/long-000001.tar"]


def make_shards(folder: Path) -> list[Path]:
    """Two shards, the same bytes each time: plain names; and folders, PAX headers, files that belong to no sample."""
    plain, long = (folder / name for name in NAMES)
    long.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(plain, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(5):
            _add(tar, f"s{i:03d}.jpg", b"j" * (300 * i))
            _add(tar, f"s{i:03d}.v1.CLS", b"%d" % i)
    with tarfile.open(long, "w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "README", b"of no sample")
        for i in range(6):
            name = f"n{i // 2}/{'long' * 30 if i == 3 else 'é' if i == 4 else 'k'}{i}"
            if i % 2 == 0:
                _add(tar, f"n{i // 2}", None)
            _add(tar, f"{name}.png", b"p" * 700, mtime=1.5)  # a part of a second needs a PAX header
            _add(tar, f"{name}.json", b'{"caption": "a, b"}', mtime=1.5)
        _add(tar, "LICENSE", b"of no sample either")
    return [plain, long]


def _add(tar: tarfile.TarFile, name: str, data: bytes | None, mtime: float = 0) -> None:
    """A file, or without data a folder."""
    member = tarfile.TarInfo(name)
    member.mtime = mtime  # type: ignore[assignment]
    if data is None:
        member.type = tarfile.DIRTYPE
    else:
        member.size = len(data)
    tar.addfile(member, io.BytesIO(data or b""))


def run_energon(folder: Path) -> None:
    """Megatron-Energon's index of the shards in a folder."""
    _run(
        "energon",
        "prepare",
        "--non-interactive",
        "--skip-dataset-yaml",
        "--split-ratio",
        "1,0,0",
        str(folder),
    )


def run_webshart(folder: Path) -> None:
    """Webshart's index beside each shard of a folder."""
    for name in NAMES:
        place = str((folder / name).parent)
        _run("webshart", "extract-metadata", "--source", place, "--destination", place)


def run_wids(folder: Path) -> Path:
    """The description that wids makes of the first shard in a folder; of the other it counts too few."""
    out = folder / "wids.json"
    _run("widsindex", "create", NAMES[0], "--name", "golden", "--output", str(out), cwd=folder)
    return out


def _run(program: str, *arguments: str, cwd: Path | None = None) -> None:
    path = Path(sys.executable).with_name(program)
    subprocess.run([path, *arguments], check=True, capture_output=True, cwd=cwd)


def main(out: Path) -> None:
    """Make all three in a temporary folder, and copy what they wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder)
        run_energon(folder)
        run_webshart(folder)
        run_wids(folder)
        for file in [".nv-meta/.info.json", ".nv-meta/index.sqlite", "wids.json"]:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, out / file)
        for name in NAMES:
            file = name.replace(".tar", ".json")
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, out / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
