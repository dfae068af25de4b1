"""Fully connected CRF (Kraehenbuehl and Koltun 2011) over a network's probabilities, in processes beside the device.

Needs the extra `crf`: pydensecrf2, which is imported as `pydensecrf`. Worker processes import this module and little
else, so it does without torch.
"""

import contextlib
import importlib.util
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context
from types import TracebackType
from typing import TypeVar

import numpy as np

from dist_deeplab.config import CrfConfig
from dist_deeplab.errors import TrainingError, UserError
from dist_deeplab.workers import end_with_parent, num_cores

T = TypeVar("T")

_INSTALL = "pip install -e '.[crf]' -c constraints.txt"
if sys.version_info >= (3, 13):  # the Cython that pydensecrf2 1.1 asks for makes code for older Pythons only
    _INSTALL = "pip install 'cython>=3' setuptools wheel && pip install --no-build-isolation pydensecrf2"

_QUEUED_PER_PROCESS = 2  # one being refined and one waiting: some 16 MB each for a VOC image


def require_crf(enabled: bool = True) -> None:
    """Check that the CRF's library is there, where it is wanted.

    Raises:
        UserError: it is not; the message names the extra.
    """
    if enabled and importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            f"eval.crf needs pydensecrf2, which is not installed; {_INSTALL} (it is compiled on the spot: a C++ "
            "compiler must be there), or leave eval.crf=false"
        )


def dense_crf(
    image: np.ndarray,
    prob: np.ndarray,
    *,
    iterations: int,
    pos_w: float,
    pos_xy_std: float,
    bi_w: float,
    bi_xy_std: float,
    bi_rgb_std: float,
) -> np.ndarray:
    """Refined probabilities, float32 [C, H, W].

    Unary energy -log(prob); pairwise Potts energies with weight pos_w for a Gaussian of the distance (standard
    deviation pos_xy_std pixels) and bi_w for one of distance and colour (bi_xy_std pixels, bi_rgb_std of 0..255);
    `iterations` of mean field (DeepLab-v2, section 3.3). A kernel of weight 0 is left out.

    Args:
        image: the original image, uint8 [H, W, 3] RGB, nothing subtracted.
        prob: softmax of the network's logits at the image's size, float32 [C, H, W].
    """
    from pydensecrf import densecrf, utils

    num_classes, height, width = prob.shape
    field = densecrf.DenseCRF2D(width, height, num_classes)
    field.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(prob)))
    if pos_w:
        field.addPairwiseGaussian(sxy=pos_xy_std, compat=pos_w)
    if bi_w:
        field.addPairwiseBilateral(
            sxy=bi_xy_std, srgb=bi_rgb_std, rgbim=np.require(image, requirements=["C", "W"]), compat=bi_w
        )
    return np.array(field.inference(iterations), dtype=np.float32).reshape(prob.shape)


class CrfPool:
    """Processes that refine images while the caller continues; a context manager.

    parameters: those of `dense_crf`. num_processes: how many; a core each.
    """

    def __init__(self, parameters: Mapping[str, float], num_processes: int) -> None:
        require_crf()
        self.parameters = dict(parameters)
        self.num_processes = num_processes
        # Not forked: the caller has threads, and a device's context that a child must not touch.
        context = get_context("spawn")
        self.executor = ProcessPoolExecutor(num_processes, context, initializer=_start_worker)

    def __enter__(self) -> "CrfPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.executor.shutdown(cancel_futures=True)

    def refine(self, items: Iterable[tuple[T, np.ndarray, np.ndarray]]) -> Iterator[tuple[T, np.ndarray]]:
        """Yield (name, refined probabilities float32 [C, H, W]) for each (name, image, prob), in the same order."""
        return self._map(_refine, ((*item, self.parameters) for item in items))

    def predict(self, items: Iterable[tuple[T, np.ndarray, np.ndarray]]) -> Iterator[tuple[T, np.ndarray]]:
        """Yield (name, classes uint8 [H, W]) for each (name, image, prob), in the same order."""
        return self._map(_predict, ((*item, self.parameters) for item in items))

    def search(
        self, items: Iterable[tuple[T, np.ndarray, np.ndarray, dict[str, float]]]
    ) -> Iterator[tuple[T, np.ndarray]]:
        """Yield (name, classes uint8 [H, W]) for each (name, image, prob, parameters), in the same order."""
        return self._map(_predict, items)

    def _map(
        self,
        function: Callable[[np.ndarray, np.ndarray, dict[str, float]], np.ndarray],
        items: Iterable[tuple[T, np.ndarray, np.ndarray, dict[str, float]]],
    ) -> Iterator[tuple[T, np.ndarray]]:
        """Hand items out, at most two per process ahead of the oldest result: memory stays bounded.

        Raises:
            TrainingError: a process was killed.
        """
        waiting: deque[tuple[T, Future[np.ndarray]]] = deque()
        try:
            for name, image, prob, parameters in items:
                waiting.append((name, self.executor.submit(function, image, prob, parameters)))
                while waiting and (waiting[0][1].done() or len(waiting) >= _QUEUED_PER_PROCESS * self.num_processes):
                    oldest, future = waiting.popleft()
                    yield oldest, future.result()
            for oldest, future in waiting:
                yield oldest, future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a process of the dense CRF was killed, perhaps for lack of memory; try a smaller crf.num_workers"
            ) from None


def open_crf(enabled: bool, config: CrfConfig, *, ranks_on_host: int) -> AbstractContextManager[CrfPool | None]:
    """The processes of `eval.crf`, by default as many as this rank's share of the cores, or None inside.

    Raises:
        UserError: enabled, but pydensecrf is not installed.
    """
    if not enabled:
        return contextlib.nullcontext()
    cores = max(1, num_cores() // ranks_on_host)
    return CrfPool(config.model_dump(exclude={"num_workers"}), config.num_workers or cores)


def _refine(image: np.ndarray, prob: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    return dense_crf(image, prob, **parameters)  # type: ignore[arg-type]


def _predict(image: np.ndarray, prob: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    return dense_crf(image, prob, **parameters).argmax(0).astype(np.uint8)  # type: ignore[arg-type]


def _start_worker() -> None:
    """Ignore the signals that ask the rank to stop, which ends its workers itself; end with the rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
