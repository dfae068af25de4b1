"""torchrun with the settings that this project needs, and with an ending of one line instead of a traceback.

    dist-deeplab torchrun --standalone --nproc_per_node 8 -m dist_deeplab.train --config voc_resnet101
    PET_MAX_RESTARTS=10 dist-deeplab torchrun ...       torchrun's own options also come from PET_<OPTION>

What it changes: restarts use a store of their own (torch 2.13 hangs otherwise, pytorch#135712); SIGUSR1 is passed on
and processes have 90 s to save; each is bound to the CPUs near its GPU where the machine has several NUMA nodes and
`numactl` (unless --numa-binding is given). The launchers and slurm/train.sh call it. Exit codes: those of the command
that it starts (0, 1, 2, 75 stopped early but saved); 128 + N where signal N ended it before that.
"""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from dist_deeplab.distributed.launcher import STATUS_VARIABLE
from dist_deeplab.workers import num_cores

SETTINGS = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "90",
}
STOPPED_EARLY = 75
EXIT_CODES = {"refused": 2, "stopped": STOPPED_EARLY}
"""Exit code by the run's status, where torchrun itself knows only that processes have failed."""
NUMA_NODES = Path("/sys/devices/system/node")


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    arguments = torchrun.parse_args(None if argv is None else list(argv))
    share_cores(arguments)
    with tempfile.TemporaryDirectory(prefix="dist_deeplab-") as folder:
        # The status file is slurm/train.sh's where there is one: it reads it too.
        status_file = Path(os.environ.setdefault(STATUS_VARIABLE, str(Path(folder) / "status")))
        quieten_agent(status_file)
        arguments.log_dir = arguments.log_dir or folder  # torchrun leaves its own behind
        try:
            launch(arguments)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode in (2, STOPPED_EARLY) else 1
            return EXIT_CODES.get(read_status(status_file), code)
        except SignalException as error:
            return EXIT_CODES.get(read_status(status_file), 128 + error.sigval)
    return 0


def launch(arguments: Namespace) -> None:
    """Start the processes and wait for their end, as `torch.distributed.run.run` does.

    Raises:
        ChildFailedError: a process failed, and the restarts are used up.
        SignalException: this process got a signal, and the processes it started have ended.
    """
    if arguments.standalone:
        arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    if arguments.master_port is None:  # of the static rendezvous alone
        arguments.master_port = 29500
    config, command, command_arguments = torchrun.config_from_args(arguments)
    if can_bind_to_numa_nodes(arguments):
        from torch.numa.binding import AffinityMode, NumaOptions

        config.numa_options = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    elastic_launch(config, command)(*command_arguments)


def can_bind_to_numa_nodes(arguments: Namespace) -> bool:
    """Whether each process has a GPU, on a machine with several NUMA nodes, and torchrun can bind it there."""
    if getattr(arguments, "numa_binding", "") is not None or shutil.which("numactl") is None:
        return False  # chosen by the user; or a torchrun that has no such option
    if len(list(NUMA_NODES.glob("node[0-9]*"))) < 2:
        return False
    import torch

    return torch.cuda.is_available() and str(torch.cuda.device_count()) == str(arguments.nproc_per_node)


def share_cores(arguments: Namespace) -> None:
    """Give each process its share of the cores, unless OMP_NUM_THREADS is set; torchrun would give it one."""
    if str(arguments.nproc_per_node).isdecimal():
        share = num_cores() // int(arguments.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def quieten_agent(status_file: Path) -> None:
    """One line per failed process and per signal in place of torchrun's log; of a planned stop the run itself tells."""
    agent = logging.getLogger("torch.distributed.elastic")
    agent.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    handler.addFilter(lambda record: read_status(status_file) not in EXIT_CODES and is_news(record))
    agent.handlers = [handler]


class OneLine(logging.Formatter):
    """A record in one line: torchrun's tracebacks are of its own code, not of what failed."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().strip()
        if failed := re.search(r"\(exitcode: (-?\d+)\) local_rank: (\d+)", message):
            return f"torchrun: the process of local rank {failed[2]} failed: {ending(int(failed[1]))}"
        if received := re.search(r"Received (\d+) death signal", message):
            return f"torchrun: {signal.Signals(int(received[1])).name}: passed on, the processes save and stop"
        return f"torchrun: {message.splitlines()[0]}"


def is_news(record: logging.LogRecord) -> bool:
    """Whether a record tells of something that went wrong or of a signal, and not of what follows from these."""
    message = record.getMessage()
    expected = (f"(exitcode: {STOPPED_EARLY})", "(exitcode: 2)", "closing signal")
    return record.levelno >= logging.WARNING and bool(message.strip()) and not any(part in message for part in expected)


def read_status(file: Path) -> str:
    """The first word of the status file, empty if there is none."""
    try:
        return file.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return ""


def ending(exit_code: int) -> str:
    """`exit code 1` or `killed by SIGKILL`."""
    return f"exit code {exit_code}" if exit_code >= 0 else f"killed by {signal.Signals(-exit_code).name}"
