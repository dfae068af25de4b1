"""Who this process is among the ranks, the process group's lifetime, and the few collectives used.

Only `distributed/` knows what the main rank is; everything else makes the same calls on every rank.
"""

import contextlib
import datetime
import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_deeplab.distributed.network import GLOO_INTERFACE, NCCL_INTERFACE, choose_gloo_interface, raise_file_limit
from dist_deeplab.distributed.rendezvous import Rendezvous, rendezvous
from dist_deeplab.distributed.time_limit import within
from dist_deeplab.errors import UserError, first_line

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STARTUP_TIMEOUT_S = 600.0
HANG_TIMEOUT_S = 1800.0  # covers the main rank drawing figures or saving to a slow disk while others wait
_LATER_S = 60.0  # collectives time out this much later than the watchdog, whose message says more
_DESTROY_WAIT_S = 60.0
_INTERFACES = {"gloo": GLOO_INTERFACE, "nccl": NCCL_INTERFACE}
_SLURM_PORTS = (20000, 12000)  # first port and how many: below the ephemeral ones (32768 and up)

T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """This process among the ranks."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str = "single process"
    device_kind: str = "auto"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "DistEnv":
        """Read torchrun's variables, else those of a Slurm step with several tasks, else be the only process.

        Raises:
            UserError: some of torchrun's variables are set and others are not, or are not numbers.
        """
        present = [name for name in _TORCHRUN[:3] if name in environ]
        if present:
            missing = [name for name in _TORCHRUN if name not in environ]
            if missing:
                raise UserError(
                    f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with torchrun, "
                    "or unset them to run as a single process"
                )
            rank, world_size, local_rank = (_integer(environ, name) for name in _TORCHRUN[:3])
            if not 0 <= rank < world_size:
                raise UserError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size}); use torchrun")
            return cls(rank, local_rank, world_size, "torchrun")
        if "SLURM_PROCID" in environ and _integer(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
            return cls(
                _integer(environ, "SLURM_PROCID"),
                _integer(environ, "SLURM_LOCALID"),
                _integer(environ, "SLURM_STEP_NUM_TASKS"),
                "slurm",
            )
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def on_main(self, function: Callable[..., T], *arguments: object) -> T | None:
        """The result of `function(*arguments)` on the main rank, None on the others: for printing and writing files."""
        return function(*arguments) if self.is_main else None

    def on_each_node(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function(*arguments)` on one rank of each node."""
        if self.local_rank == 0:
            function(*arguments)

    @property
    def device(self) -> torch.device:
        """The rank's GPU, or the CPU where there is none.

        Raises:
            UserError: more ranks on this node than GPUs; none although one was asked for (`device=cuda`).
        """
        if self.device_kind == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"device=cuda, but torch {torch.__version__} sees no GPU here; look at nvidia-smi and at what "
                "`dist-deeplab doctor` says, or set device=cpu"
            )
        if self.device_kind == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if torch.cuda.device_count() == 1:  # srun may bind one to each task; ranks that share it meet an error later
            return torch.device("cuda", 0)
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {self.local_rank} has no GPU: {torch.cuda.device_count()} here; start as many processes "
                "a node as it has GPUs"
            )
        return torch.device("cuda", self.local_rank)


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"the environment variable {name} is {text!r}, not a number") from None


@contextlib.contextmanager
def process_group(
    env: DistEnv, *, startup_timeout_s: float = STARTUP_TIMEOUT_S, hang_timeout_s: float = HANG_TIMEOUT_S
) -> Iterator[dist.Store | None]:
    """Hold the default process group open: NCCL where the ranks have GPUs, else gloo. Nothing at world size 1.

    It is destroyed on success only. After an error the process must print it and end by `hard_exit`.

    Yields:
        The store that all ranks share, None at world size 1.

    Args:
        env: this rank.
        startup_timeout_s: how long to wait for the other ranks.
        hang_timeout_s: how long a collective may take.

    Raises:
        UserError: more ranks on this node than GPUs; ranks that did not join, or that cannot connect.
    """
    device = env.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if env.world_size == 1:
        yield None
        return
    if env.launcher == "slurm":
        _set_slurm_rendezvous()
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    joined = rendezvous(env.rank, env.world_size, timeout_s=startup_timeout_s, gpu=gpu)
    _connect(env, device, joined, timeout_s=hang_timeout_s + _LATER_S)
    yield joined.store
    # After an error this is not reached: NCCL's part of it waits for the other ranks, without a time limit.
    gc.collect()  # DDP sits in reference cycles and holds the group: use it in a function that has returned by now
    within(_DESTROY_WAIT_S, dist.destroy_process_group)


def _connect(env: DistEnv, device: torch.device, joined: Rendezvous, *, timeout_s: float) -> None:
    """Open the process group.

    Without gloo where there are GPUs: it connects each rank with each other one, half a million pairs of 1,000.

    Raises:
        UserError: the other ranks can't be reached.
    """
    raise_file_limit()
    backend = backend_of(device)
    interface = _INTERFACES[backend]
    if backend == "gloo":
        choose_gloo_interface(joined.members[env.rank].address, [each.address for each in joined.members])
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("process_group", joined.store),
            rank=env.rank,
            world_size=env.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        all_reduce_sum(torch.ones(1)).item()  # NCCL connects at the first collective
    except RuntimeError as error:
        host = joined.members[env.rank].host
        more = "; NCCL_DEBUG=INFO says more" if backend == "nccl" else ""
        raise UserError(
            f"rank {env.rank} on {host} can't connect to the other ranks by {backend} over the interface "
            f"{os.environ.get(interface) or 'of its own choice'} ({first_line(error)}); set {interface} on each node "
            f"to the interface that the others reach (`ip -brief address` lists them){more}"
        ) from None


def backend_of(device: torch.device) -> str:
    """The backend whose collectives take a device's tensors."""
    return "nccl" if device.type == "cuda" else "gloo"


def _set_slurm_rendezvous() -> None:
    """Derive MASTER_ADDR and MASTER_PORT, where they are not set, from the job: first host, port from its id.

    Raises:
        UserError: scontrol can't tell the hosts.
    """
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
            os.environ["MASTER_ADDR"] = hosts[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise UserError(
                f"`{' '.join(command)}` does not name the job's first node ({first_line(OSError(said))}); set "
                "MASTER_ADDR to it"
            ) from None
    first, count = _SLURM_PORTS
    os.environ.setdefault("MASTER_PORT", str(first + int(os.environ["SLURM_JOB_ID"]) % count))


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of ranks in the process group, 1 without one."""
    return dist.get_world_size() if _active() else 1


def ranks_on_host(environ: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that share this host's cores: torchrun sets it; srun gives each task cores of its own."""
    return _integer(environ, "LOCAL_WORLD_SIZE", default=1)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it."""
    if _active():
        on_wire = _on_wire(tensor)
        dist.all_reduce(on_wire)
        if on_wire is not tensor:
            tensor.copy_(on_wire)
    return tensor


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the process group takes it; NCCL takes none of the CPU, so there the host waits for a copy."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def broadcast_from_main(value: T) -> T:
    """The main rank's `value` on every rank: anything that JSON holds (tuples become lists)."""
    return _from_json(_gather_bytes(_to_json(value), only_main=True)[0])


def gather_to_all(value: T) -> list[T]:
    """Every rank's `value`, in rank order: anything that JSON holds (tuples become lists)."""
    return [_from_json(content) for content in gather_bytes(_to_json(value))]


def gather_bytes(own: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order. No pickles travel: a process that joins uninvited must not run code here."""
    return _gather_bytes(own, only_main=False)


def _gather_bytes(own: bytes, *, only_main: bool) -> list[bytes]:
    if not _active():
        return [own]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64)
    if not only_main or rank == 0:
        sizes[rank] = len(own)
    all_reduce_sum(sizes)
    padded = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
    if sizes[rank]:
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    on_wire = _on_wire(padded)
    if only_main:
        dist.broadcast(on_wire, src=0)
        return [on_wire.cpu()[: int(sizes[0])].numpy().tobytes()]
    everything = on_wire.new_empty(world_size, len(on_wire))
    dist.all_gather(list(everything), on_wire)
    return [row[:size].numpy().tobytes() for row, size in zip(everything.cpu(), sizes.tolist(), strict=True)]


def _to_json(value: object) -> bytes:
    return json.dumps(value).encode()


def _from_json(content: bytes) -> Any:
    return json.loads(content)
