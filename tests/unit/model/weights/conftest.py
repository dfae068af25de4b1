"""Fixtures for files that claim to need more memory than they have bytes."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """No more than 1 GiB above what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
