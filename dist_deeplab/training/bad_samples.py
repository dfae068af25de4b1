"""Damaged training samples: all ranks agree on how many there are, and stop together where there are too many."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.data.batch import BadSample, Batch
from dist_deeplab.distributed.process_group import DistEnv, broadcast_from_main, gather_to_all
from dist_deeplab.errors import TrainingError
from dist_deeplab.files import NonEssentialWrites, replace_text
from dist_deeplab.logs import format_count

FILE = "bad_samples.jsonl"

log = logging.getLogger(__name__)


class BadSamples:
    """The different samples that were replaced so far, the same on all ranks; `FILE` in the run's folder lists them."""

    def __init__(self, path: Path, limit: int, env: DistEnv, known: Sequence[str] = ()) -> None:
        self.path = path
        self.limit = limit
        self.env = env
        self.known = set(known)
        self._writing = NonEssentialWrites(f"the list of bad samples, {path},")

    @classmethod
    def open(cls, run_dir: Path, limit: int, env: DistEnv, *, start: int) -> "BadSamples":
        """The samples that were met before step `start`; every rank must call it. Later ones will be met again."""
        path = run_dir / FILE
        lines: list[str] = []
        env.on_main(lambda: lines.extend(_keep_before(path, start)))
        return cls(path, limit, env, [json.loads(line)["sample"] for line in broadcast_from_main(lines)])

    def take(self, step: int, micro_batches: Sequence[Batch], num_bad: int) -> None:
        """Take what was replaced in a step: this rank's micro-batches, and the number over all ranks.

        Every rank must call it; where there was nothing bad it costs nothing.

        Raises:
            TrainingError: more different samples are bad than may be; on all ranks in the same step.
        """
        if not num_bad:
            return
        own = [bad for batch in micro_batches for bad in batch.bad]
        agreed = [BadSample(*bad) for rank in gather_to_all(own) for bad in rank]
        found = {bad.sample: bad for bad in agreed if bad.sample not in self.known}
        self.known |= found.keys()
        self.env.on_main(self._list, step, list(found.values()))
        if len(self.known) > self.limit:
            last = list(found.values())[-1]
            raise TrainingError(
                f"{format_count(len(self.known), 'sample is', 'samples are')} bad, data.max_bad_samples={self.limit}; "
                f"the last: {last.problem} (all: {self.path})"
            )

    def values(self) -> dict[str, float]:
        """The metric, where bad samples are allowed at all."""
        return {"data/bad_samples": float(len(self.known))} if self.limit else {}

    def _list(self, step: int, found: Sequence[BadSample]) -> None:
        for bad in found:
            log.warning("another sample was taken in place of a bad one: %s", bad.problem)
        lines = [json.dumps({"step": step, "sample": bad.sample, "problem": bad.problem}) + "\n" for bad in found]
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def _keep_before(path: Path, start: int) -> list[str]:
    """The file's lines of the steps up to `start`, and drop those that a killed attempt wrote."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            continue
    with NonEssentialWrites(f"the list of bad samples, {path},")():
        replace_text(path, "".join(f"{line}\n" for line in kept))
    return kept
