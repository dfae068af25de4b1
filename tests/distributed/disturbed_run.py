"""A training run in processes of its own to which exactly one thing happens, at one operation on one kind of file.

It is the real command in forked ranks, and the faults are real too: SIGKILL runs no `finally` and leaves half-written
files behind; a full disk is an error of each call that would need space.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_deeplab import train
from dist_deeplab.evaluation.accumulator import ConfusionAccumulator
from dist_deeplab.training.state import TrainState
from tests.commands import draw_no_figures
from tests.distributed.forked_ranks import run_forked

KILLED = -signal.SIGKILL
ENDED = -signal.SIGTERM  # before the run caught signals

FILES = ("checkpoint", "checkpoint_write", "sidecar", "best", "journal", "other")
"""Kinds of files of a run: a checkpoint is opened, synced, renamed, deleted, and filled by 1,000 writes; its sidecar;
`best.pt` and its sidecar; the journal; all others."""
MOMENTS = ("step", "evaluation")
"""The end of a step; a batch of images that was scored."""

_WITHOUT_SPACE = (os.unlink, os.ftruncate, os.utime)  # also possible on a full disk


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    kind: kill (before the operation), kill_within (a write that is half done, otherwise as kill), kill_after, stop
    (SIGTERM), full (this operation and `lasting` - 1 later ones find no space).
    where: an operation on a file of `FILES`, or one of `MOMENTS`. number: which one, from 0. rank: of which process.
    """

    kind: str
    where: str
    number: int
    lasting: int = 1
    rank: int = 0


@dataclass
class _Disturbance:
    """A fault on its way: counts the operations until it is due."""

    fault: Fault
    run_dir: str
    seen: int = 0
    _busy: list[bool] = field(default_factory=list)

    def at(self, where: str) -> Callable[[], None]:
        """To be called before an operation; what it returns is to be called after it.

        Raises:
            OSError: the disk is full.
        """
        fault = self.fault
        if where != fault.where:
            return _nothing
        number, self.seen = self.seen, self.seen + 1
        if fault.kind == "full":
            if fault.number <= number < fault.number + fault.lasting:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return _nothing
        if number != fault.number:
            return _nothing
        if fault.kind in ("kill", "kill_within"):
            kill()
        if fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return kill if fault.kind == "kill_after" else _nothing

    def is_within(self, where: str) -> bool:
        """Whether the write that begins now is to be half done."""
        fault = self.fault
        return fault.kind in ("kill_within", "full") and where == fault.where and self.seen == fault.number


def kind_of(path: str | Path, run_dir: str) -> str:
    """What a file of the run is, of `FILES`; empty for all other files."""
    path = Path(os.path.abspath(path))
    if not path.is_relative_to(run_dir):
        return ""
    name = path.name.lstrip(".")
    if name.startswith("metrics.jsonl"):
        return "journal"
    if name.startswith("best."):
        return "best"
    if name.startswith("step_") and path.parent.name == "checkpoints":
        return "sidecar" if ".json" in name else "checkpoint"
    return "other"


def kill() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing() -> None:
    pass


def disturb(fault: Fault, run_dir: Path) -> None:
    """Let `fault` happen to this process, once it works in `run_dir`."""
    disturbance = _Disturbance(fault, os.path.abspath(run_dir))

    def kind(file: Any) -> str:
        if isinstance(file, int):
            with contextlib.suppress(OSError):
                file = os.readlink(f"/proc/self/fd/{file}")
        return kind_of(file, disturbance.run_dir) if isinstance(file, str | os.PathLike) else ""

    def wrapped(function: Callable[..., Any], which: int = 0) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            where = kind(arguments[which])
            after = _nothing if fault.kind == "full" and function in _WITHOUT_SPACE else disturbance.at(where)
            result = function(*arguments, **options)
            after()
            return result

        return call

    def write(file: int, data: Any) -> int:
        where = kind(file)
        where = "checkpoint_write" if where == "checkpoint" else where
        if disturbance.is_within(where):
            done = _write(file, memoryview(data)[: len(data) // 2])
            if fault.kind == "full" and done:
                disturbance.seen += 1
                return done  # a disk that fills up takes a part
        after = disturbance.at(where)
        done = _write(file, data)
        after()
        return done

    class File(io.FileIO):
        def write(self, data: Any, /) -> int:
            return write(self.fileno(), memoryview(data).cast("B"))

    def opened(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        where = kind(file)
        if not where or not set(mode) & set("wax"):
            return _open(file, mode, buffering, *arguments, **options)
        disturbance.at(where)()
        raw = File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedWriter(raw)
        return (
            buffer if "b" in mode else io.TextIOWrapper(buffer, options.get("encoding") or "utf-8", write_through=True)
        )

    def created(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        after = disturbance.at(kind(path)) if flags & os.O_CREAT else _nothing
        file = _create(path, flags, *arguments, **options)
        after()
        return file

    _write, _open, _create = os.write, io.open, os.open
    os.write = write
    os.open = created  # type: ignore[assignment]
    io.open = sys.modules["builtins"].open = opened  # type: ignore[assignment,attr-defined]
    for name in ("fsync", "unlink", "ftruncate", "utime", "mkdir"):
        setattr(os, name, wrapped(getattr(os, name)))
    for name in ("replace", "link", "rename"):
        setattr(os, name, wrapped(getattr(os, name), which=1))
    for owner, name, moment in ((TrainState, "advance", "step"), (ConfusionAccumulator, "add", "evaluation")):
        setattr(owner, name, _counted(getattr(owner, name), disturbance, moment))


def _counted(method: Callable[..., Any], disturbance: _Disturbance, moment: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        disturbance.at(moment)()
        return result

    return call


def _train(arguments: Sequence[str], run_dir: Path, fault: Fault | None) -> int:
    """What a rank does."""
    draw_no_figures()
    if fault and fault.rank == int(os.environ.get("RANK", 0)):
        disturb(fault, run_dir)
    return train.main(list(arguments))


def start(arguments: Sequence[str], run_dir: Path, log: Path, *, fault: Fault | None = None, ranks: int = 1) -> int:
    """Run the train command to its end on so many ranks, with `fault` in one of them; its exit code (see `run_forked`).

    Output is appended to `log`.

    Raises:
        AssertionError: it hangs.
    """
    return run_forked(_train, [(arguments, run_dir, fault)] * ranks, log)
