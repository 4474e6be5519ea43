"""Describes a plan or a codebook: counts and rates per bin and per class, and what they save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import AdqError, CodebookError, PlanError, shorten
from adq_wds.report.balances import describe_balances, show_balances
from adq_wds.tables.codebook import POOLED, Codebook
from adq_wds.tables.plan import Plan

_SHOWN_CLASSES = 20
_SHOWN_NAMES = 5
_UNEQUAL = 3  # times: classes whose sizes differ by more are reported


def describe_plan(plan: Plan) -> dict[str, Any]:
    """All that `adq show` prints, as JSON values: settings, bins, classes, bytes, texture, hash.

    For a plan with bins also warnings and counts: `reasons` (samples by why they are kept or not), `empty_classes`
    (labels of classes that get nothing), `never_kept` (samples that no epoch keeps, not even with fresh draws),
    `class_ratio` (size of the largest class over the smallest), `balances` (what each balance would keep of each
    class, and up to which keep ratio "equal" is equal), `equal_to_alpha_0`, `copies_of_other_label`.
    """
    header = plan.header
    about = {
        "hash": plan.hash,
        "path": None if plan.path is None else str(plan.path),
        "shards": len(plan.shards),
        "n_samples": plan.n_samples,
        "n_kept": plan.n_kept,
    }
    names = "settings features bins classes bytes texture bad reasons equal_to_alpha_0 copies_of_other_label clean"
    about |= {name: header[name] for name in names.split() if name in header}
    if not header["classes"]:
        return about
    sizes, cells = [c["n"] for c in header["classes"] if c["n"]], header["cells"]
    shares = cells.get("share", cells["quota"])  # without shares every epoch takes the quota
    rows = zip(cells["size"], shares, strict=True)
    return about | {
        "empty_classes": [c["label"] for c in header["classes"] if not c["kept"]],
        "never_kept": sum(n for size, share in rows for n, s in zip(size, share, strict=True) if s == 0),
        "class_ratio": max(sizes) / min(sizes) if sizes else None,
        "balances": describe_balances(header),
    }


@contextmanager
def damage_named(error: type[AdqError], kind: str, path: object) -> Iterator[None]:
    """Raise `error` where a header lacks an entry that all of ours have."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as cause:
        raise error(f"{path or kind}: damaged header: {shorten(str(cause))}") from cause


def show_plan(plan: Plan) -> str:
    """The same as a text for people.

    Raises:
        PlanError: the header lacks an entry that all our plans have.
    """
    with damage_named(PlanError, "plan", plan.path):
        return _plan_text(describe_plan(plan))


def _plan_text(about: dict[str, Any]) -> str:
    n, kept = about["n_samples"], about["n_kept"]
    lines = [
        f"keeps {kept:,} of {n:,} samples ({100 * kept / max(1, n):.1f} %) in {about['shards']} shards",
    ]
    if about.get("bytes"):
        all_bytes, kept_bytes = about["bytes"]["all"], about["bytes"]["kept"]
        share = 100 * kept_bytes / max(1, all_bytes)
        lines.append(f"bytes {kept_bytes:,} of {all_bytes:,} ({share:.1f} %), tar headers included")
    if about.get("texture"):
        of_all, of_kept = about["texture"]["all"], about["texture"]["kept"]
        lines.append(f"mean texture {of_all:.4f} of all, {of_kept:.4f} of kept")
    if about.get("bad"):
        lines.append(f"{about['bad']:,} samples could not be used and are not kept")
    lines += [*_notes(about), f"settings: {_settings(about['settings'])}"]
    if about.get("features"):
        lines.append(f"features: {_plain(about['features']['encoder'])}, D = {about['features']['width']:d}")
    classes = _class_table(about["classes"], about.get("clean"))
    lines += [
        f"hash {about['hash']}",
        "",
        *_bin_table(about["bins"], about["settings"].get("by")),
        "",
        *classes,
    ]
    if (about.get("class_ratio") or 0) > _UNEQUAL and kept:
        lines += ["", *show_balances(about["balances"], about["classes"])]
    return "\n".join(lines).rstrip()


def _settings(settings: dict[str, Any]) -> str:
    pairs = sorted(pair for pair in settings.items() if pair[1] is not None)
    return ", ".join(f"{_plain(name)} {_short(value)}" for name, value in pairs)


def _notes(about: dict[str, Any]) -> list[str]:
    """A line for each notable fact about this plan; maybe none."""
    if not about["classes"] or not about["n_kept"]:
        return []
    lines = []
    if copies := about.get("reasons", {}).get("duplicate", 0):
        other = about["copies_of_other_label"]
        more = f", {other:,} of them with another label than the sample that stays" if other else ""
        lines.append(f"{copies:,} copies are left out{more}")
    if excluded := about.get("reasons", {}).get("excluded", 0):
        lines.append(f"{excluded:,} samples {_excluded(about)} are left out")
    if clean := about.get("clean"):
        lines.append(_doubted(clean))
    if about["empty_classes"]:
        names = [_class_name(c) for c in about["classes"] if not c["kept"]][:_SHOWN_NAMES]
        n = len(about["empty_classes"])
        more = ", …" if n > _SHOWN_NAMES else ""
        lines.append(f"{n:,} of {len(about['classes']):,} classes get nothing: {', '.join(names)}{more}")
    if about["never_kept"]:
        lines.append(f"{about['never_kept']:,} samples can never be kept, not even by fresh draws")
    if about.get("equal_to_alpha_0"):
        lines.append("importance made no difference: equal to --alpha 0")
    return lines


def _excluded(about: dict[str, Any]) -> str:
    return (
        "on the exclude list, or of other classes,"
        if about["settings"].get("exclude")
        else "of other classes"
    )


def _doubted(clean: dict[str, Any]) -> str:
    """How many labels are doubted, and in which classes most and least."""
    out, of = sum(clean["left_out"]), sum(clean["of"])
    shares = [a / n for a, n in zip(clean["left_out"], clean["of"], strict=True) if n]
    line = f"{out:,} samples are left out whose labels are doubted ({100 * out / max(1, of):.1f} %"
    if out:
        line += f"; by class {100 * min(shares):.1f} to {100 * max(shares):.1f} %"
    return f"{line}); the leave-one-out fit predicts {100 * clean['accuracy']:.0f} % of the labels"


def _class_name(entry: dict[str, Any]) -> str:
    return _plain(entry["name"] if entry["name"] is not None else entry["label"])


def describe_codebook(codebook: Codebook, keep: float) -> dict[str, Any]:
    """As `describe_plan`, for a codebook with its rates at `keep`: the rule over all classes, then those of classes.

    Where it cleans or balances, also `of_classes`: samples, doubted ones, and the part of a class's stream that is kept.
    """
    frequency, header = codebook.frequency(), codebook.header
    of_class, names = codebook.class_rates(keep), header["names"]
    number = {c: i for i, c in enumerate(header["classes"], 1)}
    rows = [
        {
            "label": None if r == POOLED else c,
            "name": None if names is None or r == POOLED else names[c],
            "held_out": int(codebook.held_out[r].sum()),
            "frequency": frequency[r].tolist(),
            "rate": of_class[number.get(c, 0)].tolist(),
        }
        for r, c in enumerate(codebook.label.tolist())
    ]
    return {
        "hash": codebook.hash,
        "path": None if codebook.path is None else str(codebook.path),
        "keep": float(keep),
        "n_bins": codebook.n_bins,
        "width": codebook.width,
        "n_classes": len(codebook.header["classes"]),
        **{name: value for name, value in header.items() if name not in ("classes", "names", "n")},
        "rows": rows,
        **({"of_classes": _of_classes(codebook, of_class[1:])} if "n" in header else {}),
    }


def _of_classes(codebook: Codebook, rates: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Counts of each class of the fit, and the part of it that is kept."""
    header, frequency = codebook.header, codebook.frequency()[codebook.rows[1:]]
    out = header["clean"]["left_out"] if "clean" in header else [0] * len(rates)
    rows = zip(header["classes"], header["n"], out, (rates * frequency).sum(axis=1).tolist(), strict=True)
    names = header["names"]
    return [
        {
            "label": c,
            "name": None if names is None else names[c],
            "n": n + n_out,
            "doubted": n_out,
            "keep": part * n / max(1, n + n_out),
        }
        for c, n, n_out, part in rows
    ]


def show_codebook(codebook: Codebook, keep: float) -> str:
    """The same as a text for people.

    Raises:
        ValueError: `keep` is not a number in [0, 1].
        CodebookError: the header lacks an entry that all our codebooks have.
    """
    about = describe_codebook(codebook, keep)
    with damage_named(CodebookError, "codebook", codebook.path):
        return _codebook_text(about)


def _codebook_text(about: dict[str, Any]) -> str:
    n_rules, settings = len(about["rows"]) - 1, dict(about["settings"])
    pilot = settings.pop("pilot")
    lines = [
        f"{about['n_bins']} bins; {n_rules} of {about['n_classes']} classes have rules of their own, all others go by the pooled one",
        f"settings: {_settings(settings)}",
        f"encoder: {_plain(about['encoder'])}, D = {about['width']:d}",
        f"hash {about['hash']}",
        "",
        f"part of new samples in each bin, and the rate that keeps {about['keep']:g} of all:",
    ]
    table = [["class", "name", "pilot", "held out", "", *map(str, range(about["n_bins"]))]]
    for row, n in list(zip(about["rows"], pilot, strict=True))[: _SHOWN_CLASSES + 1]:
        label = "pooled" if row["label"] is None else str(row["label"])
        what = [label, _plain(row["name"] or ""), f"{n:,}", f"{row['held_out']:,}"]
        table.append([*what, "part", *(f"{v:.3f}" for v in row["frequency"])])
        table.append(["", "", "", "", "rate", *(f"{v:.3f}" for v in row["rate"])])
    lines += _aligned(table)
    if n_rules > _SHOWN_CLASSES:
        lines.append(f"… and {n_rules - _SHOWN_CLASSES} more classes (--json lists them)")
    if "of_classes" in about:
        lines += ["", *_kept_of_classes(about)]
    return "\n".join(lines)


def _kept_of_classes(about: dict[str, Any]) -> list[str]:
    lines = [f"balance {_plain(about['balance'])}: kept of each class"]
    if clean := about.get("clean"):
        lines.insert(0, _doubted(clean))
    table = [["class", "name", "samples", "doubted", "kept"]]
    for c in about["of_classes"][:_SHOWN_CLASSES]:
        counts = [f"{c['n']:,}", f"{c['doubted']:,}" if clean else "", f"{c['keep']:.3f}"]
        table.append([str(c["label"]), _plain(c["name"] or ""), *counts])
    hidden = len(about["of_classes"]) - _SHOWN_CLASSES
    more = [f"… and {hidden} more classes (--json lists them)"] if hidden > 0 else []
    return lines + _aligned(table) + more


def _bin_table(bins: list[dict[str, Any]], by: str | None) -> list[str]:
    if not bins:
        return ["no bins: the keys were given" if by is None else f"no bins: chosen by {_plain(by)}"]
    scores = sorted(set(bins[0]) - {"size", "kept", "rate", "importance"})
    table = [["bin", "size", *map(_plain, scores), "importance", "rate", "kept"]]
    for i, row in enumerate(bins):
        values = [row[name] for name in (*scores, "importance", "rate")]
        numbers = ["-" if value is None else f"{value:.4f}" for value in values]
        table.append([str(i), f"{row['size']:,}", *numbers, f"{row['kept']:,}"])
    return _aligned(table)


def _class_table(classes: list[dict[str, Any]], clean: dict[str, Any] | None) -> list[str]:
    if not classes:
        return []
    table = [["class", "name", "samples", "kept", "must include", "doubted"]]
    for i, c in enumerate(classes[:_SHOWN_CLASSES]):
        label = "all" if c["label"] < 0 else str(c["label"])
        must = f"{c['must_include']:,}" if c["must_include"] else ""
        doubted = f"{clean['left_out'][i]:,}" if clean is not None else ""
        table.append([label, _plain(c["name"] or ""), f"{c['n']:,}", f"{c['kept']:,}", must, doubted])
    hidden = len(classes) - _SHOWN_CLASSES
    more = [f"… and {hidden} more classes (--json lists them)"] if hidden > 0 else []
    return _aligned(table) + more


def _short(value: Any) -> str:
    return "+".join(map(_short, value)) if isinstance(value, list) else _plain(value)


def _plain(value: object) -> str:
    """One short line of printable characters: names in a plan come from strangers."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 40 else shorten(text, 40)


def _aligned(rows: list[list[str]]) -> list[str]:
    """A text table, aligned to the right under its headers; a column without any value is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell for cell in column[1:])]
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
