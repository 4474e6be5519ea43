"""Defines a sample, and finds the one field of it that a spec names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from adq_wds.errors import AdqError, SampleError, located, names_place, shorten
from adq_wds.shards.names import base_name

Sample = dict[str, Any]
"""WebDataset's dict: `__key__`, `__url__`, sometimes `__local_path__`, and fields by lower-case extension.

Fields named `__adq_*` are ours, and never bytes or text. A tar may not bring them: see `clean_fields`.
"""

FieldSpec = str | Callable[[Sample], Any]
"""Which field: alternatives as WebDataset writes them ("jpg;png"), or a function of the sample."""

EPOCH_FIELD = "__adq_epoch__"
"""Set to an int by a source that counts epochs; absent elsewhere, then the epoch is 0."""

WHOLE_FIELDS = "jpg;jpeg;png;webp;gif;bmp;tif;tiff;avif;ppm;pgm;pbm;pnm;pfm"
_STORED = "patches.jpg;patches.webp"
STORED_FIELDS = tuple(_STORED.split(";"))
"""Kept patches tiled side by side, no image as it is: what `EncodePatches` writes, and, refused, what earlier versions could."""
IMAGE_FIELDS = WHOLE_FIELDS + ";" + _STORED
FILLED_FIELD = "__adq_filled__"
"""Set to True beside an image whose missing patches `Decode` filled with a colour."""
KEPT_FIELDS = ("patches", "positions", "grid")
"""What `DropPatches` makes of an image, and `Decode` of a stored one."""
JSON_FIELDS = frozenset({"json", "jsn"})
PICKLE_FIELDS = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})
BYTES = (bytes, bytearray, memoryview)  # a tuple: `bytes | bytearray` would be built anew at each look
_IN_TARS = (bytes, str)


class SpecError(ValueError):
    """A field spec is malformed: the program's error, which no pipe may skip as a sample's."""


def image_bytes(sample: Sample, spec: FieldSpec = IMAGE_FIELDS) -> tuple[str, bytes]:
    """Name and content of the one field of `sample` that `spec` names.

    Raises:
        SampleError: none of the alternatives is there, or several are, or the field does not hold bytes.
        SpecError: `spec` is malformed.

    >>> image_bytes({"__key__": "a", "png": b"...", "cls": b"3"})
    ('png', b'...')
    """
    field, data = image_value(sample, spec)
    return field, _as_bytes(sample, field, data)


def image_value(sample: Sample, spec: FieldSpec = IMAGE_FIELDS) -> tuple[str, Any]:
    """As `image_bytes`, whatever the field holds: an image that is decoded already, too."""
    field, _, value = field_value(sample, spec, "image")
    return field, value


def field_value(sample: Sample, spec: FieldSpec, what: str) -> tuple[str, str, Any]:
    """Name, path and value of the one field that `spec` names; or a function's name, no path, and what it gives.

    Args:
        sample: fields, decoded or not.
        spec: which field.
        what: "image" or "label", for errors.

    Raises:
        SampleError: no such field, several, or the function raised. Located.
        SpecError: `spec` is malformed.
    """
    if callable(spec):
        return _name_of(spec), "", _call(spec, sample, what)
    matches = _among(spec, what, tuple(sample)) if isinstance(spec, str) else _wanted(spec, what)
    if len(matches) != 1:
        trouble = _several(matches, what) if matches else _none(sample, spec, what)
        raise place_error(SampleError(trouble), sample)
    ((field, path),) = matches
    return field, path, sample[field]


def _as_bytes(sample: Sample, field: str, data: Any) -> bytes:
    if not isinstance(data, BYTES):
        text = f"holds {type(data).__name__}, expected the bytes of a file; put this stage before .decode()"
        raise place_error(SampleError(text), sample, field)
    return bytes(data)


def content_digest(sample: Sample, image: FieldSpec | None = None) -> bytes:
    """16 bytes of blake2b that identify copies: of the image's bytes, or else of all fields.

    Args:
        sample: fields as bytes, in the order of the shard.
        image: field with the image, or a function giving its bytes. None where no image is looked at: then one of
            `IMAGE_FIELDS`, where the sample has one, and else every field's name and bytes, each behind its length.

    Raises:
        SampleError: no such field, several of them, or a field that does not hold bytes. Located.

    >>> content_digest({"__key__": "a", "jpg": b"x", "cls": b"0"}) == content_digest({"__key__": "b", "png": b"x"})
    True
    """
    if image is None:
        usual = _among(IMAGE_FIELDS, "image", tuple(sample))
        image = usual[0][0] if len(usual) == 1 else None
    digest = hashlib.blake2b(digest_size=16)
    if image is not None:
        digest.update(image_bytes(sample, image)[1])
        return digest.digest()
    for name, data in sample.items():
        if not name.startswith("__"):
            for part in (name.encode("utf-8"), _as_bytes(sample, name, data)):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
    return digest.digest()


def check_spec(spec: FieldSpec | None, what: str) -> None:
    """Check a spec before the first sample; `what` is "image" or "label".

    Raises:
        SpecError: `spec` is malformed.
    """
    if not callable(spec) and not (what == "label" and (spec is None or spec == "none")):
        _wanted(spec, what)


def clean_fields(sample: Sample) -> Sample:
    """A new dict without `__adq_*` fields that hold bytes or text: those were brought by a tar, none is ours.

    Text too, since `WebDataset.decode()` turns the bytes of every ``__*`` field into text.

    >>> clean_fields({"__key__": "a", "jpg": b"", "__adq_keep__": b"1", "__adq_epoch__": 3})
    {'__key__': 'a', 'jpg': b'', '__adq_epoch__': 3}
    """
    out = {**sample}  # which, unlike dict(), takes no tuple of pairs for a sample
    for name in _called_ours(tuple(out)):
        if isinstance(out[name], _IN_TARS):
            del out[name]
    return out


@lru_cache(maxsize=64)  # most samples of a stream have the same names
def _called_ours(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith("__adq_"))


def place_error(error: SampleError, sample: Sample, field: str | None = None) -> SampleError:
    """The same error with the sample's shard and key, and the field, put in front."""
    shard = base_name(str(sample.get("__url__", "?")))
    return located(error, shard=shard, key=sample.get("__key__"), field=field)


def check_absent(sample: Sample, names: Iterable[str], stage: str) -> None:
    """Refuse to write over fields that the sample brings: what stood there would be lost without a word.

    Raises:
        SampleError: one is there. Located.
    """
    for name in names:
        if name in sample:
            raise place_error(
                SampleError(f"is there already; rename or drop it before {stage}"), sample, name
            )


@lru_cache(maxsize=256)
def _alternatives(spec: str) -> tuple[tuple[str, str], ...]:
    """(field, path inside it) of each alternative of "jpg;json:a.b"."""
    paths: dict[str, str] = {}
    for part in spec.split(";"):
        field, _, path = part.strip().partition(":")
        field = field.lower().removeprefix(".")
        last = field.rpartition(".")[2]
        trouble = None
        if not field or field in paths:
            trouble = f"{part!r} is empty or named twice; expected like 'jpg;png'"
        elif PICKLE_FIELDS & set(field.split(".")):
            trouble = f"{field!r} would run what a pickle says; never decoded here"
        elif path and last not in JSON_FIELDS:
            trouble = f"a path, {path!r}, only leads into a json field"
        if trouble is not None:
            raise SpecError(f"field spec {spec!r}: {trouble}")
        paths[field] = path
    return tuple(paths.items())


def _wanted(spec: object, what: str) -> tuple[tuple[str, str], ...]:
    """`_alternatives` of what may be no spec at all, and which for an image may hold no path."""
    if not isinstance(spec, str):
        raise SpecError(
            f"{what}={shorten(spec)} names no field; expected a string like 'jpg;png', or a function"
        )
    pairs = _alternatives(spec)
    paths = [path for _, path in pairs if path]
    if what == "image" and paths:
        raise SpecError(f"field spec {spec!r}: a path, {paths[0]!r}, leads to a label, never to an image")
    return pairs


@lru_cache(maxsize=64)  # most samples of a stream have the same names
def _among(spec: str, what: str, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(field, path inside it) of each alternative of `spec` that is among the names."""
    return tuple(pair for pair in _wanted(spec, what) if pair[0] in names)


def _several(matches: tuple[tuple[str, str], ...], what: str) -> str:
    first, second = matches[0][0], matches[1][0]
    return f"fields {first!r} and {second!r} are both there; name one, such as {what}={first!r}"


def _none(sample: Sample, spec: object, what: str) -> str:
    wanted = _wanted(spec, what)
    names = [shorten(field, 40) for field in sorted(sample) if not field.startswith("__")]
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    text = f"no {what} field: looked for {', '.join(field for field, _ in wanted)}; the sample has {listed or 'no field'}"
    like = _like(wanted, sample)
    if like is not None:
        text += f" (a field is all behind a name's first dot); name one, such as {what}={like!r}"
    return text + ("; for unlabelled data, label=None" if what == "label" else "")


def _like(wanted: tuple[tuple[str, str], ...], sample: Sample) -> str | None:
    """A spec of a field that `sample` has and that ends as a wanted one, such as "left.jpg" for "jpg"."""
    for name in sorted(sample):
        for field, path in wanted:
            spec = f"{name}:{path}" if path else name
            if name.rpartition(".")[2] == field.rpartition(".")[2] and not name.startswith("__"):
                with suppress(SpecError):  # ";" or ":" in a name
                    if _alternatives(spec) == ((name, path),):
                        return spec
    return None


def _call(function: Callable[[Sample], Any], sample: Sample, what: str) -> Any:
    try:
        return function(sample)
    except SpecError:
        raise
    except Exception as error:
        if isinstance(error, AdqError) and names_place(error, base_name(str(sample.get("__url__", "?")))):
            raise  # of a reader of ours that the function calls
        trouble = f"{what} function raised {type(error).__name__}: {shorten(str(error), 200)}"
        raise place_error(SampleError(trouble), sample, _name_of(function)) from error


def _name_of(function: Callable[[Sample], Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
