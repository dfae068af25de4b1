"""A function over many items in several processes; the results come in the items' order, so that more processes change
nothing but the time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from dist_deeplab.errors import UserError
from dist_deeplab.workers import end_with_parent

_CHUNK = 8  # items sent to a process at once
_AHEAD = 4  # chunks per process that may be under way or wait to be taken: bounds the memory

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield `function(item)` of each item, in order, from `workers` processes (1: this one); an exception comes in its
    turn.

    `function` and the results must be picklable.

    Raises:
        UserError: a process was killed from outside, e.g. for its memory.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    with ProcessPoolExecutor(workers, get_context("forkserver"), initializer=end_with_parent) as pool:
        waiting: deque[Future[list[R]]] = deque()
        try:
            while True:
                while len(waiting) < workers * _AHEAD and (chunk := list(islice(iterator, _CHUNK))):
                    waiting.append(pool.submit(_apply, function, chunk))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps for its memory; try again with fewer --workers") from None
        finally:
            for future in waiting:
                future.cancel()


def _apply(function: Callable[[T], R], chunk: list[T]) -> list[R]:
    return [function(item) for item in chunk]


def useful_workers(workers: int, num_items: int) -> int:
    """How many of `workers` are worth their start, which takes as long as some 100 samples."""
    return max(1, min(workers, num_items // 100))
