"""Reads the whole image of a sample; patches that were not stored are filled with a colour."""

from __future__ import annotations

from PIL import Image

from adq_wds.errors import SampleError
from adq_wds.samples.fields import (
    IMAGE_FIELDS,
    STORED_FIELDS,
    FieldSpec,
    Sample,
    image_bytes,
    image_value,
    place_error,
)
from adq_wds.samples.image import MAX_PIXELS, WHITE, decode_image
from adq_wds.samples.patch_file import GREY, PatchImage
from adq_wds.samples.patch_file import decode as decode_patches
from adq_wds.samples.patch_record import IDENTIFIER

_WHOLE = (
    f"a whole image, not kept patches, which are stored as {STORED_FIELDS[0]!r}: drop patches with "
    "DropPatches, or decode it without to='patches'"
)


def whole_image(
    sample: Sample,
    spec: FieldSpec = IMAGE_FIELDS,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
    fill: tuple[int, int, int] = GREY,
) -> tuple[str | None, Image.Image]:
    """The image's field, None where a function gave its bytes, and the image, RGB.

    Args:
        sample: fields as bytes.
        spec: field with the image.
        max_pixels, background: as for `image.decode_image`.
        fill: colour of missing patches, RGB, each 0 ... 255.

    Raises:
        SampleError: no such field, several, or a damaged image; the record of patches is damaged, missing, or
            contradicts the pixels. Located.
        SpecError: `spec` is malformed.
    """
    stored = stored_patches(sample, spec, max_pixels=max_pixels)
    if stored is not None:
        return stored[0], Image.fromarray(stored[1].to_image(fill))
    field, data = image_bytes(sample, spec)
    try:
        image = decode_image(data, max_pixels=max_pixels, background=background)
    except SampleError as error:
        raise place_error(error, sample, field) from error
    return None if callable(spec) else field, image


def stored_patches(
    sample: Sample, spec: FieldSpec = IMAGE_FIELDS, *, max_pixels: int = MAX_PIXELS
) -> tuple[str, PatchImage] | None:
    """The field and the kept patches of a patch-dropped image; None for every other image.

    Known by the names that `EncodePatches` gives; the bytes that a function gives are a picture like any other.

    Raises:
        SampleError: several fields of `spec` exist, or the field does not hold such bytes. Located.
    """
    if callable(spec) or sample.keys().isdisjoint(STORED_FIELDS):  # most samples: no second look
        return None
    field, _ = image_value(sample, spec)
    return (field, read_patches(sample, spec, max_pixels)[1]) if field in STORED_FIELDS else None


def read_patches(sample: Sample, spec: FieldSpec, max_pixels: int) -> tuple[str, PatchImage]:
    """As `stored_patches`, from a field of any name or a function.

    Raises:
        SampleError: as there, or the image is a whole one.
    """
    field, data = image_bytes(sample, spec)
    try:
        return field, decode_patches(data, max_pixels=max_pixels)
    except SampleError as error:
        whole = not callable(spec) and field not in STORED_FIELDS and IDENTIFIER not in data
        raise place_error(SampleError(_WHOLE) if whole else error, sample, field) from error
