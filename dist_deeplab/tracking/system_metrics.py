"""How busy a node is: processors, memory, network, disk and GPUs, as points of the run, one process on each node.

    python -m dist_deeplab.tracking.system_metrics RUN_DIR --node NAME --follow PID

`tracking.system_metrics=true` starts it on every node. Each 10 s it appends points to RUN_DIR/system/NAME.jsonl, which
has the journal's form; the uploader sends them, where all nodes see the run's folder. Keys are like those of MLflow's
own system metrics, with the node's name (`system/node1/cpu_utilization_percentage`), so that its page shows them; a
point's step is the seconds since the run began.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dist_deeplab.files import NonEssentialWrites
from dist_deeplab.tracking.journal import JOURNAL, Journal, read_records

FOLDER = "system"
_EVERY_S = 10.0
_CHECK_S = 0.5  # how soon the process ends after its run


class Sampler:
    """Reads the counters of this node; rates are means since the call before."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call only begins to count
        self._before = _bytes_so_far()
        self._asked = time.monotonic()

    def sample(self) -> dict[str, float]:
        """{name: value} since the last call: percentages, megabytes, megabytes per second, watts."""
        counters, elapsed = _bytes_so_far(), max(1e-9, time.monotonic() - self._asked)
        change = {name: (value - self._before.get(name, value)) / 1e6 / elapsed for name, value in counters.items()}
        self._before, self._asked = counters, time.monotonic()
        memory = psutil.virtual_memory()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": (memory.total - memory.available) / 1e6,
            "system_memory_usage_percentage": memory.percent,
            **change,
            **gpu_values(),
        }


def _bytes_so_far() -> dict[str, float]:
    """{name of the rate: bytes since the machine started}; loopback left out, a counter that is missing too."""
    network = [values for name, values in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    disk = psutil.disk_io_counters()  # None where there is no disk, as in some containers
    return {
        "network_receive_megabytes_per_s": sum(values.bytes_recv for values in network),
        "network_transmit_megabytes_per_s": sum(values.bytes_sent for values in network),
        **(
            {"disk_read_megabytes_per_s": disk.read_bytes, "disk_write_megabytes_per_s": disk.write_bytes}
            if disk
            else {}
        ),
    }


def gpu_values() -> dict[str, float]:
    """{"gpu_0_utilization_percentage": ...} of this node's NVIDIA GPUs; what a GPU does not tell is left out."""
    import pynvml

    values: dict[str, float] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return {}
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            for name, read in (
                ("utilization_percentage", lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
                ("memory_usage_megabytes", lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6),
                ("power_usage_watts", lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3),
            ):
                try:
                    values[f"gpu_{index}_{name}"] = float(read(gpu))
                except pynvml.NVMLError:  # e.g. utilization under MIG
                    continue
    except pynvml.NVMLError:
        pass
    finally:
        pynvml.nvmlShutdown()
    return values


def start_system_metrics(run_dir: Path, node: str) -> "subprocess.Popen[bytes] | None":
    """Start this node's process, which ends with the caller's; None where the disk has no space for its files."""
    command = [sys.executable, "-m", "dist_deeplab.tracking.system_metrics", str(run_dir), "--node", node]
    process = None
    with NonEssentialWrites("the record of system metrics")():
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        with (run_dir / FOLDER / f"{node}.log").open("ab") as output:
            process = subprocess.Popen(
                [*command, "--follow", str(os.getpid())], stdout=output, stderr=output, start_new_session=True
            )
    return process


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dist_deeplab.tracking.system_metrics", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--node", required=True, help="name of this node")
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the process to end with: the parent")
    arguments = parser.parse_args()
    os.nice(10)  # training goes first
    follow(arguments.run_dir, arguments.node, is_running=lambda: os.getppid() == arguments.follow)
    return 0


def follow(run_dir: Path, node: str, *, is_running: Callable[[], bool], every_s: float = _EVERY_S) -> None:
    """Append this node's points as long as the run continues, and once more at its end."""
    journal = Journal(run_dir / FOLDER / f"{node}.jsonl")
    sampler = Sampler()
    while is_running():
        due = time.monotonic() + every_s
        while (left := due - time.monotonic()) > 0 and is_running():
            time.sleep(min(left, _CHECK_S))
        now = time.time()
        started = next((record["time"] for record, _ in read_records(run_dir / JOURNAL) if "time" in record), now)
        common = {"step": max(0, round(now - started)), "time": round(now, 3), "attempt": journal.attempt}
        values = {f"system/{node}/{name}": value for name, value in sampler.sample().items()}
        journal.append(*({**common, "key": key, "value": value} for key, value in values.items()))
    journal.close()


if __name__ == "__main__":
    sys.exit(main())
