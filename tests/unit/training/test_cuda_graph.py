"""CUDA graphs without a GPU: torch's own `make_graphed_callables` records into a graph that a CPU can replay.

`CpuGraph` keeps what a CUDA graph keeps: operations on fixed memory. Replayed, it reads and writes the very tensors
that were there when it was captured, also those that something else has taken for its own meanwhile.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_deeplab.config import RunConfig, load_config
from dist_deeplab.data.loader import Batch
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError, UserError
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.training.cuda_graph import graph_network, is_graphed, require_cuda_graph
from dist_deeplab.training.step import TrainStep

MakeNet = Callable[..., DeepLabV2]
MakeBatch = Callable[..., Batch]
MakeStep = Callable[..., TrainStep]


class CpuGraph:
    """Operations, and the memory that they write their results to."""

    replays = True

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for operation, arguments, options, results in self.recorded if self.replays else ():
                for kept, new in zip(tree_leaves(results), tree_leaves(operation(*arguments, **options)), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


class Capture(TorchDispatchMode):
    """Stands for `torch.cuda.graph`, to which torch 2.14 says more than 2.13."""

    def __init__(self, graph: CpuGraph, pool: object = None, **options: object) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.graph.recorded.append((func, args, kwargs or {}, results))
        return results


class Anything:
    """Stands for streams and what selects them."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CpuGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", Anything)
    monkeypatch.setattr(torch.cuda, "stream", Anything)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)


def images(size: int = 2) -> torch.Tensor:
    return torch.randn(size, 3, 33, 33, generator=torch.Generator().manual_seed(0))


def graphed(make_step: MakeStep, net: DeepLabV2, **options: Any) -> TrainStep:
    """A step whose network replays graphs."""
    plain = make_step(net, **options)
    graph_network(plain.model, images(), "fp32")
    return TrainStep(plain.model, plain.optimizer, plain.precision, plain.preprocessing, plain.inputs.loss)


@pytest.mark.parametrize("batch_norm", ["frozen", "local"])
@pytest.mark.parametrize("scales", [(), (1.0, 0.5)])
def test_steps_of_several_micro_batches_are_those_of_the_plain_network(
    make_net: MakeNet, make_step: MakeStep, make_batch: MakeBatch, batch_norm: str, scales: tuple[float, ...]
) -> None:
    plain_net, net = make_net(batch_norm), make_net(batch_norm)
    plain, step = make_step(plain_net, scales=scales), graphed(make_step, net, scales=scales)
    for seed in range(3):
        batches = [make_batch([0.0, 0.5], seed=3 * seed), make_batch([0.9, 1.0], seed=3 * seed + 1)]
        expected, result = plain(batches), step(batches)
        assert {name: float(loss) for name, loss in result.losses.items()} == pytest.approx(
            {name: float(loss) for name, loss in expected.losses.items()}, rel=1e-6
        )
        assert float(result.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    for (name, wanted), (_, got) in zip(plain_net.state_dict().items(), net.state_dict().items(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_capturing_leaves_weights_and_statistics_as_they_were(make_net: MakeNet) -> None:
    net, untouched = make_net("local"), make_net("local")
    network = MultiScale(net)
    graph_network(network, images(), "fp32")
    assert is_graphed(network)
    for (name, wanted), (_, got) in zip(untouched.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(got, wanted), name
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_a_graph_that_gives_something_else_is_refused_before_the_first_step(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuGraph, "replays", False)  # as if kernels had been launched outside of the captured stream
    with pytest.raises(TrainingError, match=r"speed.cuda_graph=true changes .*relative error.*speed.cuda_graph=false"):
        graph_network(MultiScale(make_net("frozen")), images(), "fp32")


def test_scored_in_between_the_network_runs_without_the_graph(make_net: MakeNet, make_step: MakeStep) -> None:
    net = make_net("frozen")
    step = graphed(make_step, net)
    net.eval()
    with torch.inference_mode():
        assert net(images(1)[:, :, :25, :25]).shape == (1, 5, 4, 4)
    net.train()
    assert is_graphed(step.model)


GPU = DistEnv(0, 0, 1)


def _config(*overrides: str) -> RunConfig:
    return load_config(None, ["speed.cuda_graph=true", "batch.global_size=8", "batch.micro_size=4", *overrides])


@pytest.mark.parametrize(
    ("overrides", "ranks", "sentence"),
    [
        (["speed.compile=true"], 1, "speed.compile=true"),
        (["speed.recompute=true"], 1, "speed.recompute=true"),
        (["batch.micro_size=3"], 1, "micro-batches of one size"),
        (["model.batch_norm=sync"], 2, "set model.batch_norm=frozen"),
    ],
)
def test_a_setting_that_no_graph_can_be_captured_with_is_named(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], ranks: int, sentence: str
) -> None:
    monkeypatch.setattr(DistEnv, "device", torch.device("cuda", 0))
    config = _config(*overrides)
    size = config.batch.micro_size
    assert isinstance(size, int)
    split = BatchSplit(config.batch.global_size, size, ranks)
    with pytest.raises(UserError, match=f"^speed.cuda_graph=true .*{sentence}.*or set speed.cuda_graph=false$"):
        require_cuda_graph(config, DistEnv(0, 0, ranks), split)


def test_what_a_graph_can_be_captured_with_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistEnv, "device", torch.device("cuda", 0))
    require_cuda_graph(_config("model.batch_norm=frozen"), DistEnv(0, 0, 2), BatchSplit(8, 4, 2))


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistEnv, "device", torch.device("cpu"))
    with pytest.raises(UserError, match="needs a GPU"):
        require_cuda_graph(_config(), GPU, BatchSplit(8, 4, 1))
