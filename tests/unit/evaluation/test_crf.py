"""The CRF is pydensecrf's own, whatever process it runs in."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from dist_deeplab.config import CrfConfig
from dist_deeplab.errors import TrainingError, UserError
from dist_deeplab.evaluation.crf import CrfPool, dense_crf, open_crf, require_crf

PARAMETERS = CrfConfig().model_dump(exclude={"num_workers"})
needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 (the extra crf) is not installed"
)


def _case(seed: int, height: int = 20, width: int = 31, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    logits = 3 * rng.standard_normal((classes, height, width)).astype(np.float32)
    prob = np.exp(logits) / np.exp(logits).sum(0)
    return image, prob.astype(np.float32)


def _direct(image: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """The paper's CRF, written out."""
    from pydensecrf.densecrf import DenseCRF

    classes, height, width = prob.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    field = DenseCRF(height * width, classes)
    field.setUnaryEnergy(-np.log(np.maximum(prob, 1e-5)).reshape(classes, -1).astype(np.float32))
    place = np.stack([columns.ravel(), rows.ravel()])
    colour = image.reshape(-1, 3).T.astype(np.float32)
    field.addPairwiseEnergy(np.ascontiguousarray(place / 1, dtype=np.float32), compat=3)
    features = np.concatenate([place / 67, colour / 3])
    field.addPairwiseEnergy(np.ascontiguousarray(features, dtype=np.float32), compat=4)
    return np.array(field.inference(10)).reshape(prob.shape)


@needs_pydensecrf
def test_the_defaults_are_the_papers_and_the_result_pydensecrfs() -> None:
    image, prob = _case(0)
    refined = dense_crf(image, prob, **PARAMETERS)
    assert refined.dtype == np.float32
    assert refined.shape == prob.shape
    np.testing.assert_allclose(refined, _direct(image, prob), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(refined.sum(0), 1, rtol=1e-5)
    assert (refined.argmax(0) != prob.argmax(0)).any()


@needs_pydensecrf
def test_without_pairwise_weights_nothing_changes() -> None:
    image, prob = _case(1)
    refined = dense_crf(image, prob, **PARAMETERS | {"pos_w": 0.0, "bi_w": 0.0})
    np.testing.assert_array_equal(refined.argmax(0), prob.argmax(0))


@pytest.fixture(scope="module")
def pool() -> Iterator[CrfPool]:
    with CrfPool(PARAMETERS, 2) as pool:
        yield pool


@needs_pydensecrf
def test_the_pool_keeps_the_order_and_changes_no_bit(pool: CrfPool) -> None:
    cases = [(seed, *_case(seed, 10 + 7 * (seed % 3))) for seed in range(9)]
    results = list(pool.refine(iter(cases)))
    assert [name for name, _ in results] == list(range(9))
    for (_, refined), (_, image, prob) in zip(results, cases):
        np.testing.assert_array_equal(refined, dense_crf(image, prob, **PARAMETERS))
    for (_, pred), (_, refined) in zip(pool.predict(iter(cases)), results):
        assert pred.dtype == np.uint8
        np.testing.assert_array_equal(pred, refined.argmax(0))


@needs_pydensecrf
def test_the_pool_takes_only_a_few_images_ahead(pool: CrfPool) -> None:
    taken = 0

    def cases() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        nonlocal taken
        for seed in range(20):
            taken += 1
            yield (seed, *_case(seed))

    for number, _ in enumerate(pool.predict(cases())):
        assert taken <= number + 1 + 2 * 2


@needs_pydensecrf
def test_a_killed_process_is_an_error_in_one_sentence() -> None:
    with CrfPool(PARAMETERS, 1) as pool:
        process = pool.executor.submit(os.getpid).result()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"killed.*crf\.num_workers"):
            list(pool.predict([(0, *_case(0))]))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    remedy = "--no-build-isolation pydensecrf2" if sys.version_info >= (3, 13) else r"pip install -e '\.\[crf\]'"
    with pytest.raises(UserError, match=remedy):
        require_crf()
    require_crf(False)
    with open_crf(False, CrfConfig(), ranks_on_host=1) as nothing:
        assert nothing is None
