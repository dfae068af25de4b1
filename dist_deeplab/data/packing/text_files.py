"""Small text files that people write by hand: lists, names, maps."""

from pathlib import Path

from dist_deeplab.data.shards.manifest import ShardError


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the white space around them; CRLF and a byte order mark are tolerated.

    Raises:
        ShardError: there is no such file, or it is not UTF-8 text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ShardError(f"{path} is not UTF-8 text; convert it, e.g. with iconv") from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from None
