"""How the ranks find each other, or say who is missing.

torchrun, Slurm or the user say where rank 0 can be reached (MASTER_ADDR, MASTER_PORT); a key-value store there is what
the process group and the watchdog are built on.
"""

import json
import logging
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_deeplab.errors import UserError, first_line

_POLL_S = 0.05
_VERDICT_S = 5.0  # how much longer the others wait, to hear from rank 0 who is missing
_SOCKET_HINT = (
    "look at their logs and at the network between the nodes (NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the "
    "interface)"
)

log = logging.getLogger(__name__)


def meet(rank: int, world_size: int, *, timeout_s: float) -> dist.Store:
    """Return a store that all ranks of this start, and no earlier one, share; once all of them are there.

    torchrun's own store outlives its workers: after a restart it still holds what dead ones wrote. So rank 0 draws a
    new name, every rank answers it with a number of its own, and goes on only once rank 0 has listed that very number.

    Raises:
        UserError: rank 0 can't be reached, or (all ranks say so) others did not come; which ones.
    """
    deadline = time.monotonic() + timeout_s
    store = _connect(rank, timeout_s)
    own = json.dumps({"nonce": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()})
    if rank == 0:
        return _call_the_roll(store, own, world_size, deadline=deadline, timeout_s=timeout_s)
    deadline += min(timeout_s, _VERDICT_S)
    while time.monotonic() < deadline:
        meeting = _get(store, "meeting")
        if meeting:
            room = dist.PrefixStore(meeting, store)
            room.set(f"rank/{rank}", own)
            roster: dict[str, Any] = json.loads(_get(room, "roster") or "{}")
            if roster.get("missing"):
                raise UserError(_missing(roster["missing"], world_size, timeout_s))
            if roster.get("present", {}).get(str(rank)) == own:
                return room
        time.sleep(_POLL_S * max(1, world_size / 64))  # a thousand ranks must not keep the store from answering
    raise UserError(
        f"rank {rank} on {socket.gethostname()} waited {timeout_s:.0f} s at {_address()} for rank 0, which did not "
        f"come; {_SOCKET_HINT}"
    )


def _call_the_roll(store: dist.Store, own: str, world_size: int, *, deadline: float, timeout_s: float) -> dist.Store:
    meeting = f"meeting_{secrets.token_hex(8)}"
    room = dist.PrefixStore(meeting, store)
    store.set("meeting", meeting)
    present = {0: own}
    while len(present) < world_size:
        for rank in range(1, world_size):
            if rank not in present and (answer := _get(room, f"rank/{rank}")):
                present[rank] = answer
        if time.monotonic() > deadline and len(present) < world_size:
            missing = [rank for rank in range(world_size) if rank not in present]
            room.set("roster", json.dumps({"missing": missing}))
            time.sleep(
                1.0 + 2 * _POLL_S * world_size / 64
            )  # this process holds the store: the others must have read it
            raise UserError(_missing(missing, world_size, timeout_s))
        time.sleep(_POLL_S)
    room.set("roster", json.dumps({"present": present}))
    return room


def _connect(rank: int, timeout_s: float) -> dist.Store:
    """Open the store, or serve it: rank 0 does unless torchrun does."""
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = rank == 0 and not served_by_torchrun
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serve,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if serve:
            raise UserError(f"rank 0 can't open {_address()} ({first_line(error)}); set another MASTER_PORT") from None
        raise UserError(
            f"rank {rank} on {socket.gethostname()} reached nobody at {_address()} in {timeout_s:.0f} s; {_SOCKET_HINT}"
        ) from None


def _get(store: dist.Store, key: str) -> str:
    """Return a value, or nothing where there is none; without waiting for one."""
    return store.get(key).decode() if store.check([key]) else ""


def _missing(missing: list[int], world_size: int, timeout_s: float) -> str:
    return (
        f"{world_size - len(missing)} of {world_size} ranks met at {_address()} in {timeout_s:.0f} s; missing: "
        f"{', '.join(map(str, missing))}; {_SOCKET_HINT}"
    )


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
