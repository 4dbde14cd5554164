"""Stopping at the end of a step when the process is asked to, as schedulers do before they take its machine away."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType, TracebackType
from typing import Any

from mm.errors import EXIT_STOPPED, StoppedError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _StopNow(SystemExit):
    """Ends the process where it is."""


class StopRequest:
    """Notes the first of `SIGNALS` while it is entered; the second one ends the process at once, as by default.

    Before the first step there is nothing to save: the first signal ends the process, with exit code 75.

    Raises:
        StoppedError: RUN-001, when it is left because of a signal before the first step.

    Attributes:
        received: the signal's name, or None.
        steps_have_begun: set by the loop.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.steps_have_begun = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _StopNow):
            found = f"Stopped by {self.received} before the first step."
            raise StoppedError("RUN-001", found, "Run the same command again.") from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None or os.getpid() != self._process:  # a worker of this process, made by forking
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = name
        if not self.steps_have_begun:
            raise _StopNow(EXIT_STOPPED)  # no Exception: nothing on the way may take it for a failed attempt
        logger.warning("%s: the run saves and stops at the end of this step; a second signal ends it at once", name)
