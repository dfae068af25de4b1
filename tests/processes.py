"""Looking at running processes, for tests that kill them."""

from collections.abc import Iterator
from pathlib import Path


def ranks_of(agent: int) -> Iterator[tuple[int, int]]:
    """Yield (rank, pid) of a torchrun's workers."""
    for pid in children_of(agent):
        rank = environ_of(pid).get("RANK")
        if rank is not None:
            yield int(rank), pid


def children_of(parent: int) -> list[int]:
    """The direct children of a process, none of one that is gone."""
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def environ_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with, nothing of one that is gone or another user's."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def processes_with(name: str, value: str) -> set[int]:
    """The processes that were started with this in their environment, as far as this user may see it."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if environ_of(pid).get(name) == value}


def command_of(pid: int) -> str:
    """The command line of a process, empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""
