"""Adds the shard's name to errors of WebDataset's tar reader."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from adq_wds.errors import AdqError, PlanError, ShardError, located, shorten
from adq_wds.shards.names import is_url

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_DUPLICATE = "duplicate file name in tar file"


def has_place(sample: object) -> bool:
    """Whether this is a sample with its shard and key."""
    return (
        isinstance(sample, dict)
        and isinstance(sample.get("__url__"), str)
        and isinstance(sample.get("__key__"), str)
    )


def named_reader_error(error: Exception, last: Any, shard_of: Callable[[str], str]) -> Exception:
    """The reader's error as a `ShardError` with its place; another stage's error unchanged.

    Args:
        error: ended a stream of samples.
        last: the sample before it; None where none came.
        shard_of: gives the name of the shard at a URL, or raises `PlanError`.
    """
    url, key = (last["__url__"], last["__key__"]) if has_place(last) else (None, "")
    marked = _marked_url(error)
    failed = marked or (url if _is_damage(error) else None)
    shard = None
    if failed is not None and not isinstance(error, AdqError):
        with suppress(PlanError):  # another stage's error, which ends with some text
            shard = shard_of(failed)
    if failed is None or shard is None:
        return error
    after = f" after key {shorten(key)}" if url is not None and marked in (None, url) else ""
    if marked is None:
        after += ", here or in the next shard"  # which the reader may have begun
    why = _reason(error)
    kind = type(error).__name__ + (f": {why}" if why else "")
    text = f"cannot be read{after} ({kind}); write or fetch the shard again, `adq verify` checks it"
    named = located(ShardError(text), shard=shard)
    named.__cause__ = None if is_url(failed) else error  # whose text may hold a URL's secrets
    return named


def _marked_url(error: Exception) -> str | None:
    """The URL that WebDataset appends to an error's arguments, or the file that could not be opened.

    The last argument of another stage's error may look like a URL; then the plan has no such shard.
    """
    last = error.args[-1] if len(error.args) > 1 else None
    named = error.filename if isinstance(error, OSError) and error.filename is not None else last
    return named if isinstance(named, str) else None


def _is_damage(error: Exception) -> bool:
    """Whether an error without a shard is one of a damaged tar."""
    return isinstance(error, tarfile.TarError) or (isinstance(error, ValueError) and _DUPLICATE in str(error))


def _reason(error: Exception) -> str:
    """The part of an error's text that may be shown: nothing with a URL or a command."""
    if isinstance(error, OSError):
        status = re.search(r"exit -?\d+", str(error))  # of a command, which may hold secrets
        return error.strerror or (status.group() if status else "")
    if isinstance(error, _DAMAGE) or _DUPLICATE in str(error):
        return shorten(str(error.args[0]).split(" @ <")[0], 200) if error.args else ""
    return ""
