"""What can be wrong with a cluster: software, devices, network and disk of all ranks. Every rank calls these checks."""

import hashlib
import os
import platform
import resource
import secrets
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from filelock import Timeout

from dist_deeplab.distributed.process_group import DistEnv, broadcast_from_main, gather_to_all
from dist_deeplab.errors import UserError, first_line
from dist_deeplab.files import fsync
from dist_deeplab.locks import explain, file_lock
from dist_deeplab.logs import format_count

_LIBRARIES = ("torch", "numpy", "opencv-python-headless", "Pillow", "mlflow")
_PACKAGE = Path(__file__).resolve().parent.parent
_MIB = 2**20
_ALL_REDUCE_BYTES = {"cuda": 256 * _MIB, "cpu": 32 * _MIB}  # ResNet-101's gradients are 176 MB
_REPEATS = 5
_FREE_BYTES = 10 * 2**30  # five checkpoints of ResNet-101 and the images, and some to spare
_FILE_BYTES = 16 * _MIB


Status = Literal["ok", "warning", "FAILED"]


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was checked, its status, and why."""

    what: str
    status: Status
    text: str


def render(findings: Sequence[Finding]) -> str:
    """The table, and how many failed."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{finding.status:7}  {finding.what:{width}}  {finding.text}" for finding in findings]
    counts = [sum(finding.status == status for finding in findings) for status in ("FAILED", "warning")]
    return "\n".join([*lines, f"{counts[0]} failed, {format_count(counts[1], 'warning')}", ""])


def on_all_ranks(what: str, ask: Callable[[], str]) -> Finding:
    """Compare the answers of all ranks; an error on one rank, or a difference, fails."""
    try:
        own = f"={ask()}"
    except (UserError, OSError, RuntimeError) as error:
        own = f"!{first_line(error)}"
    answers = gather_to_all(own)
    text = _by_answer([answer[1:] for answer in answers])
    sound = len(set(answers)) == 1 and answers[0].startswith("=")
    return Finding(what, "ok" if sound else "FAILED", text)


def check_software(env: DistEnv) -> list[Finding]:
    """Compare the code and the libraries of all ranks."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    hosts = gather_to_all(socket.gethostname())
    per_host = sorted({(host, hosts.count(host)) for host in hosts})
    ranks = f"{format_count(env.world_size, 'rank')} by {env.launcher}: " + ", ".join(
        f"{n} on {host}" for host, n in per_host
    )
    uneven = len({n for _, n in per_host}) > 1
    return [
        Finding("ranks", "warning" if uneven else "ok", ranks),
        on_all_ranks("code", lambda: f"dist_deeplab {code_digest()[:12]}"),
        on_all_ranks("libraries", lambda: f"Python {platform.python_version()}, {', '.join(found)}"),
    ]


def code_digest() -> str:
    """SHA-256 of the package's source files and their names."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def check_devices(env: DistEnv) -> list[Finding]:
    """Name the devices and multiply two matrices on each."""

    def ask() -> str:
        device = env.device
        matrix = torch.eye(256, device=device)
        if not torch.equal(matrix @ matrix, matrix):
            raise RuntimeError(f"{device} on {socket.gethostname()} multiplies wrongly")
        if device.type == "cpu":
            return f"CPU, {format_count(torch.get_num_threads(), 'thread')} per rank"
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    return [on_all_ranks("devices", ask)]


def check_open_files(env: DistEnv) -> Finding:
    """Whether each process may open a connection to each other one, as gloo does and rank 0's store."""
    soft, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4 * env.world_size + 256
    enough = soft == resource.RLIM_INFINITY or soft >= needed
    remedy = "" if enough else f"; {needed} may be needed: raise `ulimit -n`"
    return Finding("open files", "ok" if enough else "warning", f"limit {soft} per process{remedy}")


def check_network(env: DistEnv) -> tuple[Finding, float | None]:
    """Measure the all-reduce that gradients go through, and compare its result with what it must be.

    Returns:
        The finding, and the bytes per second that all-reduce handles; None for a single process.
    """
    if env.world_size == 1:
        return Finding("all-reduce", "ok", "a single process: nothing to measure"), None
    tensor = torch.empty(_ALL_REDUCE_BYTES[env.device.type] // 4, device=env.device)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one opens connections
        tensor.fill_(float(env.rank))
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        is_right = bool((tensor == sum(range(env.world_size))).all())  # waits for the device, too
        seconds.append(time.perf_counter() - started)
    slowest = max(gather_to_all(min(seconds[1:])))
    # A ring sends and receives 2 (n - 1) / n of the data through each rank's link.
    size = tensor.numel() * 4
    bus = size * 2 * (env.world_size - 1) / env.world_size / slowest
    text = f"{size / _MIB:.0f} MiB in {1000 * slowest:.1f} ms: {bus / 1e9:.2f} GB/s through each rank"
    right = all(gather_to_all(is_right))
    backend = "NCCL" if env.device.type == "cuda" else "gloo"
    status: Status = "ok" if right else "FAILED"
    return Finding(f"all-reduce ({backend})", status, text if right else "wrong sums; " + text), size / slowest


def check_disk(env: DistEnv, folder: Path) -> list[Finding]:
    """Try what checkpoints need of the disk, and whether all ranks see the same files."""
    trial = broadcast_from_main(str(folder / f".doctor-{secrets.token_hex(4)}"))
    path = Path(trial)
    written = broadcast_from_main(_write_trial(path) if env.is_main else "")
    findings = [Finding("writing", "FAILED" if written.startswith("!") else "ok", f"{folder}: {written.lstrip('!')}")]
    if not written.startswith("!"):
        token = broadcast_from_main((path / "token").read_text(encoding="utf-8") if env.is_main else "")
        findings.append(on_all_ranks("shared disk", lambda: _read_trial(path, token)))
        findings.append(check_locks(env, path / "lock"))
        free = shutil.disk_usage(path).free if env.is_main else 0
        free = broadcast_from_main(free)
        enough = "ok" if free >= _FREE_BYTES else "warning"
        findings.append(Finding("free space", enough, f"{free / 2**30:.1f} GiB in {folder}"))  # type: ignore[arg-type]
    dist.barrier() if env.world_size > 1 else None
    if env.is_main:
        shutil.rmtree(path, ignore_errors=True)
    return findings


def check_locks(env: DistEnv, path: Path) -> Finding:
    """Whether a lock that the main rank holds on a file keeps out all other ranks, on all hosts."""
    lock = file_lock(path)

    def look() -> str:
        sound = f"file locks keep others out in {path.parent.parent}"
        if env.is_main:
            return sound
        try:
            with file_lock(path).acquire(timeout=0):
                pass
        except Timeout:
            return sound
        raise UserError(
            f"{socket.gethostname()} can lock what the main rank has locked, so that two jobs could write one run; "
            "mount the file system with locks between hosts (Lustre: -o flock, not localflock)"
        )

    problem = ""
    try:
        if env.is_main:
            lock.acquire(timeout=0)
    except OSError as error:
        problem = explain(error, remedy="choose another output_dir")
    problem = broadcast_from_main(problem)
    finding = Finding("file locks", "FAILED", problem) if problem else on_all_ranks("file locks", look)
    lock.release()
    return finding


def _write_trial(path: Path) -> str:
    """Speed of writing a file to disk, or ! and the problem."""
    try:
        path.mkdir(parents=True)
        started = time.perf_counter()
        (path / "file.tmp").write_bytes(os.urandom(_FILE_BYTES))
        fsync(path / "file.tmp")
        os.replace(path / "file.tmp", path / "file")
        fsync(path)
        seconds = time.perf_counter() - started
        (path / "token").write_text(secrets.token_hex(16), encoding="utf-8")
    except OSError as error:
        return f"!{first_line(error)}; choose another output_dir"
    return f"write, fsync and rename of {_FILE_BYTES / _MIB:.0f} MiB at {_FILE_BYTES / 1e6 / seconds:.0f} MB/s"


def _read_trial(path: Path, token: str) -> str:
    """Check that this host sees what the main rank's wrote.

    Raises:
        UserError: it does not.
    """
    file = path / "token"
    deadline = time.monotonic() + 10  # NFS caches the absence of a file for some seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if not file.exists():
        raise UserError(f"{socket.gethostname()} does not see what the main rank wrote to {path.parent}")
    if file.read_text(encoding="utf-8") != token:
        raise UserError(f"{socket.gethostname()} reads other content in {path.parent} than the main rank wrote")
    return f"all ranks see the same files in {path.parent}"


def _by_answer(answers: list[str]) -> str:
    """The answer, or each with the ranks that gave it."""
    ranks = defaultdict(list)
    for rank, answer in enumerate(answers):
        ranks[answer].append(rank)
    if len(ranks) == 1:
        return answers[0]
    return "; ".join(f"rank {', '.join(map(str, who))}: {answer}" for answer, who in ranks.items())
