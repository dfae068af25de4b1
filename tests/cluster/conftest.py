"""A real Slurm of two nodes on this one host, for the tests of this folder.

munged, slurmctld and two slurmd run as children of the test process, with their keys, sockets, state and logs in one
temporary folder, on free ports: the host's own Slurm and munge, if any, are neither used nor disturbed. Both nodes have
this host's name and differ in port (`slurmd -N NAME`), which Debian's build allows.

It needs root, since slurmd starts the jobs for their users, and the packages slurm-wlm and munge.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
NODES = ("dist-deeplab-1", "dist-deeplab-2")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_TIMEOUT_S = 60
JOB_TIMEOUT_S = 240

# config_overrides: the nodes have the CPUs stated here, whatever this host has.
SLURM_CONF = """\
ClusterName=dist-deeplab-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; `run` calls Slurm's commands against it."""

    folder: Path
    nodes: tuple[str, ...]
    environ: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> str:
        """The standard output of `sbatch`, `squeue` and the like. Raises: RuntimeError with what they said."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environ | environ, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def run_job(self, *arguments: str, cwd: Path, **environ: str) -> tuple[str, str]:
        """Submit with `sbatch ARGUMENTS` from `cwd` and wait: the final state ("COMPLETED", "FAILED"), the output."""
        job = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environ).strip()
        try:
            wait_until(lambda: self.job_field(job, "EndTime") != "Unknown" and self.is_over(job), JOB_TIMEOUT_S)
        except TimeoutError as error:
            self.run("scancel", "--full", job)
            raise AssertionError(f"job {job} did not end: {self.run('scontrol', 'show', 'job', job)}") from error
        return self.job_field(job, "JobState"), Path(self.job_field(job, "StdOut")).read_text()

    def job_field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(field.partition("=")[2] for field in shown.split() if field.startswith(f"{name}="))

    def is_over(self, job: str) -> bool:
        return self.job_field(job, "JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different: the sockets are open at the same time."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def why_not() -> str | None:
    """Why no Slurm can be started here, in one sentence, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return f"slurmd starts jobs for their users, so it needs root; this is {getpass.getuser()}"
    return None


@pytest.fixture
def slurm(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with an empty queue also where the test before failed."""
    yield cluster
    cluster.run("scancel", "--full", "--user", "root")
    wait_until(lambda: cluster.run("squeue", "--noheader") == "", JOB_TIMEOUT_S)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """The cluster, up and idle; every daemon that was started is gone afterwards."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Not pytest's tmp_path: a socket's path may have 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        cluster = write_configuration(folder)
        start_daemons(cluster, daemons)
        yield cluster
    finally:
        stop_daemons(daemons)
        shutil.rmtree(folder, ignore_errors=True)


def write_configuration(folder: Path) -> SlurmCluster:
    host = socket.gethostname().partition(".")[0]
    controller_port, *node_ports = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"
        for name, port in zip(NODES, node_ports)
    )
    # slurm/train.sh derives its port from the job's id: two clusters on this host at a time must not count alike.
    first_job = 1000 + secrets.randbelow(50_000)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(host=host, controller_port=controller_port, first_job=first_job, folder=folder, nodes=nodes)
    )
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    # A Slurm that this process may run under, and torchrun's variables, must not leak into the jobs.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "PET_"))}
    environ = inherited | {"SLURM_CONF": str(conf), "PATH": SYSTEM_PATH}
    return SlurmCluster(folder=folder, nodes=NODES, environ=environ)


def start_daemons(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """munged, slurmctld, one slurmd per node, each added to `daemons` at once. Returns when all nodes are idle."""
    folder = cluster.folder

    def start(name: str, *command: str) -> None:
        with open(folder / f"{name}.log", "wb") as log:
            daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=cluster.environ)
            )

    def logs() -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))

    def wait_for(what: str, condition: Callable[[], bool]) -> None:
        def met() -> bool:
            dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
            if dead:
                pytest.fail(f"Slurm did not start: {dead} ended\n{logs()}")
            return condition()

        try:
            wait_until(met, START_TIMEOUT_S)
        except TimeoutError:
            pytest.fail(f"Slurm did not start: no {what} after {START_TIMEOUT_S} s\n{logs()}")

    munge = folder / "munge"
    # --force: it dislikes a socket in a folder that only root may enter.
    start(
        "munged", "munged", "--foreground", "--force", f"--key-file={munge}.key", f"--socket={munge}.socket",
        f"--pid-file={munge}.pid", f"--seed-file={munge}.seed", f"--log-file={munge}.log",
    )  # fmt: skip
    wait_for("munge socket", Path(f"{munge}.socket").exists)
    start("slurmctld", "slurmctld", "-D", "-f", cluster.environ["SLURM_CONF"])
    for name in cluster.nodes:
        start(f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", cluster.environ["SLURM_CONF"])

    def all_idle() -> bool:
        states = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=cluster.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return states.stdout.split() == ["idle"] * len(cluster.nodes)

    wait_for("idle nodes", all_idle)


def stop_daemons(daemons: list[subprocess.Popen[bytes]]) -> None:
    """Last started first: the nodes, the controller, munge."""
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
