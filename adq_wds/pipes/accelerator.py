"""Which process may use an accelerator? Not one forked from a process that used it; here that is said with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adq_wds.errors import AdqError

_FORKED = "forked subprocess"  # what torch says of CUDA there


@contextmanager
def accelerator_of(pipe: str, whose: str) -> Iterator[None]:
    """Turn torch's refusal of an accelerator in a forked process into an `AdqError` that says what to do.

    Args:
        pipe: name of the pipe that runs.
        whose: what it runs, such as "the encoder 'builtin'".
    """
    try:
        yield
    except RuntimeError as error:
        if _FORKED in str(error):
            raise wrong_process(pipe, whose, "an accelerator") from error
        raise


def wrong_process(pipe: str, whose: str, device: str) -> AdqError:
    """The error of a pipe whose network is on a device that this process cannot use."""
    made = whose.removeprefix("the ").partition(" '")[0]
    return AdqError(
        f"{pipe}: {whose} is on {device}, and this process was forked from the one that made it, so it cannot use that device: "
        f"put {pipe} after the loader, in the main process (num_workers=0), start workers with "
        f"multiprocessing_context='spawn', or make the {made} with device='cpu'"
    )
