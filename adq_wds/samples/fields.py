"""What is a sample, which of its fields holds the image and which the label, and who may look at it?"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from adq_wds.errors import AdqError, SampleError, located, names_place, shorten
from adq_wds.protocols import Label
from adq_wds.samples.image import MAX_PIXELS, WHITE, decode_image
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
CLASS_FIELDS = frozenset({"cls", "cls2", "class", "count", "index", "inx", "id"})
"""What WebDataset reads as integers; here a word in them is a class too."""
JSON_FIELDS = frozenset({"json", "jsn"})
PICKLE_FIELDS = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})
MAX_LABEL = 2**31 - 1
"""Integer labels are 0 ... MAX_LABEL - 1."""
MAX_JSON_BYTES = 4 * 1024 * 1024
_BYTES = (bytes, bytearray, memoryview)  # a tuple: `bytes | bytearray` would be built anew at each look
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


def _as_bytes(sample: Sample, field: str, data: Any) -> bytes:
    if not isinstance(data, _BYTES):
        kind = type(data).__name__
        hint = "the bytes of a file; put this stage before .decode()"
        raise place_error(SampleError(f"holds {kind}, expected {hint}"), sample, field)
    return bytes(data)


def image_value(sample: Sample, spec: FieldSpec = IMAGE_FIELDS) -> tuple[str, Any]:
    """As `image_bytes`, whatever the field holds: an image that is decoded already, too."""
    if callable(spec):
        return _name_of(spec), _call(spec, sample, "image")
    field, _ = _present(sample, spec, "image")
    return field, sample[field]


def read_image(
    sample: Sample,
    spec: FieldSpec = IMAGE_FIELDS,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """The image of `sample`, as `image.decode_image` gives it; the error names shard, key and field.

    One that was stored without some of its patches is refused: `pipes.decode.whole_image` takes that too.
    """
    return find_image(sample, spec, max_pixels=max_pixels, background=background)[1]


def find_image(
    sample: Sample,
    spec: FieldSpec = IMAGE_FIELDS,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> tuple[str | None, Image.Image]:
    """The field that the image is in, None where a function gave it, and what `read_image` gives."""
    field, data = image_bytes(sample, spec)
    if field in STORED_FIELDS:
        trouble = "stored without some of its patches, and its tiles are not the image; read it with "
        raise place_error(SampleError(f"{trouble}pipes.decode.whole_image, or Decode"), sample, field)
    try:
        image = decode_image(data, max_pixels=max_pixels, background=background)
    except SampleError as error:
        raise place_error(error, sample, field) from error
    return None if callable(spec) else field, image


def read_label(sample: Sample, spec: FieldSpec | None) -> Label:
    """The label of `sample`: an integer, a name, or None for unlabelled data.

    Args:
        sample: fields as bytes, or as WebDataset decodes them (an int in "cls", a dict in "json").
        spec: None or "none" for no label. Else alternatives separated by ";", each read by its last
            extension: `CLASS_FIELDS` as an integer from 0 where they hold ASCII digits, and as a name where
            they hold a word (with a letter in it, and no number such as "3.0" or "nan"); "json:label",
            "json:a.b" as the entry at that path, an integer or a name by its JSON type; every other one
            ("txt") as a name. Names are UTF-8; white space around them, and a byte-order mark in front, are
            taken off. Or a function of the sample, giving int, str or None.

    Raises:
        SampleError: no such field, several of them, or a value that is no label. Located.
        SpecError: `spec` is malformed, or names a field that would have to be unpickled.

    >>> read_label({"cls": b"7\\n"}, "cls"), read_label({"json": b'{"a": {"b": "cat"}}'}, "cls;json:a.b")
    (7, 'cat')
    >>> read_label({"cls": b"\\xef\\xbb\\xbfcat\\r\\n"}, "cls")
    'cat'
    """
    return find_label(sample, spec)[1]


def find_label(sample: Sample, spec: FieldSpec | None) -> tuple[str | None, Label]:
    """The field that the label is in, None where no field was named, and what `read_label` gives.

    >>> find_label({"json": b'{"label": 7}'}, ".JSON:label; txt")
    ('json', 7)
    """
    if spec is None or spec == "none":
        return None, None
    read: Callable[[Any], Label] = _plain_label
    if callable(spec):
        value, field = _call(spec, sample, "label"), _name_of(spec)
        if value is None:
            return None, None
    else:
        field, path = _present(sample, spec, "label")
        value, read = sample[field], _label_reader(field, path)
    try:
        return None if callable(spec) else field, read(value)
    except _LabelError as error:
        raise place_error(SampleError(str(error)), sample, field) from error.__cause__


def content_digest(sample: Sample, image: FieldSpec | None = None) -> bytes:
    """16 bytes of blake2b by which copies are known: of the image's bytes, or else of all fields.

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
    """Say at once what `read_image` or `read_label` (`what` "image" or "label") would say of every sample.

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


class _LabelError(Exception):
    """A value that is no label; `read_label` knows where it was."""


@lru_cache(maxsize=256)
def _alternatives(spec: str) -> tuple[tuple[str, str], ...]:
    """(field, path inside it) of each alternative of "jpg;json:a.b"."""
    found: dict[str, str] = {}
    for part in spec.split(";"):
        field, _, path = part.strip().partition(":")
        field = field.lower().removeprefix(".")
        last = field.rpartition(".")[2]
        if not field or field in found:
            raise SpecError(f"field spec {spec!r}: {part!r} is empty or named twice; expected like 'jpg;png'")
        if PICKLE_FIELDS & set(field.split(".")):
            raise SpecError(
                f"field spec {spec!r}: {field!r} would run what a pickle says; never decoded here"
            )
        if path and last not in JSON_FIELDS:
            raise SpecError(f"field spec {spec!r}: a path, {path!r}, only leads into a json field")
        found[field] = path
    return tuple(found.items())


def _wanted(spec: object, what: str) -> tuple[tuple[str, str], ...]:
    """`_alternatives` of what may be no spec at all."""
    if not isinstance(spec, str):
        raise SpecError(
            f"{what}={shorten(spec)} names no field; expected a string like 'jpg;png', or a function"
        )
    pairs = _alternatives(spec)
    paths = [path for _, path in pairs if path]
    if what == "image" and paths:
        raise SpecError(f"field spec {spec!r}: a path, {paths[0]!r}, leads to a label, never to an image")
    return pairs


def _present(sample: Sample, spec: object, what: str) -> tuple[str, str]:
    """The one alternative of `spec` that `sample` has."""
    found = _among(spec, what, tuple(sample)) if isinstance(spec, str) else _wanted(spec, what)
    if len(found) == 1:
        return found[0]
    if found:
        first, second = found[0][0], found[1][0]
        trouble = f"fields {first!r} and {second!r} are both there; name one, such as {what}={first!r}"
    else:
        names = [shorten(field, 40) for field in sorted(sample) if not field.startswith("__")]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        like = _like(_wanted(spec, what), sample)
        remedy = (
            f" (a field is all behind a name's first dot); name one, such as {what}={like!r}" if like else ""
        )
        remedy += "; for unlabelled data, label=None" if what == "label" else ""
        looked = ", ".join(field for field, _ in _wanted(spec, what))
        trouble = f"no {what} field: looked for {looked}; the sample has {listed or 'no field'}{remedy}"
    raise place_error(SampleError(trouble), sample)


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


@lru_cache(maxsize=64)  # most samples of a stream have the same names
def _among(spec: str, what: str, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(field, path inside it) of each alternative of `spec` that is among the names."""
    return tuple(pair for pair in _wanted(spec, what) if pair[0] in names)


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


@lru_cache(maxsize=256)
def _label_reader(field: str, path: str) -> Callable[[Any], Label]:
    """How the last extension of a field says that its value is read."""
    kind = field.rpartition(".")[2]
    if kind in CLASS_FIELDS:
        return _class_label
    if kind in JSON_FIELDS:
        return lambda value: _plain_label(_json_entry(value, path))
    if field == "label":  # what `Decode` read from another field
        return lambda value: _name_label(value) if isinstance(value, _BYTES) else _plain_label(value)
    return _name_label


def _plain_label(value: Any) -> Label:
    """An integer or a name by its Python type."""
    return _name_label(value) if isinstance(value, str) else _number_label(_as_integer(value))


def _class_label(value: Any) -> Label:
    """A number where there are digits, a name where there is a word."""
    if not isinstance(value, (*_BYTES, str)):
        return _number_label(_as_integer(value))
    text = _text(value)
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= 20:
        return _number_label(int(text))
    if any(letter.isalpha() for letter in text) and not _is_number(text):
        return _name_label(text)
    raise _LabelError(
        f"{shorten(text)} is neither a class number (digits) nor a word; {_remedy(_whole_number(text))}"
    )


def _number_label(number: int) -> int:
    if not 0 <= number < MAX_LABEL:
        raise _LabelError(f"label {number} is out of range; expected 0 to {MAX_LABEL - 1}")
    return number


def _is_number(text: str) -> bool:
    """Whether Python reads a number, NaN and infinity included."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole_number(text: str) -> int | None:
    """3 of "3.0", which is what tools write that keep labels as floats."""
    whole = re.fullmatch(r"\+?([0-9]{1,10})(?:\.0*)?", text)
    return None if whole is None else int(whole[1])


def _remedy(whole: int | None) -> str:
    """What to do about a label of another kind; `whole` where it is a class number after all."""
    write = "" if whole is None else f"write {whole}, or in a program read it by a function of your own; "
    return write + "for several labels, a regression or none, use label=None"


def _text(value: bytes | bytearray | memoryview | str) -> str:
    """UTF-8 text, without white space around it and without a byte-order mark in front."""
    if not isinstance(value, str):
        data = bytes(value)
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _LabelError(f"label {shorten(data)} is not UTF-8 text") from error
    return value.strip().lstrip("\ufeff").strip()


def _as_integer(value: Any) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError):
        kind = "null" if value is None else type(value).__name__
        whole = _whole_number(str(value)) if isinstance(value, float) else None
        raise _LabelError(
            f"label {shorten(value)} is of type {kind}, expected an integer or a name; {_remedy(whole)}"
        ) from None


def _name_label(value: Any) -> str:
    if not isinstance(value, (*_BYTES, str)):
        raise _LabelError(f"label {shorten(value)} is of type {type(value).__name__}, expected text")
    name = _text(value)
    if not name:
        raise _LabelError("the label is empty; for unlabelled data, label=None")
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise _LabelError(f"label {shorten(name)} is not valid Unicode (half a surrogate pair)")
    return name


def _json_entry(value: Any, path: str) -> Any:
    """What stands at `path` ("a.b") of a JSON document, given as bytes, as text or already parsed."""
    if isinstance(value, (*_BYTES, str)):
        if len(value) > MAX_JSON_BYTES:
            raise _LabelError(f"{len(value)} bytes of JSON, at most {MAX_JSON_BYTES} are read")
        try:
            value = json.loads(value.lstrip("\ufeff") if isinstance(value, str) else bytes(value))
        except (ValueError, RecursionError) as error:
            raise _LabelError(f"not JSON that can be read: {shorten(str(error), 200)}") from error
    for step in path.split(".") if path else ():
        if not isinstance(value, dict) or step not in value:
            has = (
                f"has {shorten(sorted(map(str, value)))}"
                if isinstance(value, dict)
                else f"is {shorten(value)}"
            )
            raise _LabelError(f"no entry {step!r} on the way to {path!r}: the document there {has}")
        value = value[step]
    if isinstance(value, dict):
        raise _LabelError("the entry is an object; name one inside it, such as 'json:label'")
    return value
