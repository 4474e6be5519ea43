"""Makes the section on patches: the sheet that `adq patches` drew."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from pathlib import Path

from adq_wds.errors import SampleError, shorten
from adq_wds.report.render import render
from adq_wds.report.section import Section
from adq_wds.samples.image import decode_image

_WIDEST = 1600  # pixels of the sheet


def patch_section(sheet: str | os.PathLike[str]) -> Section:
    """The section with a sheet: a row for each image, its importance, what is kept, stored and rebuilt.

    Raises:
        SampleError: the file holds no picture.
    """
    try:
        image = decode_image(Path(sheet).read_bytes())
    except (OSError, SampleError) as error:
        raise SampleError(
            f"patches: {shorten(os.fspath(sheet))}: {error}; draw it by `adq patches`"
        ) from error
    image.thumbnail((_WIDEST, 4 * _WIDEST))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80, method=4)
    uri = f"data:image/webp;base64,{b64encode(out.getvalue()).decode()}"
    return Section("Patches", render("patches.html", uri=uri, width=image.width, height=image.height))
