"""Duties of the first process of a container."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

from mm.stopping import SIGNALS


def leave_the_first_place() -> None:
    """Return in a child where this process is the first of its container, and see to the container's processes here.

    The kernel drops every signal to that process for which it has no handler, and makes it the parent of all whose own
    has ended, which it must wait for. So this process hands on signals, collects the dead, and leaves as the child
    does; whatever still runs then the kernel ends.
    """
    if os.getpid() != 1:
        return
    children: list[int] = []
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if not children:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[0], number)

    heard = [number for number in (*SIGNALS, signal.SIGQUIT) if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, hand_on) for number in heard}
    child = os.fork()
    if child == 0:
        for number, handler in before.items():
            signal.signal(number, handler)
        return
    children.append(child)
    for number in early:
        os.kill(child, number)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
