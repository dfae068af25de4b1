"""The one exception that means: the user can mend this."""


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
    """Return the first line of another library's error, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
