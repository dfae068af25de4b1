"""Measure speed, ours and a stated baseline side by side in one run.

    python tools/benchmark.py step                      # an optimizer step, with its parts
    python tools/benchmark.py batch_norm --json bn.json
    python tools/benchmark.py scaling --check 2 4       # n ranks simulated, and real ones beside it
    python tools/benchmark.py scale                     # what a step costs each rank at 8 to 1,024 ranks
    python tools/benchmark.py evaluate                  # images/s of evaluation; crf: of the dense CRF
    python tools/benchmark.py loader --data data/voc/train.json
    python tools/benchmark.py all --out DIR --minutes 8   # all of these, one report
    python tools/benchmark.py COMMAND --help

Competitors take turns; figures are medians with their spread. --json also writes them, with device, versions and
command. Ratios travel between machines better than seconds do. Exit codes: 0 done, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import batch_norm, crf, evaluate, everything, loader, scale, scaling, step
from benchmarks.harness import machine, show, write_json

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import one_line_errors
from dist_deeplab.files import prepare_file

COMMANDS = {
    "step": step,
    "loader": loader,
    "batch_norm": batch_norm,
    "scaling": scaling,
    "scale": scale,
    "evaluate": evaluate,
    "crf": crf,
    "all": everything,
}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    measure(parse_arguments(argv))
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Run a benchmark and print its report; of several ranks (batch_norm) one prints."""
    if arguments.json:
        prepare_file(arguments.json, remedy="choose another --json")
    report = COMMANDS[arguments.command].run(arguments)
    env, where = DistEnv.from_environ(), machine()
    env.on_main(show, report, where)
    if arguments.json:
        env.on_main(write_json, report, where, arguments.json)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
