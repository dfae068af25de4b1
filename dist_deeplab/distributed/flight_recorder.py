"""torch's record of the last collectives, for `torchfrtrace FOLDER`: which rank called which, and which one is missing.

torch dumps it when a collective times out; the watchdog ends the process before that, so it dumps it itself.
"""

from pathlib import Path

from torch._C import _distributed_c10d as c10d

_RECORDERS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}  # the first is only in builds with NCCL


def dump_flight_recorder(folder: Path, rank: int) -> list[Path]:
    """Write `folder`/<backend>/rank_<rank> for each recorder of this torch; the files.

    May block on a hung collective's lock: call it with a time limit.

    Raises:
        OSError: the folder cannot be written.
    """
    written = []
    for backend, name in _RECORDERS.items():
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        path = folder / backend / f"rank_{rank}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump())
        written.append(path)
    return written
