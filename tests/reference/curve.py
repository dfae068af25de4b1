"""The recorded loss curve of a short quickstart run, which guards changes that must not change a number.

    python -m tests.reference.curve        # records it anew: only where the numbers are meant to change, and say why

Bit-identical with the software and processor it was made with, else within a tolerance.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("quickstart_curve.json")
KEYS = ("train/loss", "train/grad_norm", "lr/head_weight")


def made_with() -> dict[str, str]:
    """What has a say in the last digits."""
    packages = ("torch", "numpy", "opencv-python-headless", "Pillow")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    model = cpu.partition(":")[2].strip() or platform.machine()
    return {**{name: version(name) for name in packages}, "cpu": f"{model} {torch.backends.cpu.get_cpu_capability()}"}


def run_quickstart(shards: Path, output_dir: Path) -> dict[str, list[float]]:
    """Train `configs/quickstart.yaml` for 10 steps on a small drawn set; return each key's values."""
    arguments = [
        *("--config", str(REPO / "configs/quickstart.yaml"), f"data.train={shards}/train.json", "data.val="),
        *(
            f"output_dir={output_dir}",
            "name=curve",
            "max_steps=10",
            "precision.dtype=fp32",
            "data.crop_size=65",
            "data.scale_range=[0.75,1.5]",
            "data.num_workers=0",
        ),
        *("tracking.uri=none", "tracking.log_every=1", "checkpoint.every=1000"),
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "dist_deeplab.train", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (output_dir / "curve" / "metrics.jsonl").read_text().splitlines()]
    return {key: [r["value"] for r in records if r.get("key") == key] for key in KEYS}


def draw_shards(folder: Path) -> Path:
    """Draw the set that the curve is of: 16 images."""
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "dist_deeplab"]
    make_sample = [*command, "sample-voc", "--out", folder, "--num-train", "16", "--num-val", "7"]
    subprocess.run(make_sample, check=True, capture_output=True, env=environ)
    voc = folder / "VOCdevkit" / "VOC2012"
    make = [*command, "shards", "--voc-root", voc, "--split", "train", "--out", folder / "shards"]
    subprocess.run(make, check=True, capture_output=True, env=environ)
    return folder / "shards"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curve: dict[str, Any] = run_quickstart(draw_shards(Path(folder)), Path(folder) / "runs")
    FILE.write_text(json.dumps({"made_with": made_with(), "curve": curve}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
