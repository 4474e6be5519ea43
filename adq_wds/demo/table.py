"""What do the demo's numbers say? A table, paired differences, and a paragraph that follows from them."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adq_wds.demo.arms import ARMS, Training

PAIRS = (
    ("DQ", "random"),
    ("ADQ", "random"),
    ("ADQ", "DQ"),
    ("fresh random", "random"),
    ("fresh ADQ", "fresh random"),
    ("fresh random", "full"),
)
MIN_SEEDS = 5  # with fewer, the spread itself is a guess
WIDTH = 80


@dataclass(frozen=True)
class Row:
    """One arm of the table.

    Attributes:
        arm: its name.
        images_per_epoch: trained on in each epoch.
        different_images: seen at least once in a training, mean over seeds.
        images_seen: trained on in all epochs together.
        mean: of the accuracies, in [0, 1].
        std: of the accuracies over seeds (n − 1); None for one seed.
        accuracies: one for each seed.
    """

    arm: str
    images_per_epoch: int
    different_images: int
    images_seen: int
    mean: float
    std: float | None
    accuracies: list[float]


@dataclass(frozen=True)
class Difference:
    """One arm less another, seed by seed.

    Attributes:
        arm, against: names of the two.
        mean: mean difference of the accuracies.
        low, high: its 95 % interval by Student's t; None for fewer than `MIN_SEEDS` seeds.
        verdict: "higher" or "lower" where the interval leaves zero out, "equal" where all seeds agree to the last
            digit, "none" where nothing is shown.
    """

    arm: str
    against: str
    mean: float
    low: float | None
    high: float | None
    verdict: str


def table_rows(trainings: Sequence[Training], accuracies: Sequence[float]) -> list[Row]:
    """A row for each arm, in the order of `ARMS`."""
    rows = []
    for arm in ARMS:
        pairs = [(t, a) for t, a in zip(trainings, accuracies, strict=True) if t.arm == arm.name]
        first, found = pairs[0][0], [a for _, a in pairs]
        rows.append(
            Row(
                arm.name,
                len(first.epochs[0]),
                round(statistics.mean(t.n_different for t, _ in pairs)),
                first.n_seen,
                statistics.mean(found),
                statistics.stdev(found) if len(found) > 1 else None,
                found,
            )
        )
    return rows


def differences(rows: Sequence[Row]) -> list[Difference]:
    """The differences of `PAIRS`."""
    by_arm = {row.arm: row.accuracies for row in rows}
    return [_difference(arm, against, by_arm[arm], by_arm[against]) for arm, against in PAIRS]


def _difference(arm: str, against: str, ours: list[float], theirs: list[float]) -> Difference:
    from scipy.stats import t  # comes with scikit-learn, as the images do

    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.mean(gaps), len(gaps)
    if not any(gaps):
        return Difference(arm, against, 0.0, None, None, "equal")
    if n < MIN_SEEDS:
        return Difference(arm, against, mean, None, None, "none")
    reach = float(t.ppf(0.975, n - 1)) * statistics.stdev(gaps) / n**0.5
    low, high = mean - reach, mean + reach
    verdict = "higher" if low > 0 else "lower" if high < 0 else "none"
    return Difference(arm, against, mean, low, high, verdict)


def findings(rows: Sequence[Row], *, shared: float, cells: int) -> dict[str, Any]:
    """Rows, differences and conclusion as JSON values; see `conclusion`."""
    found = differences(rows)
    return {
        "table": [asdict(r) for r in rows],
        "differences": [asdict(d) for d in found],
        "shared_by_adq_and_dq": shared,
        "conclusion": conclusion(rows, found, shared, cells),
    }


def conclusion(rows: Sequence[Row], found: Sequence[Difference], shared: float, cells: int) -> str:
    """The paragraph under the table.

    Args:
        rows: of `table_rows`.
        found: of `differences`.
        shared: share of ADQ's images that DQ keeps too, in [0, 1].
        cells: classes × bins.
    """
    row = {r.arm: r for r in rows}
    said = {(d.arm, d.against): _said(d) for d in found}
    n, seeds = row["ADQ"].images_per_epoch, len(row["ADQ"].accuracies)
    different = row["fresh random"].different_images
    parts = []
    if seeds < MIN_SEEDS:
        parts += [
            f"Below {MIN_SEEDS} seeds the spread itself is a guess, so these numbers rank nothing: give --seeds 10."
        ]
    else:
        parts += [
            f"Against a random balanced draw of equal size, {said['ADQ', 'random']}, and {said['DQ', 'random']}.",
            f"Drawing anew in every epoch costs the same compute: against one fixed draw, {said['fresh random', 'random']};",
            f"it sees {different:,} different images, not {n:,}.",
            f"With fresh draws, {said['fresh ADQ', 'fresh random']}.",
        ]
    parts += [f"ADQ and DQ have {100 * shared:.0f} % of their images in common."]
    if n < 3 * cells:
        parts += [
            f"With {n / cells:.1f} images for each class and bin, rounding decides as much as importance does."
        ]
    parts += ["This is one small, easy set of images: it shows how to compare, not what your data will say."]
    return " ".join(parts)


def _said(d: Difference) -> str:
    if d.verdict == "equal":
        return f"{d.arm} is equal in every seed"
    if d.verdict == "none":
        return f"{d.arm} shows no difference beyond chance ({_points(d.mean)} points)"
    return f"{d.arm} is {d.verdict} by {abs(100 * d.mean):.1f} points, more than chance explains"


def table_text(result: dict[str, Any]) -> str:
    """The table, the differences and the paragraph, 80 columns wide."""
    rows, found = [Row(**r) for r in result["table"]], [Difference(**d) for d in result["differences"]]
    seeds = len(rows[0].accuracies)
    head = f"{'arm':<13}{'images/epoch':>13}{'different':>11}{'seen in all':>13}{'accuracy % ± std':>18}{'seeds':>7}"
    lines = [head, "-" * len(head)]
    for r in rows:
        spread = "" if r.std is None else f" ± {100 * r.std:.2f}"
        lines.append(
            f"{r.arm:<13}{r.images_per_epoch:>13,}{r.different_images:>11,}{r.images_seen:>13,}"
            f"{f'{100 * r.mean:.2f}{spread}':>18}{seeds:>7}"
        )
    lines += ["", "differences in points, paired by seed, with 95 % intervals (one in 20 misses):"]
    lines += [_difference_line(d) for d in found]
    return "\n".join([*lines, "", textwrap.fill(result["conclusion"], WIDTH)])


def _difference_line(d: Difference) -> str:
    if d.verdict == "equal":
        said = "equal in every seed"
    elif d.low is None or d.high is None:
        said = "too few seeds to tell"
    else:
        verdict = "no difference shown" if d.verdict == "none" else d.verdict
        said = f"{f'{_points(d.low)} to {_points(d.high)}':<18}{verdict}"
    return f"  {f'{d.arm} - {d.against}':<26}{_points(d.mean):>7}   {said}"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
