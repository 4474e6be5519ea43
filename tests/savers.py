"""What kinds of files are saved, and how each is read whole; for `test_savers`.

As a program (``python -m tests.savers FOLDER``): for every kind that it reads a line of, saves two versions by turns
to the kind's one path, `SAVES` times, and prints how often that failed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.files import atomic_path, write_text
from adq_wds.mae.checkpoints import load_mae, save_mae
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.tables.bins import Bins
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.index import save_index
from tests.conftest import picture, synthetic_features
from tests.folders import load_index

SAVES = 60
GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["short " * 10, "a report of several blocks " * 5_000]

Save = Callable[[Path], object]


def _golden(load: Callable[[Path], Any], name: str, *versions: str) -> list[Save]:
    return [load(GOLDEN / version / name).save for version in versions]


def _index(version: str) -> Save:
    shards = list(load_index(GOLDEN / version / "index.parquet").items())
    return lambda path: save_index(path, shards)


def _picture(image: Image.Image) -> Save:
    def save(path: Path) -> None:
        with atomic_path(path) as partial:
            image.save(partial, "PNG")

    return save


def _mae() -> list[Save]:
    mae = MaskedAutoencoder(MaeSize((16, 16), 8, 16, 1, 2, 8, 1, 2))
    return [lambda path: save_mae(mae, path, {}), lambda path: save_mae(mae, path, {"made": "again"})]


def _read_text(path: Path) -> None:
    assert path.read_text() in TEXTS


def _read_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


KINDS: dict[str, tuple[str, Callable[[], list[Save]], Callable[[Path], object]]] = {
    # by name: the file, what saves its versions, and what reads it from end to end
    "plan": (
        "plan.parquet",
        lambda: _golden(adq.load_plan, "plan.parquet", "v1", "v2"),
        lambda path: list(adq.load_plan(path)),
    ),
    "codebook": (
        "c.safetensors", lambda: _golden(adq.load_codebook, "codebook.safetensors", "v2"), adq.load_codebook,
    ),
    "bins": ("bins.parquet", lambda: _golden(Bins.load, "bins.parquet", "v1", "v2"), Bins.load),
    "mae": ("m.safetensors", _mae, load_mae),
    "picture": ("p.png", lambda: [_picture(picture(0, 32)), _picture(picture(1, 320))], _read_picture),
    "index": ("index.parquet", lambda: [_index("v1"), _index("v2")], load_index),
    "features": (
        "f.parquet",
        lambda: [synthetic_features("a.tar", [0] * n).save for n in (10, 2_000)],
        lambda path: [FeaturesFile(path).shard],
    ),
    "text": ("run.json", lambda: [lambda path, text=text: write_text(path, text) for text in TEXTS], _read_text),
}  # fmt: skip


def main(folder: Path) -> None:
    kinds = {kind: make() for kind, (_, make, _) in KINDS.items()}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        kind = line.strip()
        failed = []
        for i in range(SAVES):
            try:
                kinds[kind][i % len(kinds[kind])](folder / KINDS[kind][0])
            except AdqError as error:
                failed.append(str(error))
        sys.stdout.write(f"{len(failed)} {failed[:1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
