"""The contract between a command and what launched it: torchrun, srun, the shell or a script around them.

run_command     what every command's `main` does on each rank: who am I, errors as sentences, exit codes
hard_exit       the last line of every command's file
write_status    what became of a run, for slurm/train.sh: torchrun's exit code does not say it
refuse_restart  ends torchrun where another attempt would fail or stop again
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dist_deeplab.distributed.failure import OtherRankFailed
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.files import NonEssentialWrites, replace_text
from dist_deeplab.logs import setup_logging

STATUS_VARIABLE = "DIST_DEEPLAB_OUTCOME"
_GRACE_S = 3.0  # how long other ranks leave the main rank to report an error that all of them have
_ECHO_GRACE_S = 5.0

log = logging.getLogger(__name__)


def run_command(work: Callable[[DistEnv], int]) -> int:
    """Call `work` with this process's place among the ranks and return the exit code; for a command's `main`.

    Errors are printed here, before anything waits for other ranks; the process must then end by `hard_exit`.
    """
    env = DistEnv()
    try:
        env = DistEnv.from_environ()
        setup_logging(to_terminal=env.is_main, rank=env.rank, folder=None)
        return work(env)
    except UserError as error:
        return exit_with_error(env, error)
    except Exception as error:
        return exit_with_crash(env, error)


def exit_with_error(env: DistEnv, error: UserError) -> int:
    """Print the error once for all ranks that have it, and return its exit code.

    The main rank prints at once. Another one first leaves it time to do so (the launcher then ends this process), and
    prints only if the mistake turns out to be its own, e.g. data missing on its node.
    """
    if not env.is_main:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run would go on to save
        time.sleep(_GRACE_S)
    where = "" if env.is_main else f" (rank {env.rank})"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    write_status("refused")
    refuse_restart()
    return error.exit_code


def exit_with_crash(env: DistEnv, error: Exception) -> int:
    """Log an unexpected error with its traceback, to the rank's log file too, and return exit code 1.

    A broken connection mostly follows from another rank's error: that rank gets time to print its own, and the launcher
    to end this process.
    """
    if env.world_size > 1 and isinstance(error, RuntimeError | OtherRankFailed):
        time.sleep(_ECHO_GRACE_S)
    if isinstance(error, OtherRankFailed):
        log.error("rank %d ends: %s", env.rank, error)
    else:
        log.error("rank %d failed", env.rank, exc_info=error)
    return 1


def hard_exit(exit_code: int) -> NoReturn:
    """End this process with `exit_code`, without the interpreter's own ending; for a command's last line.

    After an error nothing may wait for the other ranks (`destroy_process_group` does, with NCCL). And once DDP was
    used, torch (2.13) keeps gloo's threads running after the group is destroyed: one of them that releases a tensor
    while the interpreter ends aborts the process ("terminate called without an active exception", SIGABRT), and a
    launcher takes a finished run for a failed one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def write_status(status: str, *, first_step: int = 0, last_step: int = 0) -> None:
    """Write `status first_step last_step` to the file that the environment names, if it names one.

    Args:
        status: running; stopped (saved, the same command resumes); done; refused (the same command would fail again).
        first_step: where this start of the run began.
        last_step: how far it is known to be saved.
    """
    name = os.environ.get(STATUS_VARIABLE)
    if name:
        with NonEssentialWrites(f"the run's status for its launcher, {name},")():
            replace_text(Path(name), f"{status} {first_step} {last_step}\n")


def launched_s_ago() -> float:
    """Age in seconds of what started the run: torchrun, whose restarts do not reset it, or this process."""
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): field 22, in ticks since boot
        return max(0.0, float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def refuse_restart() -> None:
    """Keep torchrun's --max-restarts from starting again what would only stop or fail again.

    Whatever the exit code, torchrun takes it for a failure to be tried again; a SIGTERM ends it instead.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    if left > 0 and _is_torchrun(os.getppid()):
        os.kill(os.getppid(), signal.SIGTERM)


def _is_torchrun(pid: int) -> bool:
    """Whether a process is torchrun, and not one that merely inherited its variables."""
    try:
        return b"torch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
