"""How are weights read from a file that a stranger made? As safetensors, or as a pickle of tensors only, on request."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from adq_wds.errors import AdqError, shorten

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
# Where training scripts put the weights: averaged weights before the raw ones (DINO's teacher is an average).
NESTED_KEYS = (
    "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "module", "student",
)  # fmt: skip
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile

_REFUSED_TYPE = re.compile(r"GLOBAL ([\w.]+)")  # how torch names it, in the midst of advice to unpickle it

State = dict[str, torch.Tensor]


def load_state(path: str | Path, *, allow_pickle: bool = False) -> State:
    """The tensors of a checkpoint by name, on the CPU.

    A checkpoint of a training script is opened down to its weights (the first of `NESTED_KEYS`), and the prefixes of
    DistributedDataParallel and torch.compile are taken off. Nothing a file contains is ever run: pickles are read with
    `weights_only=True`.

    Args:
        path: a `.safetensors` file; with `allow_pickle`, also `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`.
        allow_pickle: accept files in PyTorch's pickle format, tensors only.

    Raises:
        ValueError: no such file, a pickle without `allow_pickle`, or an unknown suffix.
        AdqError: the file is damaged, is not what its suffix says, holds no weights, or holds an object of another
            type beside them; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    if path.name.endswith(".safetensors"):
        content: Any = _load_safetensors(path)
    elif not path.name.endswith(PICKLE_SUFFIXES):
        raise ValueError(
            f"checkpoint {path}: expected a name in .safetensors (or {', '.join(PICKLE_SUFFIXES)})"
        )
    elif not allow_pickle:
        raise ValueError(
            f"checkpoint {path}: a pickle, read only with allow_pickle=True (tensors only, no code is run); "
            "or convert it to .safetensors"
        )
    else:
        content = _load_pickle(path)
    state = _unwrap(content)
    if state is None:
        keys = (
            ", ".join(shorten(key, 40) for key in list(content)[:5]) if isinstance(content, Mapping) else ""
        )
        raise AdqError(
            f"checkpoint {path}: holds no weights (a {type(content).__name__} with keys: {keys or 'none'})"
        )
    return state


def _load_safetensors(path: Path) -> State:
    try:
        # `load_file` opens the path twice: a writer may come between.
        return dict(sorted(safetensors.torch.load(path.read_bytes()).items()))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdqError(f"checkpoint {path}: not a whole safetensors file: {_cause(error, path)}") from error


def _load_pickle(path: Path) -> Any:
    # timm's training script keeps its options beside the weights: a Namespace, which only holds values.
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    with safe_globals([argparse.Namespace]) if safe_globals else contextlib.nullcontext():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle may fail in any way
            if refused := _REFUSED_TYPE.search(str(error)):
                raise AdqError(
                    f"checkpoint {path}: holds {shorten(refused[1])} beside tensors, which is never unpickled; in the "
                    "program that made it, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
                ) from error
            raise AdqError(
                f"checkpoint {path}: not a whole file of tensors: {_cause(error, path)}"
            ) from error


def _cause(error: Exception, path: Path) -> str:
    """Why a file could not be read, on one line, with its first bytes (a web page, a Git LFS pointer)."""
    with path.open("rb") as handle:
        start = handle.read(16)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]} (starts with {start!r}); fetch it again"


def _unwrap(content: object) -> State | None:
    """The weights inside what a file held, or None."""
    if not isinstance(content, Mapping):
        return None
    nested = [content[key] for key in NESTED_KEYS if isinstance(content.get(key), Mapping)]
    weights: Mapping[Any, Any] = nested[0] if nested else content
    state = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return None
        state[_without_wrappers(name)] = value
    return state or None


def _without_wrappers(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def common_prefix(names: Iterable[str]) -> str:
    """The longest prefix of whole parts that all names share.

    >>> common_prefix(["net.backbone.conv1.weight", "net.backbone.conv2.weight"])
    'net.backbone.'
    """
    shared = os.path.commonprefix(list(names))  # noqa: RUF071 - by characters, then cut at a dot
    return shared[: shared.rfind(".") + 1]


def inner_states(state: State, names: Collection[str]) -> dict[str, State]:
    """The parts of a state that hold all of some names behind a prefix of theirs ("" is one too), by that prefix.

    >>> state = {"backbone.w": torch.zeros(1), "backbone.b": torch.zeros(1), "head.w": torch.zeros(1)}
    >>> {prefix: list(part) for prefix, part in inner_states(state, ["w", "b"]).items()}
    {'backbone.': ['w', 'b']}
    """
    first = next(iter(names), None)
    prefixes = {key.removesuffix(first) for key in state if first and f".{key}".endswith(f".{first}")}
    return {
        prefix: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in sorted(prefixes)
        if all(prefix + name in state for name in names)
    }


def misfit(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> str:
    """How a state differs from what a model expects, in one line; empty when it fits.

    >>> layer = torch.nn.Linear(2, 3)
    >>> misfit(layer, {"weight": torch.zeros(3, 4), "b": torch.zeros(3)})
    "1 missing ('bias'); 1 unexpected ('b'); 1 of another shape ('weight' is (3, 4), expected (3, 2))"
    """
    want = model.state_dict()
    # files older than this counter lack it; torch fills it in, and it plays no part in evaluation
    missing = [k for k in want if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in want]
    reshaped = [
        f"{shorten(k, 60)} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in want.items()
        if k in state and state[k].shape != v.shape
    ]
    parts = [
        ("missing", [shorten(k, 60) for k in missing]),
        ("unexpected", [shorten(k, 60) for k in unexpected]),
    ]
    parts.append(("of another shape", reshaped))
    return "; ".join(f"{len(items)} {what} ({_first(items)})" for what, items in parts if items)


def _first(items: list[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (", ..." if len(items) > n else "")


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
