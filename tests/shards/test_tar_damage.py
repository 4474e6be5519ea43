"""Does any cut, flipped bit or zeroed block of a tar pass in silence?"""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from adq_wds.errors import ShardError
from adq_wds.shards.samples_in_tar import Span, iter_spans, payload_crc32, read_sample


def pack(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return file.getvalue()


def scan(data: bytes) -> tuple[list[Span], str | None]:
    """What a reader gets before the end, and the text of the error if there is one."""
    spans: list[Span] = []
    try:
        for span in iter_spans(data, shard="s.tar"):
            spans.append(span)  # one by one: what came before an error is kept
    except ShardError as error:
        return spans, str(error)
    return spans, None


def small_shard() -> bytes:
    rng = random.Random(0)
    members = []
    for i in range(12):
        members += [(f"k{i}.jpg", rng.randbytes(rng.randrange(1, 1500))), (f"k{i}.cls", b"%d" % i)]
    return pack(*members)


def check_cut(data: bytes, cut: int) -> None:
    whole = list(iter_spans(data, shard="s.tar"))
    end = whole[-1].byte_offset + whole[-1].n_bytes
    spans, error = scan(data[:cut])
    assert spans == whole[: len(spans)]
    assert all(span.byte_offset + span.n_bytes <= cut for span in spans)
    assert (error is None) == (cut >= end + 512)
    assert error is not None or spans == whole
    assert error is None or "truncated" in error or "empty file" in error


def test_no_truncation_passes_in_silence() -> None:
    data = small_shard()
    rng = random.Random(1)
    for _ in range(600):
        check_cut(data, rng.randrange(len(data)))


@pytest.mark.slow
def test_no_cut_of_a_three_sample_tar_passes_in_silence() -> None:
    data = pack(*[(f"k{i}.{field}", b"x" * 700) for i in range(3) for field in ("jpg", "cls")])
    for cut in range(len(data) + 1):
        check_cut(data, cut)


def check_damage(data: bytes, damaged: bytes, whole: list[Span]) -> None:
    spans, error = scan(damaged)
    assert spans == whole[: len(spans)]
    if error is None:
        assert spans == whole
    for span in spans:
        changed = read_sample(damaged, span, url="u") != read_sample(data, span, url="u")
        assert (payload_crc32(damaged, span) != payload_crc32(data, span)) == changed
    payloads = [(m.offset, m.offset + m.n_bytes) for span in whole for m in span.members]
    headers = {span.byte_offset for span in whole} | {start - 512 for start, _ in payloads}
    if any(damaged[at : at + 512] != data[at : at + 512] for at in headers):
        assert error is not None or all(
            damaged[at : at + 154] + damaged[at + 156 : at + 512]
            == data[at : at + 154] + data[at + 156 : at + 512]
            for at in headers  # NUL and space behind the checksum may change places
        )


def test_no_bit_flip_passes_in_silence() -> None:
    data = small_shard()
    whole = list(iter_spans(data, shard="s.tar"))
    rng = random.Random(2)
    for _ in range(1500):
        at = rng.randrange(len(data))
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        check_damage(data, bytes(damaged), whole)


def test_no_zeroed_block_passes_in_silence() -> None:
    data = small_shard()
    whole = list(iter_spans(data, shard="s.tar"))
    rng = random.Random(3)
    for at in [rng.randrange(0, len(data), 512) for _ in range(200)] + [span.byte_offset for span in whole]:
        check_damage(data, data[:at] + bytes(512) + data[at + 512 :], whole)


def test_whole_samples_before_damage_are_given_for_any_batch() -> None:
    names = [f"{i}.{field}" for i in range(3000) for field in ("jpg", "cls")]  # more headers than one batch
    data = bytearray(pack(*[(name, b"") for name in names]))
    for broken in (1, 2000, 2999):
        damaged = bytearray(data)
        damaged[broken * 1024 + 600] ^= 1  # in the second header of sample `broken`
        spans, error = scan(bytes(damaged))
        assert [span.key for span in spans] == [str(i) for i in range(broken)]
        assert error == (
            f"shard s.tar, byte {broken * 1024 + 512}: bad header: checksum does not match; "
            "write or fetch the shard again"
        )
