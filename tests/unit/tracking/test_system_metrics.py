"""What a node is busy with, against the kernel's own files; each node's points reach MLflow beside the run's."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_deeplab.tracking import system_metrics
from dist_deeplab.tracking.system_metrics import Sampler, follow, gpu_values, start_system_metrics

STAT = "cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4\n"
NET = (
    "Inter-|  Receive\n face |bytes\n"
    "    lo: 9999 0 0 0 0 0 0 0 9999 0 0 0 0 0 0 0\n  eth0: {rx} 0 0 0 0 0 0 0 {tx} 0 0\n"
)
MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    250 kB\n"


def write_proc(proc: Path, *, busy: int, idle: int, rx: int, tx: int) -> Path:
    (proc / "net").mkdir(parents=True, exist_ok=True)
    (proc / "stat").write_text(STAT.format(busy=busy, idle=idle))
    (proc / "net" / "dev").write_text(NET.format(rx=rx, tx=tx))
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "diskstats").write_text("   7  99 no-such-disk 1 0 2 0 3 0 4 0 0 0 0\n")
    return proc


def test_rates_are_means_since_the_last_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(system_metrics, "gpu_values", lambda: {})
    sampler = Sampler(write_proc(tmp_path, busy=100, idle=900, rx=0, tx=0))
    now[0] += 10.0
    write_proc(tmp_path, busy=160, idle=940, rx=50_000_000, tx=10_000_000)
    values = sampler.sample()
    assert values["cpu_utilization_percentage"] == 60.0
    assert values["system_memory_usage_percentage"] == 75.0
    assert values["network_receive_megabytes_per_s"] == pytest.approx(5.0)
    assert values["network_transmit_megabytes_per_s"] == pytest.approx(1.0)
    assert values["disk_read_megabytes_per_s"] == 0.0


def test_this_machine_can_be_read() -> None:
    values = Sampler().sample()
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    assert 0 < values["system_memory_usage_percentage"] < 100


def test_gpus_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "87, 40960, 312.50"\necho "3, 512, [N/A]"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_values() == {
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_memory_usage_megabytes": 40960.0,
        "gpu_0_power_usage_watts": 312.5,
        "gpu_1_utilization_percentage": 3.0,
        "gpu_1_memory_usage_megabytes": 512.0,
    }


def test_points_count_seconds_since_the_run_began_and_carry_the_node_s_name(tmp_path: Path) -> None:
    began = {"time": time.time() - 100, "status": "RUNNING", "attempt": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(began) + "\n")
    (tmp_path / "system").mkdir()
    turns = iter([True, True, False])
    follow(tmp_path, "node1", is_running=lambda: next(turns), every_s=0.01)
    records = [json.loads(line) for line in (tmp_path / "system" / "node1.jsonl").read_text().splitlines()]
    cpu = [record for record in records if record["key"] == "system/node1/cpu_utilization_percentage"]
    assert len(cpu) == 2
    assert all(99 <= record["step"] <= 110 for record in cpu)


def test_the_process_of_a_node_starts_and_does_not_outlive_the_run(tmp_path: Path) -> None:
    process = start_system_metrics(tmp_path, "here")
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "system" / "here.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "system/here.log").read_text()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    wrong_parent = [sys.executable, "-m", "dist_deeplab.tracking.system_metrics", str(tmp_path), "--node", "x"]
    assert subprocess.run([*wrong_parent, "--follow", "1"], timeout=60).returncode == 0, "it ends at once"
