"""What is known of a download, in small JSON files hidden beside its target."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dist_deeplab import files
from dist_deeplab.downloads.remote import Remote

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Where a file came from and what it was found to be: later calls trust this as long as the file is untouched."""

    url: str
    size: int
    digests: dict[str, str]
    mtime_ns: int


def beside(target: Path, ending: str) -> Path:
    """The hidden file `.<name>.<ending>` beside `target`."""
    return target.with_name(f".{target.name}.{ending}")


def read_record(path: Path, kind: type[T]) -> T | None:
    """The record in a file, or None where there is none or it is damaged: then what it is about is not used."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kind(**values)
    except (OSError, ValueError, TypeError):
        return None


def write_record(path: Path, record: Record | Remote) -> None:
    """Write a record whole or not at all."""
    files.replace_text(path, json.dumps(asdict(record)) + "\n")
