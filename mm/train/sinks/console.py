"""Lines of the log, and a progress bar below them."""

from __future__ import annotations

import logging
from collections import deque

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mm.train.records import Record, StepMetrics
from mm.train.sinks.base import Sink

logger = logging.getLogger(__name__)


class Console(Sink):
    """One line for every `log_interval` steps, one for every other record."""

    def __init__(self, log_interval: int, *, progress_bar: bool) -> None:
        """Show steps; `progress_bar` where the output is a terminal."""
        self._log_interval, self._progress_bar = log_interval, progress_bar
        self._total_steps = 0
        self._seconds: deque[float] = deque(maxlen=50)
        self._redirect = logging_redirect_tqdm()
        self._bar = tqdm(disable=True)

    def begin(self, first_step: int, total_steps: int) -> None:
        """Show the bar; lines of the log then go above it."""
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step - 1,
            unit="step",
            disable=not self._progress_bar or None,
            dynamic_ncols=True,
        )
        self._redirect.__enter__()

    def write(self, record: Record) -> None:
        """Show a record."""
        if isinstance(record, StepMetrics):
            self._step(record)
        elif (line := record.line()) is not None:
            logger.info("%s", line)

    def _step(self, metrics: StepMetrics) -> None:
        self._seconds.append(metrics.step_time_s)
        eta_s = sum(self._seconds) / len(self._seconds) * (self._total_steps - metrics.step)
        self._bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
        self._bar.update(1)
        if metrics.step % self._log_interval == 0 or metrics.step == self._total_steps:
            logger.info("%s", metrics.line_of(self._total_steps, eta_s))

    def close(self) -> None:
        """Leave the bar where it is."""
        self._bar.close()
        self._redirect.__exit__(None, None, None)
