"""Kill a training run at random, again and again, and compare its end with that of an undisturbed run.

    python tests/distributed/killer.py --rounds 50 [--ranks 4] [--seed 0] [--out DIR] [--hangs] [--mlflow] [--remote]

Each round trains under `torchrun --max-restarts 3` while random faults strike it at random moments (a step, a save,
an evaluation): SIGKILL of a rank, of all, of torchrun; SIGTERM and SIGUSR1 to a rank or to torchrun; with --hangs also
SIGSTOP of a rank, which the watchdog must find. With --mlflow the run is tracked in a SQLite store, where there must be
one run with the same curves in the end; with --remote its shards come from a slow HTTP server into a cache, and the
first fault strikes while they do. With either, single child processes of a rank are killed too (what feeds MLflow, what
fetches shards, a loader worker). The same command is started again until it is done. Then the final weights' SHA-256
and the logged curves must be those of the undisturbed run, to the last bit. Everything is drawn from the seed and
printed. (When a signal arrives depends on the machine's load too: a seed does not replay exactly.) Ended by SIGTERM or
Ctrl-C, the killer ends all that it started.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import command_environ, make_sample_shards, torchrun_command
from tests.distributed.disturbed_run import start
from tests.distributed.same_run import compare, compare_in_mlflow, weights_sha256
from tests.file_server import FileServer, serve
from tests.processes import children_of, environ_of, ranks_of

MAX_STEPS = 12
SMALL = [
    *(
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.crop_size=65",
        "data.num_workers=1",
        "batch.global_size=4",
        "optim.lr=1e-3",
    ),
    *(f"max_steps={MAX_STEPS}", "tracking.log_every=1", "checkpoint.every=2", "eval.every=4", "eval.num_panels=1"),
    *("tracking.uri=none", "distributed.hang_timeout_s=30"),
]
LAUNCHES = 12  # a round needs more than this only if something is broken
ROUND_TIMEOUT_S = 420
SERVER_BYTES_PER_S = 40_000  # a shard of the sample takes a second or two
MARK = "DIST_DEEPLAB_KILLER"  # in the environment of all that a round starts: the run's folder


@dataclass(frozen=True)
class Fault:
    """One thing that happens: at `step`, in `moment`, after `delay_s`, `victim` gets `number`."""

    step: int
    moment: str
    delay_s: float
    victim: str
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} to {self.victim} at step {self.step} ({self.moment} + {self.delay_s:.2f} s)"


def draw_faults(
    rng: random.Random, *, ranks: int, hangs: bool = False, children: bool = False, downloads: bool = False
) -> list[Fault]:
    """One to three faults in the order of their steps; with `downloads` one more before them."""
    faults = []
    for step in sorted(rng.sample(range(MAX_STEPS), rng.randint(1, 3))):
        moment = rng.choice(["step", "save", "evaluation"])
        victim = rng.choice([*(f"rank {rank}" for rank in range(ranks)), "all", "torchrun"])
        numbers = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
        if victim.startswith("rank"):
            numbers += [signal.SIGUSR1, *([signal.SIGSTOP] if hangs else [])]
        faults.append(Fault(step, moment, rng.choice([0.0, rng.uniform(0, 0.7)]), victim, rng.choice(numbers)))
    if children:
        number = rng.randrange(len(faults))
        faults[number] = replace(
            faults[number], victim=f"a child of rank {rng.randrange(ranks)}", number=signal.SIGKILL
        )
    if downloads:
        victim = rng.choice([*(f"rank {rank}" for rank in range(ranks)), "all", "torchrun", "a child of rank 0"])
        faults.insert(0, Fault(-1, "download", rng.uniform(0, 1.0), victim, signal.SIGKILL))
    return faults


def with_mlflow(out: Path) -> list[str]:
    """The arguments of runs in `out` that are tracked in a store there."""
    return [f"tracking.uri=sqlite:///{out}/mlflow.db"]


def from_server(server: FileServer, out: Path, name: str) -> list[str]:
    """The arguments of the run `name` whose shards come from `server`, slowly, to a cache of its own."""
    server.bytes_per_s = SERVER_BYTES_PER_S
    data = [f"data.{split}={server.url}/{split}.json" for split in ("train", "val")]
    return [*data, f"data.cache_dir={out}/{name}_cache"]


def run_arguments(shards: Path, out: Path, name: str) -> list[str]:
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", f"output_dir={out}", f"name={name}"]
    return [*data, *SMALL]


def command(shards: Path, out: Path, name: str, *, ranks: int, more: Sequence[str] = ()) -> list[str]:
    launcher = torchrun_command(ranks, "--max-restarts=3", "-m", "dist_deeplab.train")
    return [*launcher, *run_arguments(shards, out, name), *more]


def environ(run_dir: Path) -> dict[str, str]:
    return command_environ() | {"PET_MONITOR_INTERVAL": "0.1", MARK: str(run_dir)}


def undisturbed(shards: Path, out: Path, *, ranks: int) -> Path:
    """Train without faults and return the run's folder."""
    run_dir, log = out / "undisturbed", out / "undisturbed.log"
    assert start(run_arguments(shards, out, "undisturbed"), run_dir, log, ranks=ranks) == 0, log.read_text()
    return run_dir


def play_round(shards: Path, out: Path, name: str, faults: list[Fault], *, ranks: int, more: Sequence[str] = ()) -> int:
    """Train with faults, and `more` arguments, until it is done; return how many launches that took."""
    pending = list(faults)
    run_dir = out / name
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    for launch in range(1, LAUNCHES + 1):
        with (out / f"{name}.log").open("ab") as log:
            arguments = command(shards, out, name, ranks=ranks, more=more)
            with subprocess.Popen(
                arguments, env=environ(run_dir), stdout=log, stderr=log, start_new_session=True
            ) as agent:
                try:
                    while agent.poll() is None:
                        if time.monotonic() > deadline:
                            raise AssertionError(f"{name} hangs; see {log.name}")
                        if pending and is_time(pending[0], run_dir):
                            fault = pending.pop(0)
                            time.sleep(fault.delay_s)
                            strike(fault, agent.pid)
                        time.sleep(0.005)
                finally:
                    if agent.poll() is None:
                        end_all(run_dir)
            if agent.returncode == 0:
                return launch
    raise AssertionError(f"{name} is not done after {LAUNCHES} launches; see {out / name}.log")


def is_time(fault: Fault, run_dir: Path) -> bool:
    """Whether the fault's step has come, and its moment with it (or gone by: then any moment is right)."""
    step = last_step(run_dir)
    if step < fault.step:
        return False
    if fault.moment == "download":
        return step >= 0 or any(run_dir.with_name(f"{run_dir.name}_cache").glob(".*.part"))
    if step >= min(fault.step + 2, MAX_STEPS - 1) or fault.moment == "step":
        return True
    if fault.moment == "save":
        return any((run_dir / "checkpoints").glob(".*.tmp"))
    return step % 4 == 0


def last_step(run_dir: Path) -> int:
    """The last step in the journal, -1 before there is one."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, (run_dir / "metrics.jsonl").stat().st_size - 4096))
            lines = file.read().split(b"\n")[1:-1]
        return max((json.loads(line).get("step", -1) for line in lines), default=-1)
    except (OSError, ValueError):
        return -1


def strike(fault: Fault, agent: int) -> None:
    workers = dict(ranks_of(agent))
    if fault.victim == "torchrun":
        targets = [agent]
    elif fault.victim == "all":
        targets = [*workers.values(), *([agent] if fault.number == signal.SIGKILL else [])]
    elif fault.victim.startswith("a child"):
        targets = [pid for rank in workers if fault.victim.endswith(f"rank {rank}") for pid in one_child(workers[rank])]
    else:
        targets = [workers[rank] for rank in workers if fault.victim == f"rank {rank}"]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, fault.number)


def end_all(folder: Path) -> None:
    """Kill all that works on a run at or below `folder`: torchrun, its ranks in sessions of their own, their children.

    They are known by their environment, so what lost its parent to a fault is found too.
    """
    for _ in range(200):
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        left = [pid for pid in pids if Path(environ_of(pid).get(MARK, "/")).is_relative_to(folder)]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def one_child(parent: int) -> list[int]:
    """A child of a process, chosen at random and told; none if it has none for seconds."""
    for _ in range(50):
        with contextlib.suppress(OSError):  # it ended just now
            if children := children_of(parent):
                child = random.choice(children)
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
                print("  a child:", *command[1:5], flush=True)
                return [child]
        time.sleep(0.1)
    return []


def one_round(
    arguments: argparse.Namespace, shards: Path, out: Path, server: FileServer, *, seed: int, reference: Path
) -> None:
    """Play the round of a seed and print it.

    Raises:
        AssertionError: it did not end as the undisturbed run did.
    """
    name, ranks = f"seed_{seed}", arguments.ranks
    more = [
        *(with_mlflow(out) if arguments.mlflow else []),
        *(from_server(server, out, name) if arguments.remote else []),
    ]
    faults = draw_faults(
        random.Random(seed), ranks=ranks, hangs=arguments.hangs, children=bool(more), downloads=arguments.remote
    )
    print(f"seed {seed}: {'; '.join(map(str, faults))}", flush=True)
    launches = play_round(shards, out, name, faults, ranks=ranks, more=more)
    compare(out / name, reference)
    if arguments.mlflow:
        compare_in_mlflow(out / name, reference)
    print(f"seed {seed}: equal after {launches} launches", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--mlflow", action="store_true", help="track in a SQLite store, and compare what it holds")
    parser.add_argument("--remote", action="store_true", help="shards come from an HTTP server to a cache")
    parser.add_argument("--hangs", action="store_true", help="stop ranks too: each costs the watchdog's 30 s")
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="killer-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # through the `finally` below
    try:
        return play(arguments, out)
    finally:
        end_all(out)


def play(arguments: argparse.Namespace, out: Path) -> int:
    """Play all rounds in `out`, print the results, and return the exit code."""
    shards = make_sample_shards(out / "data")
    reference = undisturbed(shards, out, ranks=arguments.ranks)
    print(f"undisturbed: weights {weights_sha256(reference)[:16]}, in {out}", flush=True)
    failed = 0
    with serve(shards) as server:
        for number in range(arguments.rounds):
            try:
                one_round(arguments, shards, out, server, seed=arguments.seed + number, reference=reference)
            except AssertionError as error:
                failed += 1
                print(f"seed {arguments.seed + number}: FAILED: {error}", flush=True)
    print(
        f"{arguments.rounds - failed} of {arguments.rounds} rounds ended with the undisturbed run's weights and curves"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
