"""Speed options on real ranks."""

from pathlib import Path

import pytest

from tests.conftest import Run

pytestmark = pytest.mark.distributed


def test_recomputation_and_compression_keep_gradients_and_statistics(run_ranks: Run) -> None:
    result = run_ranks(2, Path(__file__).parent / "workers" / "speed.py")
    assert result.returncode == 0, result.stderr
