"""Train, then write what a rank opened and hashed: {"opened": {file: times}, "hashed": bytes, "commands": [name]}."""

import collections
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from dist_deeplab import train

OPENED: collections.Counter[str] = collections.Counter()
COMMANDS: list[str] = []


class CountedHash:
    """A hash of hashlib that counts the bytes it is given."""

    num_bytes = 0

    def __init__(self, real: Any, data: bytes = b"") -> None:
        self.real = real
        self.update(data)

    def update(self, data: Any) -> None:
        CountedHash.num_bytes += memoryview(data).nbytes
        self.real.update(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        OPENED[os.path.realpath(os.fsdecode(arguments[0]))] += 1
    elif event == "subprocess.Popen":
        COMMANDS.append(Path(str(arguments[0])).name)


def main(counts_folder: Path, arguments: list[str]) -> int:
    real_new, real_sha256 = hashlib.new, hashlib.sha256
    hashlib.new = lambda name, data=b"", **options: CountedHash(real_new(name, **options), data)  # type: ignore[assignment]
    hashlib.sha256 = lambda data=b"", **options: CountedHash(real_sha256(**options), data)  # type: ignore[assignment]
    sys.addaudithook(listen)
    exit_code = train.main(arguments)
    counts = {"opened": dict(OPENED), "hashed": CountedHash.num_bytes, "commands": COMMANDS}
    (counts_folder / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(counts))
    return exit_code
