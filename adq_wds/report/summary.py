"""Makes the first screen: what a plan keeps, why the rest is not kept, and what to be aware of."""

from __future__ import annotations

from typing import Any, NamedTuple

from adq_wds.report.escaped import shown
from adq_wds.report.reasons import TEXTS, TITLES
from adq_wds.report.render import percent, render
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.report.text import describe_plan
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import KEPT, REASONS

_UNEQUAL = 3.0  # times: classes whose sizes differ by more are worth a warning
_NAMED = 5


class Reason(NamedTuple):
    """One line of the legend."""

    word: str
    n: int
    title: str
    text: str


class Note(NamedTuple):
    """A fact worth knowing; a warning, or good to know."""

    text: str
    warns: bool


def summary_section(plan: Plan, samples: Samples, *, about: str, more: list[str]) -> Section:
    """The first screen.

    Args:
        plan: the plan.
        samples: its samples.
        about: which plan it is, for people.
        more: further warnings, such as pictures that could not be read.
    """
    n = len(samples)
    counts = samples.counts
    texts = (
        TEXTS if samples.header["bins"] else TEXTS | {"excluded": "not among the samples that were chosen"}
    )
    reasons = [
        Reason(word, k, TITLES[word], texts[word])
        for word, k in zip(REASONS, counts, strict=True)
        if k or word == "kept"
    ]
    described = describe_plan(plan)
    kept = samples.reason == KEPT
    html = render(
        "summary.html",
        about=shown(about),
        n=n,
        n_kept=counts[KEPT],
        all_bytes=int(samples.n_bytes.sum()),
        kept_bytes=int(samples.n_bytes[kept].sum()),
        saving=_saving(n, counts[KEPT]),
        reasons=reasons,
        parts=[(word, 100 * k / max(1, n)) for word, k in zip(REASONS, counts, strict=True)],
        label="; ".join(f"{reason.title}: {reason.n:,}, {percent(reason.n, n)}" for reason in reasons),
        notes=[*_notes(described), *(Note(shown(text, 400), True) for text in more)],
        settings=_settings(described, plan.header["version"]),
    )
    return Section("Overview", html)


def _saving(n: int, n_kept: int) -> str:
    if not n_kept:
        return "nothing is read"
    return f"{n / n_kept:,.1f} × fewer samples" if n_kept < n else "nothing is saved"


def _notes(about: dict[str, Any]) -> list[Note]:
    """Warnings first."""
    n, notes = about["n_samples"], []
    if about["bins"] and "reasons" not in about:
        text = (
            "A plan of version 1 does not say why samples are in no bin; all of them are counted as excluded."
        )
        notes.append(Note(text, True))
    names = {c["label"]: c["name"] for c in about["classes"]}
    if not about["n_kept"]:
        notes.append(Note("Nothing is kept.", True))
    elif empty := about.get("empty_classes"):
        some = ", ".join(
            shown(label if names[label] is None else names[label], 40) for label in empty[:_NAMED]
        )
        more = ", …" if len(empty) > _NAMED else ""
        notes.append(Note(f"{len(empty):,} of {len(names):,} classes get nothing: {some}{more}", True))
    if never := about.get("never_kept"):
        notes.append(
            Note(f"{never:,} samples are in no epoch, not even with fresh draws ({percent(never, n)})", True)
        )
    if about.get("equal_to_alpha_0"):
        notes.append(
            Note(
                "The importance of bins has no effect: alpha 0, which ignores it, keeps the same samples.",
                True,
            )
        )
    ratio = about.get("class_ratio") or 0
    if ratio > _UNEQUAL:
        balance = about["settings"].get("balance")
        notes.append(
            Note(
                f"Classes are unequal: the largest is {ratio:,.0f} times the smallest (balance: {balance}).",
                True,
            )
        )
    if other := about.get("copies_of_other_label"):
        notes.append(Note(f"{other:,} copies have another label than the sample that stays.", True))
    if clean := about.get("clean"):
        predicted = f"{100 * clean['accuracy']:.0f} %"
        notes.append(
            Note(f"Labels were checked: a fit on the other samples predicts {predicted} of them.", False)
        )
    return notes


def _settings(about: dict[str, Any], version: int) -> list[tuple[str, str]]:
    """Names and values for people."""
    pairs = [("plan", about["hash"]), ("format version", version), ("shards", f"{about['shards']:,}")]
    pairs += sorted((name, value) for name, value in about["settings"].items() if value is not None)
    pairs += [
        (f"features: {name}", value) for name, value in about.get("features", {}).items() if value is not None
    ]
    return [(shown(name), shown(_flat(value), 300)) for name, value in pairs]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(one)}" for name, one in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
