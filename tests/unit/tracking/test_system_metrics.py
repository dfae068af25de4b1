"""What a node is busy with; each node's points reach MLflow beside the run's."""

import json
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pynvml
import pytest

from dist_deeplab.tracking import system_metrics
from dist_deeplab.tracking.system_metrics import Sampler, follow, gpu_values, start_system_metrics

Network = namedtuple("Network", "bytes_recv bytes_sent")
Disk = namedtuple("Disk", "read_bytes write_bytes")


def test_rates_are_means_since_the_last_sample_without_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    now, network = [100.0], {"lo": Network(0, 0), "eth0": Network(0, 0), "ib0": Network(10**9, 0)}
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: network)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    sampler = Sampler()
    now[0] += 10.0
    network |= {"lo": Network(10**9, 10**9), "eth0": Network(20_000_000, 10_000_000)}
    network["ib0"] = Network(10**9 + 30_000_000, 0)
    values = sampler.sample()
    assert values["network_receive_megabytes_per_s"] == pytest.approx(5.0)
    assert values["network_transmit_megabytes_per_s"] == pytest.approx(1.0)
    assert "disk_read_megabytes_per_s" not in values, "a machine without disks has no such points"
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: Disk(5, 6))
    assert sampler.sample()["disk_read_megabytes_per_s"] == 0.0, "a disk that appears has no rate yet"


def test_this_machine_can_be_read() -> None:
    sampler = Sampler()
    started = time.monotonic()
    while time.monotonic() - started < 0.3:
        pass
    values = sampler.sample()
    assert 0 < values["cpu_utilization_percentage"] <= 100
    assert 0 < values["system_memory_usage_percentage"] < 100
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024 / 1e6
    assert 0 < values["system_memory_usage_megabytes"] < total


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert gpu_values() == {}


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names and types are NVML's; tests/gpu reads real ones."""

    def not_supported(gpu: int) -> None:
        raise pynvml.NVMLError_NotSupported

    memory = pynvml.c_nvmlMemory_t(total=8 * 10**9, free=0, used=2 * 10**9)
    use = pynvml.c_nvmlUtilization_t(gpu=87, memory=5)
    for name, stand_in in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda gpu: use if gpu == 0 else not_supported(gpu),
        "nvmlDeviceGetMemoryInfo": lambda gpu: memory,
        "nvmlDeviceGetPowerUsage": lambda gpu: 312_500,
    }.items():
        assert hasattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, stand_in)
    assert gpu_values() == {
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_memory_usage_megabytes": 2000.0,
        "gpu_0_power_usage_watts": 312.5,
        "gpu_1_memory_usage_megabytes": 2000.0,
        "gpu_1_power_usage_watts": 312.5,
    }


def test_points_count_seconds_since_the_run_began_and_carry_the_node_s_name(tmp_path: Path) -> None:
    began = {"time": time.time() - 100, "status": "RUNNING", "attempt": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(began) + "\n")
    (tmp_path / "system").mkdir()
    points = tmp_path / "system" / "node1.jsonl"
    key = "system/node1/cpu_utilization_percentage"
    follow(tmp_path, "node1", is_running=lambda: points.read_text().count(key) < 2, every_s=0.01)
    cpu = [record for record in map(json.loads, points.read_text().splitlines()) if record["key"] == key]
    assert len(cpu) == 2
    assert all(99 <= record["step"] <= 110 for record in cpu)


def test_a_run_that_ends_between_two_points_gets_a_last_one_at_once(tmp_path: Path) -> None:
    (tmp_path / "system").mkdir()
    turns = iter([True, True, False, False])
    began = time.monotonic()
    follow(tmp_path, "node1", is_running=lambda: next(turns), every_s=3600)
    assert time.monotonic() - began < 60
    assert (tmp_path / "system/node1.jsonl").read_text().count("cpu_utilization_percentage") == 1


def test_the_process_of_a_node_starts_and_does_not_outlive_the_run(tmp_path: Path) -> None:
    process = start_system_metrics(tmp_path, "here")
    assert process is not None
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "system" / "here.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "system/here.log").read_text()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    wrong_parent = [sys.executable, "-m", "dist_deeplab.tracking.system_metrics", str(tmp_path), "--node", "x"]
    assert subprocess.run([*wrong_parent, "--follow", "1"], timeout=60).returncode == 0, "it ends at once"
