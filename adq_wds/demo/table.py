"""Summarises the demo's accuracies: a table, paired differences, and a paragraph of conclusions."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from adq_wds.demo.train import Training

PAIRS = (
    ("DQ", "random"), ("ADQ", "random"), ("ADQ", "DQ"),
    ("fresh random", "random"), ("fresh ADQ", "fresh random"), ("fresh random", "full"),
)  # fmt: skip
MIN_SEEDS, WIDTH = 5, 80  # with fewer seeds, the spread itself is a guess


def make_table(trainings: Sequence[Training], accuracies: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each arm: images trained on, and mean and standard deviation (n − 1) of the accuracies over seeds."""
    rows = []
    for arm in dict.fromkeys(training.arm for training in trainings):
        mine = [training for training in trainings if training.arm == arm]
        of_arm = [a for training, a in zip(trainings, accuracies, strict=True) if training.arm == arm]
        rows.append({
            "arm": arm,
            "images_per_epoch": len(mine[0].epochs[0]),
            "different_images": round(statistics.mean(len(np.unique(np.concatenate(t.epochs))) for t in mine)),
            "images_seen": sum(map(len, mine[0].epochs)),
            "mean": statistics.mean(of_arm),
            "std": statistics.stdev(of_arm) if len(of_arm) > 1 else None,
            "accuracies": of_arm,
        })  # fmt: skip
    return rows


def difference(arm: str, against: str, accuracies: dict[str, list[float]]) -> dict[str, Any]:
    """One arm less another, seed by seed: mean, 95 % interval by Student's t, and verdict.

    The interval is None for fewer than `MIN_SEEDS` seeds. The verdict is "higher" or "lower" where the interval leaves
    zero out, "equal" where all seeds agree to the last digit, else "none".
    """
    from scipy.stats import t  # comes with scikit-learn, as the images do

    gaps = [a - b for a, b in zip(accuracies[arm], accuracies[against], strict=True)]
    mean, n, low, high, verdict = statistics.mean(gaps), len(gaps), None, None, "none"
    if not any(gaps):
        mean, verdict = 0.0, "equal"
    elif n >= MIN_SEEDS:
        reach = float(t.ppf(0.975, n - 1)) * statistics.stdev(gaps) / n**0.5
        low, high = mean - reach, mean + reach
        verdict = "higher" if low > 0 else "lower" if high < 0 else "none"
    return {"arm": arm, "against": against, "mean": mean, "low": low, "high": high, "verdict": verdict}


def findings(table: list[dict[str, Any]], *, shared: float, cells: int) -> dict[str, Any]:
    """Table, differences and conclusion; ADQ and DQ have `shared` of their images in common, for `cells` classes × bins."""
    accuracies = {row["arm"]: row["accuracies"] for row in table}
    differences = [difference(arm, against, accuracies) for arm, against in PAIRS]
    words = {(d["arm"], d["against"]): _in_words(d) for d in differences}
    n, different = (
        {row["arm"]: row["different_images"] for row in table}[arm] for arm in ("ADQ", "fresh random")
    )
    text = (
        f"Against a random balanced draw of equal size, {words['ADQ', 'random']}, and {words['DQ', 'random']}. "
        f"Drawing anew in every epoch costs the same compute: against one fixed draw, {words['fresh random', 'random']}; "
        f"it sees {different:,} different images, not {n:,}. With fresh draws, {words['fresh ADQ', 'fresh random']}. "
    )
    if len(accuracies["ADQ"]) < MIN_SEEDS:
        text = f"Below {MIN_SEEDS} seeds the spread itself is a guess, so these numbers rank nothing: give --seeds 10. "
    text += f"ADQ and DQ have {100 * shared:.0f} % of their images in common. "
    if n < 3 * cells:
        text += f"With {n / cells:.1f} images for each class and bin, rounding decides as much as importance does. "
    text += "This is one small, easy set of images: it shows how to compare, not what your data will say."
    return {"table": table, "differences": differences, "shared_by_adq_and_dq": shared, "conclusion": text}


def _in_words(d: dict[str, Any]) -> str:
    if d["verdict"] == "equal":
        return f"{d['arm']} is equal in every seed"
    if d["verdict"] == "none":
        return f"{d['arm']} shows no difference beyond chance ({_points(d['mean'])} points)"
    return f"{d['arm']} is {d['verdict']} by {abs(100 * d['mean']):.1f} points, more than chance explains"


def table_text(result: dict[str, Any]) -> str:
    """The table, the differences and the paragraph, 80 columns wide."""
    head = f"{'arm':<13}{'images/epoch':>13}{'different':>11}{'seen in all':>13}{'accuracy % ± std':>18}{'seeds':>7}"
    lines = [head, "-" * len(head)]
    for r in result["table"]:
        accuracy = f"{100 * r['mean']:.2f}" + ("" if r["std"] is None else f" ± {100 * r['std']:.2f}")
        lines.append(
            f"{r['arm']:<13}{r['images_per_epoch']:>13,}{r['different_images']:>11,}{r['images_seen']:>13,}"
            f"{accuracy:>18}{len(r['accuracies']):>7}"
        )
    lines += ["", "differences in points, paired by seed, with 95 % intervals (one in 20 misses):"]
    for d in result["differences"]:
        outcome = "equal in every seed" if d["verdict"] == "equal" else "too few seeds to tell"
        if d["low"] is not None:
            verdict = "no difference shown" if d["verdict"] == "none" else d["verdict"]
            outcome = f"{_points(d['low']) + ' to ' + _points(d['high']):<18}{verdict}"
        lines.append(f"  {d['arm'] + ' - ' + d['against']:<26}{_points(d['mean']):>7}   {outcome}")
    return "\n".join([*lines, "", textwrap.fill(result["conclusion"], WIDTH)])


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
