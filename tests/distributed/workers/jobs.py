"""Jobs on ranks that are started once: importing torch and connecting takes longer than most of them.

    torchrun --nproc_per_node 2 tests/distributed/workers/jobs.py FOLDER '["sync_batch_norm", "3,1"]' '["speed"]'

A job is a JSON list: a module of this folder, whose `main` takes this rank, and the job's arguments. A rank that has
done one leaves FOLDER/MODULE.done_RANK; the first job that fails ends all.
"""

import importlib
import json
import sys
from pathlib import Path

from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.distributed.process_group import DistEnv, process_group


def main(env: DistEnv, folder: Path, jobs: list[list[str]]) -> None:
    for name, *arguments in jobs:
        importlib.import_module(f"tests.distributed.workers.{name}").main(env, *arguments)
        (folder / f"{name}.done_{env.rank}").touch()


if __name__ == "__main__":
    this = DistEnv.from_environ()
    with process_group(this):
        main(this, Path(sys.argv[1]), [json.loads(job) for job in sys.argv[2:]])
    hard_exit(0)
