"""How busy a node is: processors, memory, network, disk and GPUs, as points of the run, one process on each node.

    python -m dist_deeplab.tracking.system_metrics RUN_DIR --node NAME --follow PID

`tracking.system_metrics=true` starts it on every node. Each 10 s it appends points to RUN_DIR/system/NAME.jsonl, which
has the journal's form; the uploader sends them, where all nodes see the run's folder. Keys are like those of MLflow's
own system metrics, with the node's name (`system/node1/cpu_utilization_percentage`), so that its page shows them; a
point's step is the seconds since the run began.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dist_deeplab.tracking.journal import JOURNAL, Journal, read_records

FOLDER = "system"
_EVERY_S = 10.0
_SECTOR_BYTES = 512  # of /proc/diskstats
_GPU_FIELDS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "power.draw": "power_usage_watts",
}


class Sampler:
    """Reads Linux's counters; rates are means since the call before."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._before = self._counters()
        self._asked = time.monotonic()

    def sample(self) -> dict[str, float]:
        """Return {name: value} since the last call: percentages, megabytes, and megabytes a second."""
        now, counters, elapsed = time.monotonic(), self._counters(), time.monotonic() - self._asked
        change = {name: value - self._before[name] for name, value in counters.items()}
        self._before, self._asked = counters, now
        memory = self._memory_kib()
        used = memory["MemTotal"] - memory["MemAvailable"]
        per_s = {name: change[name] / 1e6 / max(elapsed, 1e-9) for name in change if name.endswith("_megabytes_per_s")}
        return {
            "cpu_utilization_percentage": 100 * change["busy"] / max(1.0, change["busy"] + change["idle"]),
            "system_memory_usage_megabytes": used * 1024 / 1e6,
            "system_memory_usage_percentage": 100 * used / memory["MemTotal"],
            **per_s,
            **gpu_values(),
        }

    def _counters(self) -> dict[str, float]:
        """Return processor time (ticks) and bytes since the machine started; loopback and partitions are left out."""
        ticks = [float(value) for value in self._lines("stat")[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle and waiting for the disk (man 5 proc)
        network = [line.partition(":")[::2] for line in self._lines("net/dev")[2:]]
        fields = [values.split() for name, values in network if name.strip() != "lo"]
        disks = [line.split() for line in self._lines("diskstats")]
        whole = [disk for disk in disks if (Path("/sys/block") / disk[2]).exists()]
        return {
            "busy": sum(ticks) - idle,
            "idle": idle,
            "network_receive_megabytes_per_s": sum(float(each[0]) for each in fields),
            "network_transmit_megabytes_per_s": sum(float(each[8]) for each in fields),
            "disk_read_megabytes_per_s": sum(float(disk[5]) * _SECTOR_BYTES for disk in whole),
            "disk_write_megabytes_per_s": sum(float(disk[9]) * _SECTOR_BYTES for disk in whole),
        }

    def _memory_kib(self) -> dict[str, float]:
        pairs = (line.split()[:2] for line in self._lines("meminfo"))
        return {name.rstrip(":"): float(value) for name, value in pairs}

    def _lines(self, name: str) -> list[str]:
        return (self._proc / name).read_text().splitlines()


def gpu_values() -> dict[str, float]:
    """Return {"gpu_0_utilization_percentage": ...} of this node's NVIDIA GPUs, as nvidia-smi tells; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = {}
    for index, line in enumerate(lines):
        for name, text in zip(_GPU_FIELDS.values(), line.split(","), strict=True):
            if text.strip().replace(".", "", 1).isdigit():  # else "[N/A]"
                values[f"gpu_{index}_{name}"] = float(text)
    return values


def start_system_metrics(run_dir: Path, node: str) -> "subprocess.Popen[bytes]":
    """Start this node's process; it ends with the one that called."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dist_deeplab.tracking.system_metrics", str(run_dir), "--node", node]
    with (run_dir / FOLDER / f"{node}.log").open("ab") as output:
        return subprocess.Popen(
            [*command, "--follow", str(os.getpid())], stdout=output, stderr=output, start_new_session=True
        )


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
    """Append this node's points while the run goes on."""
    journal = Journal(run_dir / FOLDER / f"{node}.jsonl")
    sampler = Sampler()
    while is_running():
        time.sleep(every_s)
        now = time.time()
        started = next((record["time"] for record, _ in read_records(run_dir / JOURNAL) if "time" in record), now)
        common = {"step": max(0, round(now - started)), "time": round(now, 3), "attempt": journal.attempt}
        values = {f"system/{node}/{name}": value for name, value in sampler.sample().items()}
        journal.append(*({**common, "key": key, "value": value} for key, value in values.items()))
    journal.close()


if __name__ == "__main__":
    sys.exit(main())
