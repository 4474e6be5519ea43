"""Names that would do harm in a page that does not escape them, as keys, classes and shards."""

from dataclasses import replace
from pathlib import Path

import adq_wds as adq
from adq_wds.tables.features import file_name
from adq_wds.tables.spans import Spans
from tests.conftest import synthetic_features

NAMES = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src=https://evil.example/x.png>",
    "<svg onload=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x>",
    "<iframe src=https://evil.example>",
    "<base href=https://evil.example>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=https://evil.example>",
    "<style>@import 'https://evil.example'</style>",
    "<form action=https://evil.example><button>",
    "<a href=javascript:alert(1)>x</a>",
    '" onmouseover=alert(1) x="',
    "' autofocus onfocus=alert(1) '",
    "` onload=alert(1) `",
    "javascript:alert(1)",
    "https://evil.example/x",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "${alert(1)}",
    "&lt;script&gt;&#60;script&#62;",
    "\x1b]0;title\x07\x1b[31mred",
    "\u202egnp.exe",
    "two\nlines\tand a tab",
    "\u2028\u2029\u0085",
    "עברית \u200f 日本語 😀",
]
SHARDS = ["R&D's onload=alert(1).tar", "עברית 😀.tar"]


def hostile_features(folder: Path) -> adq.Features:
    """Two shards; each key and each class is one of the names; the second holds copies of the first."""
    folder.mkdir()
    for shard in SHARDS:
        label = list(range(len(NAMES)))
        features = synthetic_features(shard, label, names=sorted(NAMES), contents=label)
        rows = [(i, name, i * 2048, 1024, i) for i, name in enumerate(NAMES)]
        replace(features, spans=Spans.from_rows(rows), bad=None, bad_reasons=[]).save(
            folder / file_name(shard)
        )
    return adq.Features(folder)


def hostile_plan(folder: Path) -> tuple[adq.Plan, adq.Features]:
    """A plan of such features, with copies and doubted labels."""
    features = hostile_features(folder / "features")
    plan = adq.build_plan(features, keep=0.5, bins=2, dedup="exact", clean=0.2)
    return plan, features
