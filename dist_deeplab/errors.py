"""The exceptions that a user can fix, and the exit codes of all commands.

0 done, 1 error, 2 wrong arguments, configuration or data, 75 stopped early but saved.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
STOPPED_EARLY = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class UserError(Exception):
    """A mistake in arguments, configuration, environment or data.

    The message is one sentence that says what is wrong, where, and what to do. The entry points print it
    without a traceback and leave with `exit_code`.
    """

    exit_code = 2


class TrainingError(UserError):
    """Training cannot continue although arguments and data were fine at the start, e.g. the loss became NaN."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """First line of another library's error, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line_errors(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` of one process that prints a user's mistake as one line on stderr and gives its exit code."""

    @functools.wraps(main)
    def checked(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code

    return checked
