"""Wrong arguments are errors when a stage is made, not at the first sample: one table for all pipes."""

from collections.abc import Callable
from typing import Any

import pytest

import adq_wds as adq

THUMBNAIL = adq.encoder("thumbnail")
NAN = float("nan")


def drop(**options: Any) -> adq.DropPatches:
    return adq.DropPatches(**{"importance": adq.importance("random", patch=4), **options})


def embed(**options: Any) -> adq.Embed:
    return adq.Embed(**{"encoder": THUMBNAIL, **options})


WRONG: list[tuple[Callable[..., adq.Pipe], dict[str, Any], str]] = [
    (adq.Decode, {"to": "jpeg"}, r"to must be one of .* got 'jpeg'"),
    (adq.Decode, {"image": "pkl"}, "would run what a pickle says"),
    (adq.Decode, {"image": 3}, "image=3 names no field"),
    (adq.Decode, {"image": "json:a"}, "a path, 'a', leads to a label, never to an image"),
    (adq.Decode, {"label": "cls;CLS"}, "is empty or named twice"),
    (adq.Decode, {"label": ["cls"]}, r"label=\['cls'\] names no field"),
    (adq.Decode, {"max_pixels": 0}, "max_pixels must be an integer >= 1, got 0"),
    (adq.Decode, {"background": (300, 0, 0)}, r"background must be .* 0 to 255, got \(300, 0, 0\)"),
    (adq.Decode, {"background": (0, 0)}, r"got \(0, 0\)"),
    (adq.Decode, {"background": (0.5, 0, 0)}, r"got \(0.5, 0, 0\)"),
    (adq.Decode, {"fill": "red"}, "fill must be .* got 'red'"),
    (adq.Decode, {"classes": "cat"}, "classes must be a list of different names"),
    (adq.Decode, {"classes": ["cat", "cat"]}, "classes must be a list of different names"),
    (adq.Decode, {"classes": [1, 2]}, "classes must be a list of different names"),
    (adq.Decode, {"classes": {"cat": 0}}, "classes must be a list of different names"),
    (drop, {"importance": "random"}, r"got 'random'; write adq_wds.importance\('random'\)"),
    (drop, {"importance": 7}, "DropPatches needs an importance, got 7"),
    (drop, {"keep": NAN}, r"keep must be a number in \[0, 1\], got nan"),  # F35
    (drop, {"keep": 0.5, "tolerance": 0.1}, "keep=0.5 and tolerance=0.1 both say how many"),
    (drop, {"tolerance": 0.1}, "tolerance= measures a feature; give encoder="),
    (drop, {"tolerance": NAN}, r"tolerance must be a number >= 0 .* got nan"),
    (drop, {"tolerance": -1}, "got -1"),
    (drop, {"tolerance": True}, "got True"),
    (drop, {"tolerance": 0.1, "encoder": "builtin"}, "encoder must be an encoder, got 'builtin'"),
    (drop, {"encoder": THUMBNAIL}, "an encoder without tolerance= has nothing to measure"),
    (drop, {"patch": 8}, "patch=8, and the importance looks at patches of 4; make it with patch=8 too"),
    (drop, {"size": 30}, "an image of 30 x 30 pixels .* does not fall into patches of 4 x 4"),
    (drop, {"size": 0}, "size must be an integer >= 1, got 0"),
    (drop, {"seed": 1.5}, "seed must be an integer, got 1.5"),
    (drop, {"image": "pkl"}, "would run what a pickle says"),
    (drop, {"label": ["cls"]}, "names no field"),
    (drop, {"max_pixels": 0}, "max_pixels must be an integer >= 1, got 0"),
    (adq.SoftLabels, {"path": None}, "SoftLabels needs the path of a file of soft labels, got None"),
    (adq.SoftLabels, {"path": "x", "share": 1.5}, r"share must be a number in \[0, 1\], got 1.5"),
    (adq.SoftLabels, {"path": "x", "share": NAN}, r"share must be a number in \[0, 1\], got nan"),
    (adq.SoftLabels, {"path": "x", "label": 3}, "label=3 names no field"),
    (embed, {"encoder": "builtin"}, r"got 'builtin'; write adq_wds.encoder\('builtin'\)"),
    (embed, {"encoder": len}, "Embed needs an encoder, got <built-in function len>"),
    (embed, {"encoder": type(THUMBNAIL)}, "Embed needs an encoder, got <class"),
    (embed, {"image": None}, "image=None names no field"),
    (embed, {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    (embed, {"max_pixels": 0.5}, "max_pixels must be an integer >= 1, got 0.5"),
    (adq.EncodePatches, {"quality": 0}, "quality must be an integer from 1 to 100, got 0"),
    (adq.EncodePatches, {"subsampling": "4:2:2"}, "subsampling must be '4:2:0' or '4:4:4', got '4:2:2'"),
    (adq.Map, {"function": 3}, "Map needs a function of a sample, got 3"),
    (adq.Map, {"function": len, "seed": 1.5}, "seed must be an integer, got 1.5"),
    (adq.Reconstruct, {"mae": "builtin"}, "needs a masked autoencoder, got 'builtin'; write adq_wds.load"),
]


@pytest.mark.parametrize(("make", "options", "text"), WRONG)
def test_wrong_ones_are_errors(make: Callable[..., adq.Pipe], options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        make(**options)
