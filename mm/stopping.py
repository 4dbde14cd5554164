"""Ending when a process is asked to: by a person, a scheduler, a closing terminal, or the end of its launcher.

A signal is looked at by a thread of its own, because Python's handlers run in the main thread, and only between two
lines of Python: a process that waits for another one in a collective would not hear of it. Signals within some seconds
are copies of one: a scheduler sends it to every process of a job, and the launcher hands on what it got.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mm.errors import EXIT_STOPPED, LAUNCHER, MMError, SignalledError, StoppedError, say

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What people, schedulers and terminals send."""
CLOSE = signal.SIGRTMIN
"""What the launcher sends to the processes that are left when one has ended by itself; nobody else sends it."""
AGAIN_S = 5.0
"""Signals that come later than this after the first are meant as another one."""
LEAVE_S = 15.0
"""A process that cannot leave by itself in this time, because it waits in a library, is ended where it is."""
AGAIN = "Run the same command again."
CLOSE_S = 5.0
"""What a process gets for its own last words after `CLOSE`."""
_LOOK_S = 0.5


class SignalListener:
    """Calls a function in a thread of its own for each of `SIGNALS` and `CLOSE` that comes while it is entered.

    Signals that whoever started the process has it ignore stay ignored: SIGHUP under nohup, SIGINT for what a shell
    script starts in the background.
    """

    def __init__(
        self,
        on_signal: Callable[[signal.Signals], None],
        now_and_then: Callable[[], None],
        in_main_thread: Callable[[int, FrameType | None], None] = lambda number, frame: None,
    ) -> None:
        """Prepare the thread; entered outside of the main thread, which alone may set handlers, it does nothing.

        Args:
            on_signal: called for each signal at once. now_and_then: called every half second. Both in the thread.
            in_main_thread: Python's handler, called when the main thread comes to it.
        """
        self._on_signal, self._now_and_then, self._handler = on_signal, now_and_then, in_main_thread
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._over = threading.Event()
        self._hears = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalListener:
        if not self._hears:
            return self
        # Python's own C handler writes the number of each signal that has a handler here, at once.
        self._other = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread.start()
        heard = [number for number in (*SIGNALS, CLOSE) if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handler) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._hears:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._other, warn_on_full_buffer=False)
        self._over.set()
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def stay_deaf(self) -> None:
        """Have `__exit__` leave signals without effect: the process is about to leave, and copies must not end it."""
        for number in self._before:  # Python puts the default back for functions before it has left
            atexit.register(signal.signal, number, signal.SIG_IGN)
        self._before = dict.fromkeys(self._before, lambda number, frame: None)
        self._other = -1

    def _listen(self) -> None:
        while not self._over.is_set():
            ready, _, _ = select.select([self._read_end], [], [], _LOOK_S)
            for number in os.read(self._read_end, 1024) if ready else b"":
                if number in (*SIGNALS, CLOSE):
                    self._on_signal(signal.Signals(number))
            self._now_and_then()


class _StopNow(SystemExit):
    """Ends the process where it is; no `Exception`, so that nothing on the way takes it for a failed attempt."""


class StopRequest:
    """Ends a command in order when its process is asked to; a context manager around all that it does, entered once.

    With `saves` the first signal is noted once the steps have begun, and the loop saves and leaves; a second one ends
    the process at once. Otherwise, and before the steps, the first one ends it. What waits in a library, and does not
    come back in `LEAVE_S`, is ended too. A process whose launcher is gone takes that as a signal.

    Raises:
        StoppedError: RUN-001, when it is left because of a signal before the first step, with `saves`.
        SignalledError: RUN-010, when it is left because of a signal, without.

    Attributes:
        received: the signal's name or what else asked, or None.
    """

    def __init__(self, *, saves: bool, kept: str) -> None:
        """Prepare to be asked.

        Args:
            saves: whether the command saves what it has when it is asked to stop after `begin_steps`.
            kept: a sentence on what is on disk otherwise.
        """
        self.received: str | None = None
        self._saves, self._kept = saves, kept
        self._exit_code = EXIT_STOPPED
        self._first = self._deadline = self._closes_at = float("inf")
        self._steps_have_begun = self._saved = self._raised = False
        self._process, self._launcher = os.getpid(), Launcher.of_process()
        self._listener = SignalListener(self._on_signal, self._look, self._in_main_thread)

    def begin_steps(self) -> None:
        """Note a signal from now on, where it is promised to save."""
        self._steps_have_begun = True

    def saved(self) -> None:
        """Say that all is on disk, and the process about to leave: no further signal changes how."""
        self._saved = True
        self._deadline = time.monotonic() + LEAVE_S

    def __enter__(self) -> StopRequest:
        self._listener.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.received is not None and error is not None:
            self._listener.stay_deaf()
        self._listener.__exit__(kind, error, trace)
        if isinstance(error, _StopNow):
            raise self._error() from None

    @property
    def _waits_for_a_save(self) -> bool:
        return self._saves and self._steps_have_begun

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of this process, made by forking
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number != CLOSE and not self._waits_for_a_save and not self._raised:
            self._raised = True
            self._ask(signal.Signals(number).name, 128 + number)
            raise _StopNow(self._exit_code)

    def _on_signal(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == CLOSE:
            self._closes_at = now + CLOSE_S
            return
        if self.received is None:
            self._ask(number.name, 128 + number)
        elif now - self._first > AGAIN_S and not self._saved:
            self._exit_code = 128 + number
            found = f"Ended at once by a second signal ({number.name}). {self._kept}"
            self._leave_now(SignalledError("RUN-011", found, AGAIN))

    def _ask(self, by: str, exit_code: int) -> None:
        if self.received is not None:
            return
        self.received, self._first = by, time.monotonic()
        if self._waits_for_a_save:
            logger.info(
                "%s: the run saves at the end of this step (or of an evaluation that it is in) and stops. To end it at "
                "once, unsaved, press Ctrl-C or send the signal again after %.0f s.",
                by,
                AGAIN_S,
            )
            return
        self._exit_code = EXIT_STOPPED if self._saves else exit_code
        self._deadline = self._first + LEAVE_S

    def _look(self) -> None:
        if self._launcher is not None and self.received is None and self._launcher.is_gone():
            self._ask("the end of its launcher", 128 + signal.SIGHUP)
            if not self._waits_for_a_save:
                os.kill(self._process, signal.SIGTERM)  # for the handler in the main thread
        now = time.monotonic()
        if now > self._closes_at and self.received is None:
            os._exit(128 + signal.SIGTERM)  # without a word: the process that ended first had it
        if now > self._deadline:
            self._leave_now(self._error())

    def _error(self) -> MMError:
        if self._saved:
            return StoppedError(
                "RUN-001", f"Stopped by {self.received}; the run is saved.", "Run the same command again."
            )
        if self._saves:
            found = f"Stopped by {self.received} before the first step."
            return StoppedError("RUN-001", found, AGAIN)
        error = SignalledError("RUN-010", f"Ended by {self.received}. {self._kept}", AGAIN)
        error.exit_code = self._exit_code
        return error

    def _leave_now(self, error: MMError) -> None:
        error.exit_code = self._exit_code
        say(error)
        os._exit(error.exit_code)


class Launcher:
    """The launcher (`mm.cli.launch`) that started this process."""

    def __init__(self, process_id: int) -> None:
        self._id, self._is_parent = process_id, os.getppid() == process_id

    @classmethod
    def of_process(cls) -> Launcher | None:
        """Read from the environment; None for a process that was started otherwise."""
        told = os.environ.get(LAUNCHER, "")
        return cls(int(told)) if told.isdecimal() else None

    def is_gone(self) -> bool:
        """True once it has ended."""
        if self._is_parent:  # it may be dead without having been waited for, and its number still taken
            return os.getppid() != self._id
        try:
            os.kill(self._id, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False
