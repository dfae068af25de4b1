"""The exceptions that a user can fix, and the exit codes of all commands.

0 done, 1 error, 2 wrong arguments, configuration or data, 75 stopped early but saved.
"""

import sys
from collections.abc import Callable

STOPPED_EARLY = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class UserError(Exception):
    """A mistake in arguments, configuration, environment or data.

    The message is one sentence that says what is wrong, where, and what to do. The entry points print it
    without a traceback and leave with `exit_code`.
    """

    exit_code = 2


class TrainingError(UserError):
    """Training cannot go on although arguments and data were fine at the start, e.g. the loss became NaN."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """First line of another library's error, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_tool(work: Callable[[], int | None]) -> int:
    """Exit code of a tool that is one process: 0 or what `work` returns; a user's mistake is one line on stderr."""
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
