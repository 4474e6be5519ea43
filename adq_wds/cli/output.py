"""Writes what a terminal may show to standard output, and messages to standard error, above the progress bars."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from adq_wds.errors import AdqError, printable


class BesideBars(logging.Handler):
    """Log lines above the progress bars, on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(text: str) -> None:
    """Write a line to standard error; the job goes on where that fails."""
    from tqdm import tqdm

    try:
        tqdm.write(printable(text), file=sys.stderr)
    except OSError:
        discard(sys.stderr)


def print_text(text: str) -> None:
    """Write lines to standard output.

    Raises:
        AdqError: its disk is full.
    """
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise AdqError(f"cannot write the standard output: {error.strerror}") from error


def discard(stream: TextIO) -> None:
    """Discard what a stream still buffers; Python would try to write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
