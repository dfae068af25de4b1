"""The commands in README, docs/performance.md and docs/verification.md, which makes each figure by one, can be run.

Each is taken apart by the program's own parser, which knows its sub-commands, options, choices and types; it does
nothing else.
"""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from dist_deeplab.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
VERIFICATION = ROOT / "docs" / "verification.md"
OTHERS = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
PROGRAM = re.compile(r"(?:python (?:tools|tests)/\S+\.py|dist-deeplab|pytest|\./launch/\S+\.sh)(?=\s|$)")


class Parsed(BaseException):
    """A program has read its arguments; not an Exception, which the program might catch."""


def in_tables(text: str) -> Iterator[str]:
    """The commands in the second column of a page's tables; options alone: of the command before them."""
    for row in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        before = ""
        for code in re.findall(r"`([^`]+)`", row.split(" | ")[1] if " | " in row else ""):
            if PROGRAM.match(code):
                before = code
                yield code
            elif code.startswith("--") and before:
                yield f"{before.partition(' --')[0]} {code}"


def in_text(text: str) -> Iterator[str]:
    """The commands in a page's code blocks, and those with arguments in its sentences."""
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from filter(PROGRAM.match, re.sub(r" *\\\n *", " ", block).splitlines())
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`([^`]+)`", outside) if PROGRAM.match(code) and " -" in code)


FIGURES = list(in_tables(VERIFICATION.read_text(encoding="utf-8")))
COMMANDS_OF_PAGES = list(dict.fromkeys([*FIGURES, *(c for page in OTHERS for c in in_text(page.read_text("utf-8")))]))


def parse(command: str) -> None:
    """Have the program of a command read its arguments."""
    program, *arguments = shlex.split(command, comments=True)
    if arguments[0] == "torchrun":
        ranks, unknown = get_args_parser().parse_known_args(arguments[1:])  # parse_args is what ends a program here
        if unknown:
            raise SystemExit(f"torchrun does not know {unknown}")
        program = "dist-deeplab" if ranks.module else "python"
        arguments = [ranks.training_script.removeprefix("dist_deeplab."), *ranks.training_script_args]
    if program == "dist-deeplab":
        module = COMMANDS[arguments[0].replace("_", "-")].module
        importlib.import_module(f"dist_deeplab.{module}").main(arguments[1:])
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


@pytest.fixture
def _only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end with `Parsed` once they have read their arguments."""

    def that_ends(read: Callable[..., object]) -> Callable[..., None]:
        def read_and_end(*arguments: object) -> None:
            read(*arguments)
            raise Parsed

        return read_and_end

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, that_ends(getattr(argparse.ArgumentParser, name)))


@pytest.mark.usefixtures("_only_parsed")
@pytest.mark.parametrize("command", COMMANDS_OF_PAGES)
def test_a_documented_command_is_understood_by_its_program(command: str) -> None:
    if command.startswith(("pytest ", "./")):
        paths = [word.removeprefix("./") for word in shlex.split(command, comments=True) if "/" in word[:-1]]
        assert all((ROOT / path).exists() for path in paths if not path.startswith("configs"))
    else:
        with pytest.raises(Parsed):
            parse(command)


@pytest.mark.usefixtures("_only_parsed")
@pytest.mark.parametrize(
    "command",
    [
        "python tools/benchmark.py nothing",
        "python tools/benchmark.py loader --data a.json --nothing 3",
        "python tests/distributed/killer.py --ranks 9",
        "dist-deeplab torchrun --nproc_per_node 2 --nothing -m dist_deeplab.train",
        "dist-deeplab torchrun --nproc_per_node 2 -m dist_deeplab.evaluate --data val.json",
        "dist-deeplab shards info --nothing train.json",
    ],
)
def test_what_no_program_understands_is_seen(command: str) -> None:
    with pytest.raises(SystemExit):
        parse(command)


def test_every_kind_of_command_is_found() -> None:
    assert len(FIGURES) >= 10
    table = "| a | `python tests/distributed/killer.py --rounds 6`; `--rounds 8` | `x` |\n"
    assert list(in_tables(table)) == [f"python tests/distributed/killer.py --rounds {number}" for number in (6, 8)]
