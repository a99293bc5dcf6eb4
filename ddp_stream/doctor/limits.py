"""Nothing may hang: calls that may take for ever are given a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def limited(function: Callable[[], T], seconds: float, what: str) -> T:
    """`function()`, in a thread that is left behind when it is not done in time.

    Raises:
        TimeoutError: it was not, with `what`.
    """
    answer: list[tuple[bool, Any]] = []

    def call() -> None:
        try:
            answer.append((True, function()))
        except BaseException as error:  # raised again below, in the caller's thread
            answer.append((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"{what} took more than {seconds:g} s")
    done, value = answer[0]
    if not done:
        raise value
    result: T = value
    return result
