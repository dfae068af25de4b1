"""Jobs on ranks that are started once: connecting takes longer than most of them.

A job is a list: a module of this folder, whose `main` takes this rank, and the job's arguments. A rank that has done
one leaves FOLDER/MODULE.done_RANK; the first job that fails ends all.
"""

import importlib
from pathlib import Path

from dist_deeplab.distributed.process_group import DistEnv, process_group


def main(folder: Path, jobs: list[list[str]]) -> None:
    env = DistEnv.from_environ()
    with process_group(env):
        for name, *arguments in jobs:
            importlib.import_module(f"tests.distributed.workers.{name}").main(env, *arguments)
            (folder / f"{name}.done_{env.rank}").touch()
