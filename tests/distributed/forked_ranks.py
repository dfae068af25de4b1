"""Ranks forked from a server that has imported everything, for tests of what ranks compute, not of how they start.

torchrun and the ranks that it starts import for some three seconds each, a forked rank for none. What they do after
that is the same: a process of its own, the variables that torchrun sets, real collectives.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from dist_deeplab.distributed.launcher import hard_exit

TIME_LIMIT_S = 240.0  # importing and training on a busy machine; a hang takes longer

_IMPORTED = (
    *("dist_deeplab.train", "dist_deeplab.evaluate", "dist_deeplab.doctor"),
    *("tests.distributed.disturbed_run", "tests.distributed.workers.jobs"),
    *("torch._inductor", "PIL.JpegImagePlugin"),  # what a run needs, but imports only while it works
)


def forks() -> ForkServerContext:
    """What starts processes that are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def run_forked(
    work: Callable[..., int | None], arguments: Sequence[Sequence[Any]], log: Path, *, nodes: int = 1
) -> int:
    """Call `work(*arguments[rank])` in a process for each rank, evenly many on each of so many nodes; the exit code.

    Args:
        work: a function of a module, e.g. `train.main`; the exit code of its process, None being 0, is what it returns.
        log: what the processes print is appended to this file.

    Returns:
        As torchrun does, that of the first rank that fails, which ends the others; negative is the number of a signal.
        Else 75 if any rank has stopped early, or 0.

    Raises:
        AssertionError: a rank does not end.
    """
    context = forks()
    processes = [
        context.Process(target=_be_rank, args=(work, own, environ, log))
        for own, environ in zip(arguments, _environs(len(arguments), nodes), strict=True)
    ]
    for process in processes:
        process.start()
    try:
        return _exit_code(processes)
    finally:
        for process in processes:
            _end(process)


def _be_rank(work: Callable[..., int | None], arguments: Sequence[Any], environ: dict[str, str], log: Path) -> None:
    """What a forked process does."""
    os.setsid()
    # Else its loader's workers would be started as it was, by a server of their own, and not as those of other ranks.
    multiprocessing.set_start_method(None, force=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environ)
    torch.set_num_threads(1)
    hard_exit(work(*arguments) or 0)


def _environs(ranks: int, nodes: int) -> Iterator[dict[str, str]]:
    """The variables of each rank; none for a single one, which trains without a process group."""
    if ranks == 1:
        yield {}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = ranks // nodes
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local}
        names |= {"GROUP_RANK": rank // local, "MASTER_PORT": port}
        yield {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _exit_code(processes: Sequence[Any]) -> int:
    left = {process.sentinel: process for process in processes}
    worst = 0
    while left:
        ended = multiprocessing.connection.wait(list(left), timeout=TIME_LIMIT_S)
        assert ended, f"no end after {TIME_LIMIT_S:g} s"
        codes = []
        for sentinel in ended:
            process = left.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            codes.append(int(process.exitcode))
        if failures := [code for code in codes if code not in (0, 75)]:
            return min(failures)  # a signal: on a busy machine, ranks that failed because of it may have ended by now
        worst = max(worst, *codes)
    return worst


def _end(process: Any) -> None:
    """Kill all that is left of a process: its loader workers hold the run's lock until they notice its death."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
