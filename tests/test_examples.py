"""The examples run as they are, as a newcomer would run them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_score_of_ones_own_decides_in_a_plan(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shard = make_shard("a.tar", 60)
    command = [sys.executable, str(EXAMPLES / "own_score.py"), str(shard), "--encoder", "thumbnail"]
    out = subprocess.run([*command, "--out", str(tmp_path / "f")], check=True, capture_output=True, text=True)
    assert "<Plan 12 of 60 samples in 1 shards" in out.stdout
    assert out.stdout.count("colourfulness") == 10
