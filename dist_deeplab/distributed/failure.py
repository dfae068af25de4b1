"""The first error of any rank, known to all: NCCL, unlike gloo, never tells a waiting rank that another one is gone.

The failing rank writes a sentence into the store that all ranks share, before anything else of its ending. The others'
watchdogs read it, and a rank that fails only because its connection broke names the first failure, not its own.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.time_limit import within
from dist_deeplab.errors import first_line

_KEY = "first_failure"
_STORE_WAIT_S = 5.0  # the store may be gone with rank 0, or cut off


@dataclass(frozen=True)
class Failure:
    """Which rank failed first, and how."""

    rank: int
    host: str
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed: {self.message}"


class OtherRankFailed(Exception):
    """This rank's error follows from another rank's, which is named."""


@contextlib.contextmanager
def failure_published(env: DistEnv, store: dist.Store | None) -> Iterator[None]:
    """Publish an error that leaves this context, unless another rank failed first.

    Raises:
        OtherRankFailed: instead of a `RuntimeError` (a broken connection) where another rank failed first.
    """
    try:
        yield
    except Exception as error:
        own = Failure(env.rank, socket.gethostname(), first_line(error))
        first = within(_STORE_WAIT_S, lambda: publish_failure(store, own)) if store is not None else own
        if first is not None and first.rank != env.rank and isinstance(error, RuntimeError):
            raise OtherRankFailed(str(first)) from error
        raise


def publish_failure(store: dist.Store, own: Failure) -> Failure:
    """Publish a failure unless there is one, and return the first."""
    content = store.compare_set(_KEY, "", json.dumps(asdict(own)))
    return Failure(**json.loads(content))


def read_failure(store: dist.Store) -> Failure | None:
    """The first failure, if a rank failed; does not wait for one."""
    return Failure(**json.loads(store.get(_KEY))) if store.check([_KEY]) else None
