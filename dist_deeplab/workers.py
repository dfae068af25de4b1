"""Processor cores, and worker processes that end with the process that they work for, however it ends."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def num_cores() -> int:
    """Number of cores that this process may use; where the system does not say (macOS), of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """In a worker of multiprocessing: leave at once when the parent is gone. For a pool's `initializer`.

    A pool's workers wait for work on a pipe whose other end they hold themselves: they would never hear of their
    parent's SIGKILL.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()


def _leave_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
