"""From nothing to a trained and evaluated model, in one command, with data that it draws itself.

    dist-deeplab quickstart                         # minutes on a laptop's CPU, less on a GPU
    dist-deeplab quickstart max_steps=40            # settings go to the training

In the current folder it
  1. draws a small data set in the format of PASCAL VOC         data/sample_voc/VOCdevkit/VOC2012
  2. packs it into WebDataset shards                            data/sample_voc/shards
  3. trains, one process per GPU (CPU: two)                     runs/quickstart, the recipe `quickstart`
  4. evaluates the best checkpoint: IoU of every class, figures

Run it again at any time: finished steps are skipped, an interrupted training resumes from its last checkpoint. To start
over: rm -r runs/quickstart. Exit codes: 0 done, 1 error, 2 wrong arguments, 75 stopped: run it again.
"""

import argparse
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dist_deeplab.command_line import command_name
from dist_deeplab.config import load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.errors import UserError
from dist_deeplab.packaged import mlflow_ui

SAMPLE = Path("data/sample_voc")
RUN = Path("runs/quickstart")
RECIPE = "quickstart"
FIXED = ("name", "output_dir")
"""Settings of the recipe that the evaluation relies on."""

ENDING = """
Done.
  the run's files       {run}/              config, metrics.jsonl, checkpoints, logs
  the figures           {run}/eval/         predictions, confusion matrix, IoU per class
  all runs compared     {pages}"""


def main(argv: Sequence[str] | None = None) -> int:
    logging.getLogger("dist_deeplab").addHandler(logging.NullHandler())  # notices on settings come from the training
    arguments = parse_arguments(argv)
    children = Children()
    for part in commands(arguments.nproc_per_node, arguments.overrides):
        code = children.run([sys.executable, "-m", "dist_deeplab", *part])
        if code or children.stopped:
            return code
    pages = mlflow_ui(f"sqlite:///{RUN.parent}/mlflow.db")
    print(ENDING.format(run=RUN, pages=f"{pages}, then open http://127.0.0.1:5000"))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("quickstart"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes (default: one per GPU; CPU: two)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the training")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.nproc_per_node is not None and arguments.nproc_per_node < 1:
        parser.error(f"--nproc-per-node must be 1 or more, not {arguments.nproc_per_node}")
    for override in arguments.overrides:
        if override.partition("=")[0] in FIXED:
            parser.error(f"{override} cannot be changed here, where the evaluation expects {RUN}: use `train`")
    try:  # what training would refuse is said before the data is drawn
        batch = load_config(RECIPE, arguments.overrides).batch
        arguments.nproc_per_node = arguments.nproc_per_node or default_processes()
        BatchSplit.derive(global_size=batch.global_size, micro_size=None, world_size=arguments.nproc_per_node)
    except UserError as error:
        parser.error(str(error))
    return arguments


def commands(num_processes: int, overrides: Sequence[str]) -> list[list[str]]:
    """The commands of the steps that are not done yet, in their order."""
    shards = SAMPLE / "shards"
    parts = [["sample-voc", "--out", str(SAMPLE)]]
    # The manifest is written last: where it exists, the shards are complete.
    missing = [split for split in ("train", "val") if not (shards / f"{split}.json").exists()]
    if missing:
        voc = str(SAMPLE / "VOCdevkit/VOC2012")
        parts.append(["shards", "--voc-root", voc, "--split", *missing, "--out", str(shards)])
    several = ["torchrun", "--standalone", f"--nproc_per_node={num_processes}", "-m"]
    parts.append([*several, "dist_deeplab.train", "--config", RECIPE, *overrides])
    best = RUN / "checkpoints" / "best.pt"
    parts.append(["evaluate", str(best), "--data", str(shards / "val.json")])  # few images: one process is soon done
    return parts


def default_processes() -> int:
    """One process per GPU; two on the CPU, to show that training is distributed."""
    import torch

    return torch.cuda.device_count() or 2


class Children:
    """Runs commands one after the other and passes SIGINT and SIGTERM on, for the training to save and end."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def run(self, command: Sequence[str]) -> int:
        """Exit code of a command, run to its end; 128 + N where signal N ended it."""
        # A session of its own: Ctrl-C must reach torchrun once, through this process.
        with subprocess.Popen(command, start_new_session=True) as self._process:
            if self.stopped:
                self._process.terminate()
            code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


if __name__ == "__main__":
    sys.exit(main())
