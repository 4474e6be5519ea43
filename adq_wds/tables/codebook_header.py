"""States the entries of a codebook's header; reads and checks it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

from adq_wds.errors import CodebookError
from adq_wds.remote.url_path import AnyPath
from adq_wds.tables import bounds
from adq_wds.tables.headers import Natural31, parse_header

VERSION = 2
"""2: also cleaning, copies or balance. A file says the least one that it needs."""
HEADER_KEY = "adq_wds"  # the one entry: of several, the order in the file would change from run to run


class CleanSummary(TypedDict):
    """What was doubted in the fit, as in a plan's header."""

    accuracy: float
    wrong: list[float]
    left_out: list[Natural31]
    of: list[Natural31]


class CodebookSource(TypedDict):
    """The entries of a codebook's header that the fit fills in; those that are not required are of version 2."""

    encoder: str
    revision: str
    preprocessing_hash: str
    label: str
    features: str
    classes: list[Natural31]
    names: list[str] | None
    settings: Any
    scores: Any
    n: NotRequired[list[Natural31]]
    balance: NotRequired[Annotated[str, ("class", "equal", "none")] | float]
    clean: NotRequired[CleanSummary]
    random_layer: NotRequired[str]
    image: NotRequired[str]


class CodebookHeader(CodebookSource):
    """The header of a codebook's file, as FORMAT.md describes it."""

    format: str
    version: int
    tensors: dict[str, Any]


LATER = ("n", "balance", "clean", "random_layer", "image")  # what a header of version 1 lacks


def class_faults(header: CodebookSource) -> list[str]:
    """What is wrong with the entries of version 2 of a header whose types are right."""
    n_classes, balance, clean = len(header["classes"]), header.get("balance", "class"), header.get("clean")
    faults = []
    counts = [header["n"]] if "n" in header else []
    if clean is not None:
        counts += [clean["wrong"], clean["left_out"], clean["of"]]  # type: ignore[list-item]
    if any(len(each) != n_classes for each in counts):
        faults.append(f"the counts of classes are not of {n_classes}")
    if not isinstance(balance, str) and not 0.0 <= balance <= 1.0:
        faults.append(f"a balance of {balance}")
    if (balance != "class" or clean is not None) and not sum(header.get("n", [])):
        faults.append("no samples of any class")
    return faults


def check_size(path: AnyPath) -> None:
    """Raise `ValueError` for a safetensors header that is larger than the file or than ours are."""
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        declared = int.from_bytes(handle.read(8), "little")
        if declared > min(size, bounds.MAX_HEADER_BYTES):
            raise ValueError(f"a header of {declared:,} bytes in a file of {size:,}")
        weight = bounds.header_weight(handle.read(declared))
    if weight > bounds.MAX_HEADER_WEIGHT:
        raise ValueError(
            f"a header of values of about {weight:,} bytes, at most {bounds.MAX_HEADER_WEIGHT:,}"
        )


def read_header(metadata: Mapping[str, str]) -> CodebookHeader:
    """The checked header in the metadata of a safetensors file."""
    if HEADER_KEY not in metadata:
        raise CodebookError("not made by adq_wds (no header); expected a codebook")
    digest, _, text = metadata[HEADER_KEY].partition(" ")
    try:
        return parse_header(text.encode(), digest, kind="codebook", version=VERSION, header=CodebookHeader)
    except ValueError as error:
        raise CodebookError(str(error)) from error
