"""How the ranks find each other, or name the ranks that are missing.

torchrun, Slurm or the user say where rank 0 can be reached (MASTER_ADDR, MASTER_PORT); a key-value store there is what
the process group and the watchdog are built on.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from dist_deeplab.distributed.network import address_towards
from dist_deeplab.errors import UserError, first_line

_POLL_S = 0.05
_ANSWER_S = 5.0  # how much longer the others wait, to read from rank 0 which ranks are missing
_SOCKET_HINT = (
    "look at their logs and at the network between the nodes (NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the "
    "interface)"
)


@dataclass(frozen=True)
class Member:
    """A rank that joined. nonce: drawn at this start; address: its own on the way to rank 0; gpu: its UUID, or none."""

    nonce: str
    host: str
    address: str
    gpu: str = ""


@dataclass(frozen=True)
class Rendezvous:
    """All ranks of this start, in rank order, and a store that they and no earlier start share."""

    store: dist.Store
    members: tuple[Member, ...]


def rendezvous(rank: int, world_size: int, *, timeout_s: float, gpu: str = "") -> Rendezvous:
    """Wait until all ranks of this start have joined.

    torchrun's own store outlives its workers: after a restart it still holds what dead ones wrote. So rank 0 draws a
    new name, every rank answers it with a number of its own, and continues only once rank 0 has listed that number.

    Raises:
        UserError: rank 0 cannot be reached; or, on all ranks: others did not join, or two ranks hold one GPU.
    """
    deadline = time.monotonic() + timeout_s
    store = _connect(rank, timeout_s)
    own = Member(secrets.token_hex(8), socket.gethostname(), address_towards(os.environ["MASTER_ADDR"]), gpu)
    if rank == 0:
        return _collect(store, own, world_size, deadline=deadline, timeout_s=timeout_s)
    deadline += min(timeout_s, _ANSWER_S)
    while time.monotonic() < deadline:
        name = _get(store, "rendezvous")
        if name:
            shared = dist.PrefixStore(name, store)
            shared.set(f"rank/{rank}", json.dumps(asdict(own)))
            answer = json.loads(_get(shared, "answer") or "{}")
            if answer.get("problem"):
                raise UserError(answer["problem"])
            members = tuple(Member(**member) for member in answer.get("members", ()))
            if members and members[rank] == own:
                return Rendezvous(shared, members)
        time.sleep(_POLL_S * max(1, world_size / 64))  # a thousand ranks must not keep the store from answering
    raise UserError(
        f"rank {rank} on {socket.gethostname()} waited {timeout_s:.0f} s at {_address()} for rank 0, which did not "
        f"join; {_SOCKET_HINT}"
    )


def _collect(store: dist.Store, own: Member, world_size: int, *, deadline: float, timeout_s: float) -> Rendezvous:
    """Rank 0's part: collect the others' answers to a new name, and publish who is here or what is wrong."""
    name = f"rendezvous_{secrets.token_hex(8)}"
    shared = dist.PrefixStore(name, store)
    store.set("rendezvous", name)
    present = {0: own}
    problem = ""
    while len(present) < world_size and not problem:
        for rank in range(1, world_size):
            if rank not in present and (answer := _get(shared, f"rank/{rank}")):
                present[rank] = Member(**json.loads(answer))
        if len(present) < world_size:
            if time.monotonic() > deadline:
                problem = _missing([rank for rank in range(world_size) if rank not in present], world_size, timeout_s)
            else:
                time.sleep(_POLL_S)
    problem = problem or _shared_gpu(present)
    if problem:
        shared.set("answer", json.dumps({"problem": problem}))
        time.sleep(1.0 + 2 * _POLL_S * world_size / 64)  # this process may hold the store: the others must have read it
        raise UserError(problem)
    members = tuple(present[rank] for rank in range(world_size))
    shared.set("answer", json.dumps({"members": [asdict(member) for member in members]}))
    return Rendezvous(shared, members)


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
            f"rank {rank} on {socket.gethostname()} reached no process at {_address()} in {timeout_s:.0f} s; "
            f"{_SOCKET_HINT}"
        ) from None


def _get(store: dist.Store, key: str) -> str:
    """A value, or an empty string where there is none; without waiting for one."""
    return store.get(key).decode() if store.check([key]) else ""


def _missing(missing: list[int], world_size: int, timeout_s: float) -> str:
    return (
        f"{world_size - len(missing)} of {world_size} ranks joined at {_address()} in {timeout_s:.0f} s; missing: "
        f"{', '.join(map(str, missing))}; {_SOCKET_HINT}"
    )


def _shared_gpu(present: dict[int, Member]) -> str:
    """A sentence on two ranks that hold the same GPU, or nothing."""
    holders: dict[str, int] = {}
    for rank, member in sorted(present.items()):
        other = holders.setdefault(member.gpu, rank)
        if member.gpu and other != rank:
            return (
                f"ranks {other} and {rank} hold the same GPU of {member.host}; start as many processes on a node as it "
                "has GPUs (srun: --gpus-per-task=1)"
            )
    return ""


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
