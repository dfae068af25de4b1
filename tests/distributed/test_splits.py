"""Promises P1 to P4 on real ranks: any split of the work, one result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab import evaluate
from dist_deeplab.distributed.process_group import DistEnv
from tests.distributed.forked_ranks import run_forked
from tests.distributed.workers import gradients, jobs
from tests.networks import checkpoint_of, discerning_network, write_checkpoint

pytestmark = pytest.mark.distributed

Trained = Callable[[int, str], dict[str, Any]]


def relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|got - expected| / |expected| over all tensors as one vector."""
    assert got.keys() == expected.keys()
    difference = sum((got[k].double() - expected[k].double()).square().sum() for k in got)
    return float((difference / sum(expected[k].double().square().sum() for k in got)).sqrt())


# --- what each number of ranks does, in processes that are started once -----------------------------------------------

WEIGHTED = (",classes", ",images,1.0,0.75,0.5", ",images,classes,1.0,0.75,0.5")
WEIGHTED_WHOLE, WEIGHTED_PARTS = (tuple(f"{size},frozen,1{options}" for options in WEIGHTED) for size in (8, 1))
SPLITS = {
    1: ("8,frozen,2", "3,frozen,2", "8,sync,1", "8,frozen,1,1.0,0.75,0.5", *WEIGHTED_WHOLE),
    2: ("4,frozen,2", "2,frozen,2", "4,sync,1", "4,local,1"),
    3: ("2,frozen,2", "1,frozen,2", "3,sync,1", "1,frozen,1,1.0,0.75,0.5", *WEIGHTED_PARTS),
    4: ("1,frozen,2",),
}
"""Per number of ranks, 8 images a step: the most at once on a rank, batch norm, steps, input scales, weights."""
SHARES = {1: ("2",), 2: ("2,2", "3,1"), 3: ("2,0,3",), 4: ("1,2,1,3",)}
"""Per number of ranks: images of each rank."""

Done = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def done(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Function that gives the folder of what N ranks did, after checking that all have done a job."""
    started: dict[int, Path] = {}

    def folder_of(ranks: int, job: str) -> Path:
        if ranks not in started:
            folder = tmp_path_factory.mktemp(f"ranks_{ranks}")
            to_do = [["sync_batch_norm", *SHARES[ranks]]]
            if ranks == 2:
                to_do += [["compiled_batch_norm", "aot_eager"], ["nonfinite", str(folder)], ["speed"]]
            to_do += [["gradients", str(sample_shards / "train.json"), str(folder), *SPLITS[ranks]]]
            run_forked(jobs.main, [(folder, to_do)] * ranks, folder / "log")
            started[ranks] = folder
        folder = started[ranks]
        assert len(list(folder.glob(f"{job}.done_*"))) == ranks, (folder / "log").read_text()
        return folder

    return folder_of


@pytest.fixture(scope="module")
def trained(done: Done) -> Trained:
    """Function that gives the result of one of SPLITS."""
    return lambda ranks, split: torch.load(done(ranks, "gradients") / f"{split}.pt", weights_only=True)


@pytest.mark.parametrize("ranks", SHARES)
def test_sync_batch_norm_equals_batch_norm_on_the_whole_batch(done: Done, ranks: int) -> None:
    done(ranks, "sync_batch_norm")


def test_compiled_sync_batch_norm_is_one_graph_that_does_the_same(done: Done) -> None:
    done(2, "compiled_batch_norm")


def test_recomputation_and_compression_keep_gradients_and_statistics(done: Done) -> None:
    done(2, "speed")


def test_a_bad_sample_of_one_rank_skips_the_update_of_all_and_a_rank_that_differs_is_named(done: Done) -> None:
    folder = done(2, "nonfinite")
    assert sorted(path.name for path in (folder / "nonfinite").glob("*.pt")) == ["step_00000001_rank_1.pt"]
    saved = torch.load(folder / "nonfinite" / "step_00000001_rank_1.pt", weights_only=True)
    assert saved["keys"] == [["image_111_0", "image_111_1"]]
    for rank in (0, 1):
        warning = (folder / f"rank_{rank}.log").read_text()
        assert "step 1: loss nan" in warning
        assert "image_111_0 (rank 1), image_111_1 (rank 1); update skipped" in warning
        metrics = json.loads((folder / f"rank_{rank}.json").read_text())
        assert metrics["train/num_skipped"] == metrics["train/num_nonfinite"] == 1
        error = (folder / f"error_{rank}").read_text()
        assert "rank 1 of 2 holds other values than the rest in head.branches.2.bias at step 3" in error
    assert (folder / "error_0").read_text() == (folder / "error_1").read_text()


def test_every_split_of_a_batch_has_the_same_samples_gradient_and_weights(trained: Trained) -> None:
    """8 images on several numbers of ranks and micro-batch sizes; batch norm frozen.

    On three ranks the parts are 2 2 1 1 1 1 or, one by one, nine for eight images: one of them is empty.
    """
    expected = trained(1, "8,frozen,2")
    assert sorted(expected["seen"]) == list(range(16))
    for ranks, micro_size in ((1, 3), (2, 4), (2, 2), (4, 1), (3, 2), (3, 1)):
        got = trained(ranks, f"{micro_size},frozen,2")
        assert got["seen"] == expected["seen"], "other samples, or other pixels of them"
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert relative_error(got["grads"], expected["grads"]) < 1e-5
        assert relative_error(got["model"], expected["model"]) < 1e-4
        assert relative_error(got["moved"], expected["moved"]) < 1e-3


@pytest.mark.quick("P2")
def test_two_ranks_make_the_step_of_one_process(sample_shards: Path, tmp_path: Path) -> None:
    """Accumulated with frozen batch norm, and with statistics over both ranks."""
    manifest = sample_shards / "train.json"
    splits = {"2,frozen,1": "8,frozen,1", "4,sync,1": "8,sync,1"}
    job = ["gradients", str(manifest), str(tmp_path), *splits]
    assert run_forked(jobs.main, [(tmp_path, [job])] * 2, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    for split, alone in splits.items():
        gradients.train(DistEnv(), str(manifest), tmp_path / "alone.pt", *alone.split(","))
        expected, got = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", split))
        assert got["seen"] == expected["seen"]
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert relative_error(got["grads"], expected["grads"]) < 1e-5
        assert relative_error(got["moved"], expected["moved"]) < 1e-3, "but for what float32 rounds off a weight"
        assert relative_error(got["model"], expected["model"]) < 1e-6


def test_sync_batch_norm_makes_ranks_equal_one_process(trained: Trained) -> None:
    """With trained batch norm and no accumulation, gradients and running statistics are those of one large batch.

    Three ranks take 3, 3 and 2 images.
    """
    expected = trained(1, "8,sync,1")
    for ranks, split in ((2, "4,sync,1"), (3, "3,sync,1")):
        got = trained(ranks, split)
        assert relative_error(got["grads"], expected["grads"]) < 1e-4
        assert relative_error(got["model"], expected["model"]) < 1e-5


def test_local_batch_norm_does_not(trained: Trained) -> None:
    """The test above can fail: statistics per rank give another gradient."""
    assert relative_error(trained(2, "4,local,1")["grads"], trained(1, "8,sync,1")["grads"]) > 1e-2


def test_four_multi_scale_losses_do_not_depend_on_the_split(trained: Trained) -> None:
    expected = trained(1, "8,frozen,1,1.0,0.75,0.5")
    assert list(expected["losses"]) == ["fused", "scale_1", "scale_0.75", "scale_0.5"]
    got = trained(3, "1,frozen,1,1.0,0.75,0.5")
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert relative_error(got["grads"], expected["grads"]) < 1e-5


@pytest.mark.parametrize("options", WEIGHTED)
def test_class_weights_and_images_means_do_not_depend_on_the_split(trained: Trained, options: str) -> None:
    """Three ranks take eight images one by one, so that one part of nine is empty."""
    expected, got = trained(1, f"8,frozen,1{options}"), trained(3, f"1,frozen,1{options}")
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert relative_error(got["grads"], expected["grads"]) < 1e-5
    plain = trained(1, "8,frozen,1,1.0,0.75,0.5") if "0.75" in options else trained(1, "8,frozen,2")
    assert relative_error(expected["grads"], plain["grads"]) > 1e-2, "the weights change nothing"


def test_evaluation_is_the_same_on_any_number_of_ranks(sample_shards: Path, tmp_path: Path) -> None:
    """7 images in this process and on 3 ranks, that take 3, 2 and 2: each once, so the scores are identical."""
    checkpoint = write_checkpoint(tmp_path / "best.pt", checkpoint_of(discerning_network(21)))
    reports = [tmp_path / "1.json", tmp_path / "3.json"]
    arguments = [str(checkpoint), "--data", f"{sample_shards}/val.json", "--out", f"{tmp_path}/report", "--no-mlflow"]
    assert evaluate.main([*arguments, "--json", str(reports[0])]) == 0
    on_three = ([*arguments, "--json", str(reports[1])],)
    assert run_forked(evaluate.main, [on_three] * 3, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    alone, together = (json.loads(report.read_text()) for report in reports)
    assert alone["num_images"] == 7
    assert together == alone
