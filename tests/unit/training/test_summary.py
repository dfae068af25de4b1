"""The evaluations to come are counted as the loop will hold them."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_deeplab.config import load_config
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.training.summary import evaluations_left, packing_notes


@pytest.mark.parametrize("max_steps", [1, 7, 10, 11])
@pytest.mark.parametrize("every", [0, 1, 3, 5, 10, 100])
def test_evaluations_left_are_those_that_the_loop_makes(max_steps: int, every: int) -> None:
    config = load_config(None, [f"max_steps={max_steps}", f"eval.every={every}"])
    for done in range(max_steps + 1):
        to_come = [
            step for step in range(done + 1, max_steps + 1) if step == max_steps or (every and step % every == 0)
        ]
        assert evaluations_left(config, done) == len(to_come)


def test_each_note_names_its_set(sample_shards: Path) -> None:
    train_set = replace(load_manifest(sample_shards / "train.json"), notes=("9 images turned",))
    val_set = replace(load_manifest(sample_shards / "val.json"), notes=("2 images turned",))
    assert packing_notes(train_set, val_set) == ["train: 9 images turned", "val: 2 images turned"]
    assert packing_notes(train_set, None) == ["train: 9 images turned"]
