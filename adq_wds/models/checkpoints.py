"""Reads weights from untrusted files (safetensors, or on request pickles of tensors only), and checks that they fit."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors
import safetensors.torch
import torch

from adq_wds.errors import AdqError, reason_of, shorten

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
# Keys of the weights in training scripts' checkpoints: averaged weights before the raw ones (DINO's teacher is an average).
NESTED_KEYS = (
    "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "module", "student",
)  # fmt: skip

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
_REFUSED_TYPE = re.compile(r"GLOBAL ([\w.]+)")  # how torch names it, in the midst of advice to unpickle it

State = dict[str, torch.Tensor]
Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class Weights:
    """The content of a checkpoint, read in one opening of the file, which may be replaced at any time.

    Attributes:
        state: the tensors by name, on the CPU.
        header: the metadata of a safetensors file; empty for a pickle.
        sha256: of the file's bytes.
    """

    state: State
    header: dict[str, str]
    sha256: str


def load_weights(path: str | Path, *, allow_pickle: bool = False) -> Weights:
    """Read a checkpoint.

    In a training script's checkpoint the weights are the first of `NESTED_KEYS`, and the prefixes of
    DistributedDataParallel and torch.compile are taken off. Nothing a file contains is ever run: pickles are read with
    `weights_only=True`.

    Args:
        path: a `.safetensors` file; with `allow_pickle`, also `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`.
        allow_pickle: accept files in PyTorch's pickle format, tensors only.

    Raises:
        ValueError: no such file, a pickle without `allow_pickle`, or an unknown suffix.
        AdqError: the file is damaged, does not match its suffix, holds no weights, or holds other objects beside
            them; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    is_pickle = path.name.endswith(PICKLE_SUFFIXES)
    if not is_pickle and not path.name.endswith(".safetensors"):
        raise ValueError(
            f"checkpoint {path}: expected a name in .safetensors (or {', '.join(PICKLE_SUFFIXES)})"
        )
    if is_pickle and not allow_pickle:
        raise ValueError(
            f"checkpoint {path}: a pickle, read only with allow_pickle=True (tensors only, no code is run); "
            "or convert it to .safetensors"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        content, header = _load_pickle(file, path) if is_pickle else _load_safetensors(file, path)
    state = _unwrap(content)
    if state is None:
        keys = [shorten(key, 40) for key in list(content)[:5]] if isinstance(content, Mapping) else []
        raise AdqError(
            f"checkpoint {path}: holds no weights (a {type(content).__name__} with keys: {', '.join(keys) or 'none'})"
        )
    return Weights(state, header, sha256)


def load_shipped(path: Path) -> Weights:
    """`load_weights` for a file of this package; an `AdqError` where the installation is broken."""
    try:
        return load_weights(path)
    except (ValueError, AdqError) as error:
        raise AdqError(f"{error}; it comes with the package: install that again") from error


def _load_safetensors(file: BinaryIO, path: Path) -> tuple[State, dict[str, str]]:
    data = file.read()
    try:
        state = safetensors.torch.load(data)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdqError(f"checkpoint {path}: not a whole safetensors file: {_cause(error, data)}") from error
    # which safetensors has just checked
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(sorted(state.items())), header.get("__metadata__") or {}


def _load_pickle(file: BinaryIO, path: Path) -> tuple[Any, dict[str, str]]:
    # timm's training script keeps its options beside the weights: a Namespace, which only holds values.
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    with safe_globals([argparse.Namespace]) if safe_globals else contextlib.nullcontext():
        try:
            return torch.load(file, map_location="cpu", weights_only=True), {}
        except Exception as error:  # a damaged or hostile pickle may fail in any way
            if refused := _REFUSED_TYPE.search(str(error)):
                raise AdqError(
                    f"checkpoint {path}: holds {shorten(refused[1])} beside tensors, which is never unpickled; in the "
                    "program that made it, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
                ) from error
            file.seek(0)
            raise AdqError(
                f"checkpoint {path}: not a whole file of tensors: {_cause(error, file.read(16))}"
            ) from error


def _cause(error: Exception, data: bytes) -> str:
    """Why a file could not be read, on one line, with its first bytes (a web page, a Git LFS pointer)."""
    return f"{reason_of(error)} (starts with {data[:16]!r}); fetch it again"


def _unwrap(content: object) -> State | None:
    """The weights inside a file's content, or None."""
    if not isinstance(content, Mapping):
        return None
    nested = [content[key] for key in NESTED_KEYS if isinstance(content.get(key), Mapping)]
    weights: Mapping[Any, Any] = nested[0] if nested else content
    state = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return None
        state[_WRAPPERS.sub("", name)] = value
    return state or None


def common_prefix(names: Iterable[str]) -> str:
    """The longest common prefix of all names, in whole parts.

    >>> common_prefix(["net.backbone.conv1.weight", "net.backbone.conv2.weight"])
    'net.backbone.'
    """
    shared = os.path.commonprefix(list(names))  # noqa: RUF071 - by characters, then cut at a dot
    return shared[: shared.rfind(".") + 1]


def with_weights(make: Callable[[], Network], state: State) -> Network:
    """A network with exactly these tensors, as float32.

    Raises:
        ValueError: they are another network's; says how they differ.
    """
    with torch.device("meta"):  # no first weights: they would draw from the caller's random state
        network = make()
    if difference := misfit(network, state):
        raise ValueError(difference)
    network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return network


def misfit(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> str:
    """How a state differs from what a model expects, in one line; empty when it fits.

    >>> layer = torch.nn.Linear(2, 3)
    >>> misfit(layer, {"weight": torch.zeros(3, 4), "b": torch.zeros(3)})
    "1 missing ('bias'); 1 unexpected ('b'); 1 of another shape ('weight' is (3, 4), expected (3, 2))"
    """
    expected = model.state_dict()
    # files older than this counter lack it; torch fills it in, and it plays no part in evaluation
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    differences = {
        "missing": [shorten(k, 60) for k in missing],
        "unexpected": [shorten(k, 60) for k in state if k not in expected],
        "of another shape": [
            f"{shorten(k, 60)} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    return "; ".join(
        f"{len(items)} {what} ({', '.join(items[:3])}{', ...' * (len(items) > 3)})"
        for what, items in differences.items()
        if items
    )


def state_sha256(items: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hexadecimal SHA-256 over named tensors: names, types, shapes and values, in the order of the names.

    >>> a, b = torch.zeros(2), torch.ones(3)
    >>> state_sha256([("a", a), ("b", b)]) == state_sha256([("b", b), ("a", a)])
    True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(items):
        digest.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
