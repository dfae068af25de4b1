"""A change of the code that means to change no number does not."""

import json
from pathlib import Path

import pytest

from tests.reference.curve import FILE, KEYS, made_with, run_quickstart

pytestmark = pytest.mark.distributed  # starts the command as users do


def test_the_quickstart_repeats_its_recorded_curve(sample_shards: Path, tmp_path: Path) -> None:
    recorded = json.loads(FILE.read_text())
    curve = run_quickstart(sample_shards, tmp_path)
    assert [len(curve[key]) for key in KEYS] == [10, 10, 10]
    if recorded["made_with"] == made_with():
        assert curve == recorded["curve"], "the numbers changed; if they should: python -m tests.reference.curve"
    else:
        for key, tolerance in zip(KEYS, (0.02, 0.2, 1e-6), strict=True):
            assert curve[key] == pytest.approx(recorded["curve"][key], rel=tolerance), key
