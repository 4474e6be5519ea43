"""Makes the encoder or importance that a command's flags describe."""

from __future__ import annotations

import argparse
from typing import Any

import adq_wds
from adq_wds.cli.parser import given
from adq_wds.signatures import ENCODER


def encoder_options(a: argparse.Namespace) -> dict[str, Any]:
    """The flags of an encoder that the command line has, its name under "encoder"."""
    options = {"encoder": a.encoder, **given(a, ENCODER)}
    return {name: value for name, value in options.items() if value is not None}


def encoder_arguments(a: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of `adq_wds.encoder`."""
    options = encoder_options(a)
    return {"spec": options.pop("encoder"), **options}


def source_of(a: argparse.Namespace) -> adq_wds.Encoder:
    """The encoder of the flags; with ``--embeddings``, which replace it, one that costs nothing."""
    return (
        adq_wds.encoder("thumbnail") if a.embeddings is not None else adq_wds.encoder(**encoder_arguments(a))
    )


def importance_of(a: argparse.Namespace) -> str | adq_wds.Importance:
    """The importance of the flags: a name, or the object where flags of its encoder are set."""
    options = encoder_options(a)
    if options and a.patch_keep is None:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"{name}={value!r} is about which patches are kept; give patch_keep too, such as 0.75"
        )
    return adq_wds.importance(a.importance, **options) if options else str(a.importance)
