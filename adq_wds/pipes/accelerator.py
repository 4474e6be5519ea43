"""Turns torch's refusal of an accelerator in a forked process into an error with remedies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adq_wds.errors import AdqError


@contextmanager
def accelerator_of(pipe: str, what: str) -> Iterator[None]:
    """Turn torch's refusal of an accelerator in a forked process into an `AdqError` with the remedies.

    Args:
        pipe: name of the pipe that runs.
        what: the network, such as "the encoder 'builtin'".
    """
    try:
        yield
    except RuntimeError as error:
        if "forked subprocess" not in str(error):
            raise
        made = what.removeprefix("the ").partition(" '")[0]
        raise AdqError(
            f"{pipe}: {what} is on an accelerator, and this process was forked from the one that made it, so it cannot use "
            f"that device: put {pipe} after the loader, in the main process (num_workers=0), start workers with "
            f"multiprocessing_context='spawn', or make the {made} with device='cpu'"
        ) from error
