"""`dist-deeplab COMMAND ...`: every command by one name, from a clone and from an installed wheel alike.

    dist-deeplab train --config voc_resnet101 data.train=data/voc/train.json
    dist-deeplab COMMAND --help
    dist-deeplab torchrun --nproc_per_node 8 -m dist_deeplab.train ...         several processes; so does plain torchrun

`python -m dist_deeplab COMMAND` is the same. Exit codes: those of the command; 2 for an unknown command.
"""

import importlib
import sys
from difflib import get_close_matches
from typing import NamedTuple

from dist_deeplab import __version__


class Command(NamedTuple):
    """Where a command's `main(argv) -> exit code` is, and what it does."""

    module: str
    summary: str
    hard_exit: bool = False
    """It uses process groups, whose threads can abort the interpreter's own ending (see `hard_exit`)."""


COMMANDS = {
    "quickstart": Command("commands.quickstart", "draw data, train and evaluate: the whole system in one command"),
    "train": Command("train", "train a network, or resume an interrupted run", hard_exit=True),
    "evaluate": Command("evaluate", "score a checkpoint on a set of shards", hard_exit=True),
    "predict": Command("predict", "write the masks of images", hard_exit=True),
    "shards": Command("commands.shards", "pack images and masks into shards; verify shards, show their content"),
    "prepare-voc": Command("commands.prepare_voc", "download PASCAL VOC 2012 and SBD, and pack them"),
    "sample-voc": Command("commands.sample_voc", "draw a small data set in VOC's layout"),
    "convert-weights": Command("commands.convert_weights", "convert weights between the formats of other projects"),
    "export": Command("commands.export", "export a checkpoint to ONNX or a torch.export program"),
    "score": Command("commands.score", "score a folder of predicted masks against a folder of labels"),
    "tune-crf": Command("commands.tune_crf", "search the dense CRF's parameters"),
    "sweep": Command("sweep", "train with each of several settings and compare the runs"),
    "compare": Command("compare", "compare finished runs"),
    "doctor": Command("doctor", "check this machine: devices, communication, data", hard_exit=True),
    "torchrun": Command("commands.torchrun", "start a command on several processes, as torchrun does"),
    "scripts": Command("commands.scripts", "write launchers and Slurm scripts for use with an installed package"),
    "log-model": Command("log_model", "log a run's best checkpoint to MLflow as a model that serves"),
    "sync-mlflow": Command("commands.sync_mlflow", "send runs to MLflow that could not be sent while they ran"),
}


def main() -> int:
    """Run the command that `sys.argv` names; its exit code (a command with process groups ends the process itself)."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(manual())
        return 0 if len(sys.argv) > 1 else 2
    if sys.argv[1] == "--version":
        print(__version__)
        return 0
    name, arguments = sys.argv[1], sys.argv[2:]
    command = COMMANDS.get(name.replace("_", "-"))
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "dist-deeplab --help lists the commands"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    exit_code = int(importlib.import_module(f"dist_deeplab.{command.module}").main(arguments))
    if command.hard_exit:
        from dist_deeplab.distributed.launcher import hard_exit

        hard_exit(exit_code)
    return exit_code


def manual() -> str:
    """The docstring above and one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"    {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
