"""Does tasks one by one in a process of its own; results, log lines and errors go back to the process of the job."""

from __future__ import annotations

import copy
import logging
import traceback
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from adq_wds.engines.engine import Result, Task, Work
from adq_wds.errors import AdqError, reason_of

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True)
class Outcome:
    """What became of a task in another process.

    Attributes:
        task: the task.
        result: its result; None after an error.
        error: what ended it; its class and text are those that the process of the job would have raised.
        log: level and text of each line that the package logged meanwhile.
    """

    task: Task
    result: Result | None
    error: Exception | None
    log: list[tuple[int, str]]

    def unpacked(self) -> tuple[Task, Result]:
        """Task and result; logs the lines here, and raises the error."""
        for level, text in self.log:
            logger.log(level, "%s", text)
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.task, self.result


class Worker(logging.Handler):
    """The work of one process, which keeps what it has loaded from task to task."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self._log: list[tuple[int, str]] = []
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the process of the job shows the lines

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line for the outcome."""
        self._log.append((record.levelno, record.getMessage()))

    def do(self, task: Task) -> Outcome:
        """Do a task."""
        result, error = None, None
        try:
            ((_, result),) = self._work(iter([task]))
        except Exception as failure:
            error = portable(failure)
        log, self._log = self._log, []
        return Outcome(task, result, error, log)


def portable(error: Exception) -> Exception:
    """An error that can be handed to another process: itself with its traceback as a note, or its text."""
    if not isinstance(error, AdqError):
        error.add_note("In another process:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        copy.copy(error)  # by its own constructor, as when it is unpickled
        ForkingPickler.dumps(error)
    except Exception:
        return AdqError(reason_of(error))
    return error


def check_portable(work: Work) -> None:
    """Raise `AdqError` unless another process can be handed the work."""
    try:
        ForkingPickler.dumps(work)
    except Exception as error:
        raise cannot_hand_over(error) from error


def cannot_hand_over(error: Any) -> AdqError:
    """The error of work that cannot be pickled."""
    return AdqError(
        f"the job cannot be handed to other processes ({reason_of(error)}): define its functions, encoders and scores "
        "at the top of a module, or use engine='threads'"
    )
