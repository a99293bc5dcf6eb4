"""Nothing may hang: calls that may take for ever are given a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


_GRACE_S = 2.0


class InVain(TimeoutError):
    """It was not done a moment after somebody else had given up."""


def limited(function: Callable[[], T], seconds: float, what: str, in_vain: Callable[[], bool] = lambda: False) -> T:
    """`function()`, in a thread that is left behind when it is not done in time.

    Raises:
        TimeoutError: it was not, with `what`.
        InVain: nor in the few seconds since `in_vain()` was true.
    """
    answer: list[tuple[bool, Any]] = []

    def call() -> None:
        try:
            answer.append((True, function()))
        except BaseException as error:  # raised again below, in the caller's thread
            answer.append((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    hopeless = float("inf")
    while thread.is_alive() and time.monotonic() < min(deadline, hopeless):
        thread.join(min(0.2, seconds))
        if hopeless == float("inf") and in_vain():
            hopeless = time.monotonic() + _GRACE_S
    if not answer and hopeless < deadline:
        raise InVain(f"{what} was given up, since another rank had failed")
    if not answer:
        raise TimeoutError(f"{what} took more than {seconds:g} s")
    done, value = answer[0]
    if not done:
        raise value
    result: T = value
    return result
