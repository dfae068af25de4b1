"""Calls that may block forever, with a time limit."""

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """The result of a function that may block or fail, or None where it has none in time; it may then still run."""
    results: list[T] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # torch's store errors are RuntimeErrors
            results.append(function())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
