"""Are weights read from any of the usual files, and is nothing run or believed on a file's word?"""

import argparse
import hashlib
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adq_wds.errors import AdqError
from adq_wds.models.checkpoints import load_weights, misfit, state_sha256

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.tensor([1.0, -1.0])}
WRAPPED = {f"module.{k}": v for k, v in STATE.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    save_file({prefix + k: v for k, v in STATE.items()}, tmp_path / "a.safetensors")
    assert_same(load_weights(tmp_path / "a.safetensors").state, STATE)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": WRAPPED, "epoch": 3},
        {"model": STATE, "args": argparse.Namespace(lr=0.1)},  # as timm's training script saves it
        {"state_dict": {"other": torch.zeros(1)}, "state_dict_ema": STATE},
        {"model": {"other": torch.zeros(1)}, "model_ema": STATE, "optimizer": {"lr": 1.0}},
        {"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": {}},  # as in PyTorch's tutorial
        {"teacher": STATE, "student": {"other": torch.zeros(1)}},
        {"student": WRAPPED},
        {"module": STATE, "lr_scheduler": None},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_a_pickle_is_opened_down_to_its_averaged_weights(tmp_path: Path, content: Any, suffix: str) -> None:
    torch.save(content, tmp_path / f"a{suffix}")
    assert_same(load_weights(tmp_path / f"a{suffix}", allow_pickle=True).state, STATE)


@pytest.mark.parametrize(
    ("beside", "kind"),
    [
        (np.float64(71.2), r"numpy\._?core\.multiarray\.scalar"),
        (np.arange(3), r"numpy\._?core\.multiarray\._reconstruct"),
        (Path("a"), r"pathlib\.(_local\.)?PosixPath"),
        (argparse.ArgumentParser, r"argparse\.ArgumentParser"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_an_object_beside_the_weights_is_named_with_the_remedy(
    tmp_path: Path, beside: object, kind: str, zipped: bool
) -> None:
    content = {"state_dict": STATE, "metric": beside}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdqError, match=rf"a\.pth: holds '{kind}' .*torch\.save\(model\.state_dict\(\)"):
        load_weights(tmp_path / "a.pth", allow_pickle=True)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [torch.zeros(2)], {"w": torch.zeros(1), "n": 3}, {1: torch.zeros(1)}]
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(AdqError, match=rf"a\.pt: holds no weights \(a {type(content).__name__} with keys: "):
        load_weights(tmp_path / "a.pt", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no.safetensors", "no such file"),
        ("a.npz", r"a name in \.safetensors"),
        ("a.pth", "allow_pickle=True"),
    ],
)
def test_a_missing_file_and_a_refused_kind_are_named(name: str, text: str, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    (tmp_path / "a.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*{text}"):
        load_weights(tmp_path / name)


def with_header(header: bytes, n_bytes: int = 8, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(n_bytes)


DAMAGED = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html>not found</html>",
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "header of 2^62 bytes": with_header(b"{}", length=1 << 62),
    "header longer than the file": with_header(b"{}", length=5000),
    "64 GiB of numbers": with_header(b'{"w":{"dtype":"F32","shape":[17179869184],"data_offsets":[0,68719476736]}}', 64),
    "overlapping tensors": with_header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 12
    ),
    "shape larger than its bytes": with_header(b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,8]}}'),
    "header not json": with_header(b"{{{{"),
    "unknown number type": with_header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}', 4),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_allocates_nothing(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(DAMAGED[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdqError, match=r"a\.safetensors: not a whole safetensors file: .*starts with b'"):
        load_weights(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB on Linux, bytes on macOS


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    whole = path.read_bytes()
    for n_bytes in range(len(whole)):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(AdqError, match="not a whole safetensors file"):
            load_weights(path)


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 600, -1])
def test_a_truncated_pickle_is_refused(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "a.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(AdqError, match=r"a\.pth: not a whole file of tensors"):
        load_weights(path, allow_pickle=True)


def test_misfit_counts_differences_but_batch_counters() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(5)])
    assert misfit(model, model.state_dict()) == ""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("bias")}
    state["0.weight"] = torch.zeros(2, 3)
    state["extra"] = torch.zeros(1)
    shapes = "1 of another shape ('0.weight' is (2, 3), expected (2, 2))"
    text = f"5 missing ('0.bias', '1.bias', '2.bias', ...); 1 unexpected ('extra'); {shapes}"
    assert misfit(model, state) == text
    model = torch.nn.BatchNorm1d(2)
    state = {k: v for k, v in model.state_dict().items() if k != "num_batches_tracked"}
    assert misfit(model, state) == ""


def test_all_that_is_known_of_a_file_comes_from_one_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file may take its name at any time."""
    path, opened = tmp_path / "a.safetensors", []
    save_file(STATE, path, {"made": "today"})
    real = Path.open

    def open_once(self: Path, *mode: str) -> Any:
        opened.append(self)
        file = real(self, *mode)
        save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors", {"made": "later"})
        (tmp_path / "b.safetensors").replace(path)
        return file

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "open", open_once)
    weights = load_weights(path)
    assert_same(weights.state, STATE)
    assert (weights.header, weights.sha256, opened) == ({"made": "today"}, digest, [path])


def test_the_hash_of_a_state_is_of_all_that_it_holds() -> None:
    kinds = [torch.zeros(2, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.int32)]
    tensors = [torch.zeros(2), torch.zeros(1, 2), torch.tensor([0.0, 1.0]), torch.tensor(0), *kinds]
    variants = [{"b": torch.zeros(2)}, *({"a": tensor} for tensor in tensors)]
    assert len({state_sha256(variant.items()) for variant in variants}) == len(variants)
    column = torch.arange(6.0).reshape(2, 3).T
    assert state_sha256([("a", column)]) == state_sha256([("a", column.contiguous())])
