"""Defines `WriteReport`, the counts of new shards."""

from __future__ import annotations

from dataclasses import dataclass

from adq_wds.writing.smaller import PARTS, Parts, totals


@dataclass(frozen=True)
class WriteReport:
    """Counts of the shards written.

    Attributes:
        shards: new shards.
        samples: samples in them.
        payload_bytes: bytes of their members.
        bytes: bytes on the disk, tar headers and padding included.
        source_bytes: bytes of the shards they came from, whole files; None for a stream.
        parts: where images were written anew: bytes of images, other fields and container (tar headers and padding,
            without the blocks that end a tar), each ``before`` (these samples alone, in their source), ``whole`` (the
            same images at the new size and quality, with all their patches) and ``after``.
        bad: samples left out because their image could not be written anew.
    """

    shards: int
    samples: int
    payload_bytes: int
    bytes: int
    source_bytes: int | None = None
    parts: Parts | None = None
    bad: int = 0

    @property
    def read(self) -> int:
        """Samples read: those written and the bad ones."""
        return self.samples + self.bad

    @property
    def totals(self) -> dict[str, float] | None:
        """Sums of `parts`, and the ratios of ``after`` to the two others: ``of_whole`` and ``of_before``."""
        return None if self.parts is None else totals(self.parts)

    def __str__(self) -> str:
        bad = f" of {self.read:,} read, {self.bad:,} bad ones left out (see the log)," if self.bad else ""
        text = (
            f"{self.samples:,} samples{bad} in {self.shards} shards: {self.bytes:,} bytes on disk "
            f"({self.payload_bytes:,} of them payload)"
        )
        if self.source_bytes is not None:
            share = 100 * self.bytes / max(1, self.source_bytes)
            text += f", {share:.1f} % of the source files' {self.source_bytes:,}"
        if self.parts is None:
            return text
        sums, columns = totals(self.parts), ("before", "whole", "after")
        rows = [[name, *(f"{self.parts[name][column]:,}" for column in columns)] for name in PARTS]
        rows = [["bytes", *columns], *rows, ["all", *(f"{sums[column]:,}" for column in columns)]]
        lines = ["  ".join([f"{row[0]:<12}", *(f"{cell:>15}" for cell in row[1:])]) for row in rows]
        lines += [
            f"after: {sums['of_whole']:.3f} of whole, {sums['of_before']:.3f} of before",
            f"before: these {self.samples:,} samples alone, in their source; whole: at the new size and quality, with all "
            "their patches",
            "container: tar headers and padding, without the blocks that end a tar; on disk, with them: "
            f"{self.bytes:,}",
        ]
        return "\n".join([text, "", *lines])
