"""Files that are made beside the training by one thread, e.g. figures: no rank waits for them."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dist_deeplab.errors import UserError

log = logging.getLogger(__name__)

Written = Iterable[tuple[Path, dict[str, str]]]
"""Files, each with what else its record in the journal says."""


class BackgroundFiles:
    """Makes files in the order in which they were submitted; the caller asks now and then which are there.

    Only the caller's thread writes the journal. Of what is unfinished when the process is killed nothing is recorded.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._pending: deque[tuple[int, Future[Written]]] = deque()

    def submit(self, step: int, write: Callable[[], Written]) -> None:
        """Call `write` in the thread, after what was submitted before."""
        self._pending.append((step, self._thread.submit(lambda: list(write()))))

    def finished(self, *, wait: bool = False) -> Iterator[tuple[int, Written]]:
        """Step and files of what has been made since the last call; with `wait` of all that was submitted."""
        while self._pending and (wait or self._pending[0][1].done()):
            step, made = self._pending.popleft()
            try:
                yield step, made.result()
            except (OSError, UserError) as error:  # a figure is not worth a run
                log.warning("no files of step %d for MLflow: %s", step, error)
