"""`scaling --check`: steps of real gloo ranks on this machine, beside what the simulation predicts from their parts."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Report, Row
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count

ROUNDS = 30
TOOLS = Path(__file__).resolve().parent.parent


def check_report(
    backbone: str, crops: Sequence[int], *, images: int, rank_counts: Sequence[int], rounds: int
) -> Report:
    """Predicted and measured steps, for each crop, number of ranks, and synchronised and frozen batch norm.

    Args:
        crops: sizes in pixels, 8k+1. images: per rank. rank_counts: numbers of ranks. rounds: steps to take means of.

    Raises:
        UserError: ranks failed.
    """
    starts = [(crop, ranks) for crop in crops for ranks in rank_counts]
    rows = [row for crop, ranks in starts for row in check(backbone, crop, images, ranks=ranks, rounds=rounds)]
    explained = [
        "cores: that all ranks together got; compute: a rank's, in processor time; sharing: what it loses to other "
        "ranks and to gloo's threads on these cores",
        "sums, batch norm: waited for; gradients: waited for after backward; nothing is taken from measured steps",
    ]
    return Report(
        f"prediction against real gloo ranks: {backbone}, {format_count(images, 'image')} per rank", rows, explained
    )


def check(backbone: str, crop: int, images: int, *, ranks: int, rounds: int) -> list[Row]:
    """A row for each batch norm of one start of gloo ranks.

    Raises:
        UserError: the ranks failed.
    """
    where = format_count(ranks, "rank")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        worker = [TOOLS / "benchmarks" / "scaling_worker.py", out, backbone, crop, images, rounds]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, *map(str, worker)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS), str(TOOLS.parent)]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the check on {where} failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return [{"what": f"{where}, crop {crop}, {norm}", **row} for norm, row in found.items()]
