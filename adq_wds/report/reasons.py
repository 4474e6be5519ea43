"""Says in words why samples are kept or not."""

from adq_wds.tables.plan_rows import REASONS

TITLES = dict(
    zip(REASONS, ("kept", "over quota", "copy", "label doubted", "unreadable", "excluded"), strict=True)
)
"""Of each reason, for people."""
TEXTS = {
    "kept": "read in every epoch, or with fresh draws in the first",
    "quota": "of a bin, a part of a class, that gave its share already; fresh draws take others of it in later epochs",
    "duplicate": "equal, or nearly so, to a sample that stays",
    "label": "the other samples speak for another class",
    "bad": "damaged, or without image or label",
    "excluded": "of a class or on a list that was not to be used",
}
"""What each reason means."""
