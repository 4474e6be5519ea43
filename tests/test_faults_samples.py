"""Does every kind of bad sample end or leave the stream as documented, in and out of workers, and alone? F1."""

import gzip
import hashlib
import json
import logging
import operator
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import adq_wds as adq
from tests.conftest import jpeg, write_tar
from tests.pipes.streams import npy
from tests.programs import run
from tests.samples.image_files import NOT_IMAGES, REASONS, black_png, bombs, encode
from tests.tampering import codebook

CODEBOOK = codebook()


def fields_of(i: int) -> dict[str, bytes]:
    """A good sample: an image, a label, and an embedding of the codebook's width."""
    return {
        "jpg": jpeg(i),
        "cls": b"%d" % (1 + 2 * (i % 2)),
        "emb.npy": npy(np.random.default_rng(i).normal(size=5).astype(np.float32)),
    }


PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))


class Trap:
    """A pickle that makes a folder when it is read."""

    path = Path(tempfile.gettempdir()) / f"adq-trap-{os.getpid()}"

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Kind(NamedTuple):
    """What a sample has in place of a good one's fields (None: nothing), and what is said of it (None: it is good)."""

    fields: dict[str, bytes | None]
    said: str | None
    by: str = "Decode"


GREY16 = np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000


def not_image(name: str, field: str = "jpg") -> Kind:
    data, said = NOT_IMAGES[name]
    return Kind({"jpg": None, field: data}, f", field '{field}': {said}")


KINDS: dict[str, Kind] = {
    "empty": not_image("empty"),
    "garbage": not_image("garbage"),
    "half a JPEG": not_image("half a JPEG"),
    "HTML page": not_image("HTML page"),
    "SVG": not_image("SVG"),
    "EPS in .jpg": not_image("EPS"),
    "bomb": Kind({"jpg": None, "png": black_png(8200)}, ", field 'png': too large: 8200 x 8200 = 67240000 pixels"),
    "truncated PNG": not_image("truncated PNG", "png"),
    "undecodable AVIF": not_image("AVIF of nothing", "avif"),
    "missing label": Kind({"cls": None}, ": no label field: looked for cls; the sample has 'emb.npy', 'jpg'"),
    "no class": Kind({"cls": b"3.5"}, ", field 'cls': '3.5' is neither a class number"),
    "out of range": Kind({"cls": b"2147483647"}, ", field 'cls': label 2147483647 is out of range; expected 0 to"),
    "missing image": Kind({"jpg": None}, ": no image field: looked for jpg, .*the sample has 'cls', 'emb.npy'"),
    "two images": Kind({"png": encode(PIXELS, "PNG")}, ": fields 'jpg' and 'png' are both there; name one"),
    "__bad__": Kind({"__bad__": b"1"}, ", field '__bad__': reserved", "ShardDataset"),
    "NaN embedding": Kind(
        {"emb.npy": npy(np.array([1, 2, np.nan, 4, 5]))}, ", field 'emb.npy': the embedding holds NaN or infinity", "AssignBins"
    ),
    "CMYK": Kind({"jpg": encode(PIXELS.convert("CMYK"), "JPEG")}, None),
    "16 bits": Kind({"jpg": None, "tiff": encode(GREY16, "TIFF")}, None),
    "floats": Kind({"jpg": None, "tiff": encode(GREY16.astype(np.float32) / 65535, "TIFF")}, None),
    "pickle member": Kind({"pickle": pickle.dumps(Trap())}, None),
    "packed pickle": Kind({"pyd.gz": gzip.compress(pickle.dumps(Trap()))}, None),
    "forged field": Kind({"__adq_keep__": b"1"}, None),
}  # fmt: skip
KEYS = {kind: f"x-{i:02d}" for i, kind in enumerate(KINDS)}
BAD = [kind for kind, (_, said, _) in KINDS.items() if said is not None]


def samples_of(kinds: list[str], between: int) -> dict[str, dict[str, bytes]]:
    """Fields by key: so many good samples in front of each kind, and behind the last."""
    samples = {}
    for i, kind in enumerate([*kinds, None]):
        samples |= {f"g-{n:04d}": fields_of(n) for n in range(i * between, (i + 1) * between)}
        if kind is not None:
            fields = {**fields_of(5000 + i), **KINDS[kind].fields}
            samples[KEYS[kind]] = {name: data for name, data in fields.items() if data is not None}
    return samples


def write_shard(path: Path, kinds: list[str], *, between: int) -> str:
    samples = samples_of(kinds, between)
    members = [(f"{k}.{name}", data) for k, s in samples.items() for name, data in s.items()]
    return str(write_tar(path, members))


def pipes(**options: Any) -> list[adq.Pipe]:
    return [
        adq.Decode(label="cls", to="numpy", **options),
        adq.AssignBins(CODEBOOK, operator.itemgetter("label"), **options),
        adq.Subsample(CODEBOOK, keep=0.7),
    ]


def opened(url: str, workers: int, **options: Any) -> adq.Loader:
    return adq.Loader(adq.ShardDataset(url, pipes=pipes(), batch_size=3, **options), num_workers=workers)


def place(kind: str, shard: str = "t.tar") -> str:
    return f"^shard {shard}, key '{KEYS[kind]}'{KINDS[kind].said}"


def digest(samples: Any) -> list[tuple[Any, ...]]:
    """What makes a decoded sample, comparable."""
    out = []
    for sample in samples:
        pixels = hashlib.sha256(sample["image"]).hexdigest()
        fields = sorted(name for name in sample if name not in ("__url__", "__local_path__"))
        out.append((sample["__key__"], sample["image"].shape, pixels, sample["label"], *fields))
    return out


def good_alone(kinds: list[str], between: int) -> list[tuple[Any, ...]]:
    """What the stream must give: each good sample on its own, through the same pipes."""
    bad = {KEYS[kind] for kind in BAD}
    out = []
    for key, fields in samples_of(kinds, between).items():
        if key not in bad:
            samples = [{"__key__": key, "__url__": "t.tar", **fields}]
            for pipe in pipes():
                samples = pipe.apply(samples)
            out += samples
    return digest(out)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Lines that this process and its workers have logged."""
    handler = logging.FileHandler(tmp_path / "log")
    logger = logging.getLogger("adq_wds")
    logger.addHandler(handler)
    try:
        yield lambda: (tmp_path / "log").read_text().splitlines()
    finally:
        logger.removeHandler(handler)
        handler.close()


def check_counts(lines: list[str], n_read: int, n_kept: int, n_bad: int) -> None:
    """read = kept + dropped + bad, over all workers."""
    told = re.compile(r"ShardDataset: read (\d+) = kept (\d+) \+ dropped (\d+) \+ bad (\d+)")
    counts = np.array([[int(n) for n in match.groups()] for match in map(told.fullmatch, lines) if match])
    assert (counts[:, 0] == counts[:, 1:].sum(axis=1)).all()
    assert counts.sum(axis=0).tolist() == [n_read, n_kept, n_read - n_kept - n_bad, n_bad]
    assert n_read - n_kept - n_bad > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard with all kinds, and enough good samples that the bad ones are few in each worker."""
    return write_shard(tmp_path_factory.mktemp("whole") / "t.tar", list(KINDS), between=15)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["skip", "custom"])
def test_each_kind_is_skipped_alone_and_told_once(
    whole: str, log: Callable[[], list[str]], tmp_path: Path, policy: str, workers: int
) -> None:
    asked = tmp_path / "asked"

    def custom(error: adq.AdqError) -> bool:
        with asked.open("a") as file:
            file.write(json.dumps([type(error).__name__, str(error)]) + "\n")
        return True

    loader = opened(whole, workers, on_error="skip" if policy == "skip" else custom)
    samples = [sample for batch in loader for sample in batch]
    assert digest(samples) == good_alone(list(KINDS), 15)
    assert not any(name.startswith("__adq_keep") for sample in samples for name in sample)
    told = sorted(
        ((line["error"], line["skipped_by"]) for line in map(json.loads, (x for x in log() if x[0] == "{"))),
        key=lambda pair: pair[0].partition("key")[2],
    )
    assert len(told) == len(BAD)
    for kind, (text, by) in zip(BAD, told, strict=True):
        assert re.match(place(kind), text), (kind, text)
        assert by == KINDS[kind].by
    check_counts(log(), 15 * (len(KINDS) + 1) + len(KINDS), len(samples), len(BAD))
    if policy == "custom":
        heard = [json.loads(line) for line in asked.read_text().splitlines()]
        assert sorted(heard) == sorted(["SampleError", text] for text, _ in told)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_ends_a_strict_stream_by_name(kind: str, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "t.tar", [kind], between=4)
    texts = []
    for workers, on_error in ((0, "raise"), (2, "raise"), (0, lambda error: KEYS[kind] not in str(error))):
        batches = iter(opened(url, workers, on_error=on_error))
        if KINDS[kind].said is None:
            assert digest(s for batch in batches for s in batch) == good_alone([kind], 4)
            continue
        got: list[Any] = []
        with pytest.raises(adq.SampleError, match=place(kind)) as caught:  # noqa: PT012 - what came before counts
            for batch in batches:
                got += batch
        assert digest(got) == [s for s in good_alone([kind], 4) if s[0] < "g-0003"], "whole batches in front"
        with pytest.raises(adq.LoaderClosed, match=re.escape(str(caught.value))):
            next(batches)
        texts.append(str(caught.value))
    assert len(set(texts)) <= 1


def test_stages_of_webdataset_say_the_same_of_each_kind(whole: str, log: Callable[[], list[str]]) -> None:
    """All but `__bad__`, at which WebDataset itself loses the sample."""
    stream: Any = wds.WebDataset(whole, shardshuffle=False)
    for pipe in pipes(on_error="skip"):
        stream = stream.compose(pipe)
    assert digest(stream) == good_alone(list(KINDS), 15)
    told = sorted(json.loads(x)["error"].partition("key")[2] for x in log() if x[0] == "{")
    expected = [kind for kind in BAD if kind != "__bad__"]
    for kind, text in zip(expected, told, strict=True):
        assert re.match(place(kind).partition("key")[2], text), (kind, text)


METER = """
import json, sys, time, warnings
from pathlib import Path
import adq_wds as adq

def peak():  # KiB; VmHWM, because ru_maxrss starts at the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

warnings.simplefilter("error", RuntimeWarning)  # of a decompression bomb
pipes = [adq.Decode(label=None)]
list(adq.ShardDataset(sys.argv[1], pipes=pipes))
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    try:
        text = str(list(adq.ShardDataset(path, pipes=pipes)))
    except adq.SampleError as error:
        text = f"SampleError: {error}"
    print(json.dumps([Path(path).name, text, time.process_time() - start, peak() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_a_bomb_is_an_error_within_a_second_and_256_mib(tmp_path: Path) -> None:
    """F9."""
    files = bombs() | {f"PNG {side}": black_png(side) for side in (9_000, 12_000, 14_000)}
    good = write_tar(tmp_path / "good.tar", [("a.jpg", jpeg(0))])
    shards = [write_tar(tmp_path / f"{i}.tar", [("a.jpg", data)]) for i, data in enumerate(files.values())]
    done = run(METER, str(good), *map(str, shards))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for bomb, (shard, text, seconds, grown) in zip(files, rows, strict=True):
        reason = REASONS.get(bomb, "too large")
        assert re.match(f"SampleError: shard {shard}, key 'a', field 'jpg': .*{reason}", text), (bomb, text)
        assert seconds < 1, (bomb, seconds)
        assert grown < 256 * 1024, (bomb, grown)


@pytest.mark.parametrize("kind", ["pickle member", "packed pickle"])
def test_a_pickle_in_a_shard_passes_as_bytes_and_never_runs(kind: str, tmp_path: Path) -> None:
    """S1: `.decode()` of WebDataset would run it."""
    url = write_shard(tmp_path / "t.tar", [kind], between=1)
    samples = [sample for batch in opened(url, 0) for sample in batch]
    ((field, data),) = KINDS[kind].fields.items()
    assert [sample[field] for sample in samples if field in sample] == [data]
    assert not Trap.path.exists()
    assert len(list(wds.WebDataset(url, shardshuffle=False).decode())) == 3
    assert Trap.path.exists(), "the trap works"
    Trap.path.rmdir()
