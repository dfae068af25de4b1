"""A round of the random killer; `python tests/distributed/killer.py --rounds 50` plays many."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.killer import (
    draw_faults,
    end_all,
    environ,
    from_server,
    play_round,
    undisturbed,
    with_mlflow,
)
from tests.distributed.same_run import compare, compare_in_mlflow
from tests.file_server import serve
from tests.processes import environ_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RANKS = 3  # with two there is one order of summation only; DDP's buckets matter from three on


@pytest.mark.parametrize("seed", [223])  # a rank while shards come; a child of rank 0; rank 0 during an evaluation
def test_a_run_killed_at_random_ends_with_the_undisturbed_weights_and_curves_here_and_in_mlflow(
    sample_shards: Path, tmp_path: Path, seed: int
) -> None:
    """Shards come from a slow server into a cache, and the curves go to MLflow; the undisturbed run has neither."""
    reference = undisturbed(sample_shards, tmp_path, ranks=RANKS)
    faults = draw_faults(random.Random(seed), ranks=RANKS, children=True, downloads=True)
    print(*faults, sep="\n")
    with serve(sample_shards) as server:
        more = [*with_mlflow(tmp_path), *from_server(server, tmp_path, "run")]
        play_round(sample_shards, tmp_path, "run", faults, ranks=RANKS, more=more)
    compare(tmp_path / "run", reference)
    compare_in_mlflow(tmp_path / "run", reference)


def test_the_killer_ends_all_that_it_started_in_other_sessions_too_and_nothing_else(tmp_path: Path) -> None:
    program = "import subprocess as s; p = s.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True)"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", f"{program}; p.wait()"],
            env=environ(tmp_path / name),
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("run", "another")
    ]
    children = [int(run.stdout.readline()) for run in runs if run.stdout]
    try:
        end_all(tmp_path / "run")
        assert runs[0].wait(timeout=10) < 0
        assert environ_of(children[0]) == {}
        assert runs[1].poll() is None
        assert environ_of(children[1])
    finally:
        end_all(tmp_path)
        for run in runs:
            run.communicate()
