"""The checkpoints of a run: saved in the background, found by looking at what is there, dropped when newer ones hold.

`best.pt` is a second name of the best one's file.
"""

import collections
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dist_deeplab.checkpointing.file import DamagedCheckpoint, save_content, write_sidecar
from dist_deeplab.checkpointing.snapshot import Snapshot
from dist_deeplab.distributed.process_group import broadcast_from_main
from dist_deeplab.errors import TrainingError
from dist_deeplab.files import replace_file, sidecar_digests

BEST = "best"
_STEP_NAME = re.compile(r"step_(\d{8})")

T = TypeVar("T")
log = logging.getLogger(__name__)


class CheckpointFolder:
    """All ranks make the same calls; only the one with `is_writer` writes, one checkpoint at a time.

    Args:
        path: the folder; it need not exist.
        keep_last: how many of the newest are kept, beside the best.
        keep_every: those of steps that it divides are kept for good; 0: none.
        is_writer: whether this rank writes.
    """

    def __init__(self, path: Path, *, keep_last: int, keep_every: int = 0, is_writer: bool) -> None:
        self.path = path
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.is_writer = is_writer
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the save in flight or the last one
        self._asks_for_best = False  # the last save was the best one, and nobody has asked yet what became of it
        self._best_failed = False
        self._waited_s = 0.0
        self._values: collections.deque[tuple[str, float]] = collections.deque()  # the thread appends, the run pops

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, content: dict[str, Any], *, step: int, is_best: bool, wait: bool = False) -> None:
        """Copy `content` (tensors and plain values), then write it as the checkpoint of `step` in the background.

        Training waits for the copy, and for what is left of the save before. A disk that is full or broken is
        an error in the log and the metric `checkpoint/failed`, and the run continues; nothing that was there is lost.

        Args:
            content: what to save.
            step: number of steps done.
            is_best: whether to make it `best.pt`.
            wait: return only when it is on disk: for a run that is about to end.

        Raises:
            ValueError: NaN or infinity, or something that a safe load would refuse; nothing was written.
            TrainingError: only with `wait`, on all ranks: it could not be written.
        """
        if self.is_writer:
            started = time.perf_counter()
            self._join()
            copy = self._snapshot.take(content)
            self._thread = threading.Thread(target=self._write, args=(copy, step, is_best), name="checkpoint")
            self._thread.start()
            self._values.append(("time/checkpoint_stall_s", self._waited_s + time.perf_counter() - started))
            self._waited_s = 0.0
        self._asks_for_best |= is_best
        if wait:
            self._join()
            problem = broadcast_from_main(str(self._error or ""))
            if problem:
                raise TrainingError(
                    f"the checkpoint of step {step} could not be written ({problem}); make room in {self.path}, then "
                    "the same command resumes from the one before"
                )

    def lost_best(self) -> bool:
        """Whether the best checkpoint could not be written, so that `best.pt` is an older one or none.

        Every rank must call it. It waits for the save in flight only where that is the best one.
        """
        if not self._asks_for_best:
            return False
        self._asks_for_best = False
        started = time.perf_counter()
        self._join()
        self._waited_s += time.perf_counter() - started
        return broadcast_from_main(self._best_failed)

    def pop_values(self) -> dict[str, float]:
        """Metric points of the saves since the last call; on ranks that don't write there are none."""
        return dict(self._values.popleft() for _ in range(len(self._values)))

    def close(self) -> None:
        """Wait until the save in flight is over."""
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error

    def _write(self, content: dict[str, Any], step: int, is_best: bool) -> None:
        """Write the pair, best included, and prune: what the thread does."""
        started = time.perf_counter()
        self._error = None
        self._best_failed = is_best

        def link_best(file: Path, digest: str) -> None:
            if is_best:
                self._link_best(file, step=step, digest=digest)
                self._best_failed = False

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_content(self.path / f"step_{step:08d}.pt", content, step=step, also=link_best)
            self._set_later_aside(step)
            self._prune()
        except OSError as error:
            self._error = error
            self._values.append(("checkpoint/failed", 1.0))
            log.error("the checkpoint of step %d was not saved, those before it are untouched: %s", step, error)
        except Exception as error:  # not the disk's fault: the next call raises it where the run can see it
            self._error = error
        else:
            self._values.append(("time/checkpoint_write_s", time.perf_counter() - started))

    def _link_best(self, file: Path, *, step: int, digest: str) -> None:
        """Make `best.pt` a second name of the file just written: no copy of hundreds of megabytes."""
        best = self.path / f"{BEST}.pt"

        def link(temporary: Path) -> None:
            try:
                os.link(file, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, temporary)

        write_sidecar(best, file, step=step, digest=digest)
        replace_file(best, link)

    def _set_later_aside(self, step: int) -> None:
        """Rename checkpoints of later steps: they were passed over, and must neither be found nor count as kept."""
        for path in self._all():
            if path.stem > f"step_{step:08d}":
                log.warning("%s was passed over when the run continued from before it; renamed to *.passed_over", path)
                for file in (path, path.with_suffix(".json")):
                    if file.exists():
                        os.replace(file, file.with_name(f"{file.name}.passed_over"))

    def _prune(self) -> None:
        """Delete checkpoints older than the `keep_last` newest whole ones: one without a sidecar cannot be resumed."""
        whole = [path for path in self._all() if sidecar_digests(path)]
        oldest_kept = whole[-self.keep_last :][0]
        for path in (path for path in self._all() if path < oldest_kept):
            if not (self.keep_every and int(path.stem.removeprefix("step_")) % self.keep_every == 0):
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    # --- finding --------------------------------------------------------------------------------------------------

    def read_newest(self, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of the newest checkpoint, or None; damaged ones are reported and passed over.

        Only the writer may call it: half-written files of a killed run are deleted, and ranks that looked each for
        itself might find different ones.
        """
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for path in reversed(self._all()):
            try:
                return read(path)
            except DamagedCheckpoint as error:
                log.warning("%s; trying the one before", error)
        return None

    def has_any(self) -> bool:
        """Whether there is any checkpoint, damaged or not."""
        return bool(self._all())

    def _all(self) -> list[Path]:
        return sorted(path for path in self.path.glob("step_*.pt") if _STEP_NAME.fullmatch(path.stem))
