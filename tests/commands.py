"""Commands run in the test's own process."""

from collections.abc import Callable, Sequence


def exit_code(main: Callable[[Sequence[str]], int], *arguments: object) -> int:
    """The exit code of a command's `main` with these arguments, also where argparse ends it."""
    try:
        return int(main([str(argument) for argument in arguments]))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
