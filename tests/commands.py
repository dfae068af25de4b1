"""Commands run in the test's own process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_deeplab import train
from dist_deeplab.evaluation import report


def exit_code(main: Callable[[Sequence[str]], int], *arguments: object) -> int:
    """The exit code of a command's `main` with these arguments, also where argparse ends it."""
    try:
        return int(main([str(argument) for argument in arguments]))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def draw_no_figures(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let training and evaluation draw nothing: figures are most of the time of runs as small as those of the tests.

    set_attribute: pytest's `monkeypatch.setattr`, in a process where others are to draw afterwards.
    """

    def instead_of_curves(_: object, path: Path) -> Path:
        return path.with_name("metrics.jsonl")

    set_attribute(report, "write_figures", lambda *_: [])
    set_attribute(train, "save_figure", instead_of_curves)
