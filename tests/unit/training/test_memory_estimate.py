"""A step's memory is counted as torch keeps it, and as a real step is seen to take it."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_deeplab.config import OptimConfig, RunConfig, load_config
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.resnet import Bottleneck
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.memory_estimate import estimate_memory, gib, images_that_fit
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep

SMALL = ("model.backbone=resnet_tiny", "data.crop_size=65", "data.num_classes=5")


def _config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def _kept_by_a_real_forward_pass(module: nn.Module, x: torch.Tensor) -> int:
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.state_dict().values()}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("norm", ["local", "frozen"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_activations_are_what_torch_keeps_for_the_backward_pass(precision: str, dtype: torch.dtype, norm: str) -> None:
    counted = estimate_memory(_config(f"precision.dtype={precision}", f"model.batch_norm={norm}"), SCRATCH)
    assert list(counted.images) == ["scale_1"]
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory(norm)).to(dtype)
    one, three = (_kept_by_a_real_forward_pass(net, torch.randn(count, 3, 65, 65, dtype=dtype)) for count in (1, 3))
    assert counted.image_bytes == pytest.approx((three - one) / 2, rel=0.02)
    if precision == "fp32" or norm == "frozen":  # else autocast makes copies, which the weights' cast stands for here
        assert counted.fixed["copies of weights"] == pytest.approx(one - counted.image_bytes, rel=0.02)


def test_recomputing_keeps_the_inputs_of_the_bottlenecks_and_once_all_of_the_largest() -> None:
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("local"), recompute=True).train()
    inputs: list[tuple[nn.Module, torch.Tensor]] = []
    for block in (module for module in net.modules() if isinstance(module, Bottleneck)):
        block.register_forward_pre_hook(lambda block, arguments: inputs.append((block, arguments[0])))

    def kept(count: int) -> int:
        inputs.clear()
        whole = _kept_by_a_real_forward_pass(net, torch.randn(count, 3, 65, 65))
        seen = [(block, x.detach().requires_grad_()) for block, x in inputs]
        return whole + max(_kept_by_a_real_forward_pass(block, x) - x.nbytes for block, x in seen)

    counted = estimate_memory(
        _config("speed.recompute=true", "precision.dtype=fp32", "model.batch_norm=local"), SCRATCH
    )
    one, three = kept(1), kept(3)
    assert counted.image_bytes == (three - one) / 2
    assert counted.fixed["copies of weights"] == one - counted.image_bytes


def test_frozen_batch_norm_keeps_no_activations_of_its_own() -> None:
    frozen, local = (
        estimate_memory(load_config(None, [f"model.batch_norm={norm}"]), SCRATCH) for norm in ("frozen", "local")
    )
    assert frozen.image_bytes < 0.65 * local.image_bytes
    assert frozen.fixed["copies of weights"] == pytest.approx(frozen.fixed["weights"], rel=0.02)


def test_each_scale_has_its_own_and_recomputing_or_training_the_head_alone_takes_less() -> None:
    whole = estimate_memory(_config("multi_scale.scales=[1.0,0.5]"), SCRATCH).images
    assert list(whole) == ["scale_1", "scale_0.5"]
    assert whole["scale_0.5"] == pytest.approx(whole["scale_1"] * (33 / 65) ** 2, rel=0.25)
    assert (
        estimate_memory(_config("speed.recompute=true"), SCRATCH).images["scale_1"] < 0.9 * whole["scale_1"]
    )  # 4 blocks
    assert estimate_memory(_config("model.train_only=head"), SCRATCH).images["scale_1"] < 0.1 * whole["scale_1"]


def test_counting_computes_nothing_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    count = estimate_memory(load_config(None), SCRATCH).images["scale_1"]  # ResNet-101
    assert 0.5e9 < count < 1e9
    assert estimate_memory(load_config(None, ["speed.recompute=true"]), SCRATCH).images["scale_1"] < 0.45 * count
    assert torch.equal(torch.get_rng_state(), state)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that torch's operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage))

    def forget(self, storage: int) -> None:
        self.live -= self.sizes.pop(storage)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result


def _measured(config: RunConfig, micro_size: int) -> tuple[int, int]:
    """The bytes there are after a real step, and the most there were in the next one."""
    crop, device = config.data.crop_size, torch.device("cpu")
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("local"), recompute=config.speed.recompute)
    model = prepare_model(MultiScale(net), DistEnv()).train()
    optimizer = build_optimizer(net, OptimConfig())
    step = TrainStep(model, optimizer, Precision(config.precision.dtype, device), CAFFE, CrossEntropy(255))
    image = torch.zeros(micro_size, 3, crop, crop, dtype=torch.uint8)
    label = torch.zeros(micro_size, crop, crop, dtype=torch.uint8)
    batch = Batch(image, label, torch.full((micro_size, 2), crop), ["key"] * micro_size)
    step([batch])
    count = LiveBytes()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    for tensor in (*net.state_dict().values(), *momentum, *(p.grad for p in net.parameters() if p.grad is not None)):
        count.see(tensor)
    before = count.live
    with count:
        step([batch])
    return before, count.peak


def test_the_fixed_part_is_what_a_real_step_leaves_behind() -> None:
    fixed = estimate_memory(_config(), SCRATCH).fixed
    fixed["statistics"] //= 2  # their copy and those of weights are of a step's own
    assert sum(fixed.values()) - fixed["copies of weights"] == _measured(_config(), 1)[0]


@pytest.mark.parametrize("overrides", [(), ("precision.dtype=bf16",), ("speed.recompute=true",)], ids=str)
def test_a_real_steps_peak_is_the_count_and_a_third_at_most_for_a_moment(overrides: tuple[str, ...]) -> None:
    config = _config(*overrides)
    count = estimate_memory(config, SCRATCH)
    few, many = 6, 10
    each = (_measured(config, many)[1] - _measured(config, few)[1]) / (many - few)
    assert 1.0 <= each / count.image_bytes < 1.33
    assert 0.9 <= _measured(config, many)[1] / (count.fixed_bytes + many * count.image_bytes) < 1.33


def test_what_is_not_trained_has_no_gradient_and_no_momentum() -> None:
    whole, head = (estimate_memory(_config(f"model.train_only={which}"), SCRATCH).fixed for which in ("all", "head"))
    assert head["weights"] == whole["weights"] == whole["gradients"] == whole["momentum"]
    assert head["gradients"] == head["momentum"] < 0.5 * head["weights"]
    assert estimate_memory(_config("optim.momentum=0"), SCRATCH).fixed["momentum"] == 0


def test_the_sentence_names_each_scale_and_the_sum() -> None:
    count = estimate_memory(_config("multi_scale.scales=[1.0,0.5]"), SCRATCH)
    text = count.describe(4, 65)
    shown = [gib(number) for number in (*count.images.values(), count.fixed_bytes + 4 * count.image_bytes)]
    assert f"(scale_1 {shown[0]}, scale_0.5 {shown[1]}); with micro-batches of 4 images {shown[2]} GiB" in text


def test_as_many_images_fit_as_leave_room_for_the_fixed_part() -> None:
    assert [images_that_fit(memory, 100, 7) for memory in (50, 100, 106, 107, 120, 121)] == [0, 0, 0, 1, 2, 3]


def test_a_number_of_gib_has_no_exponent() -> None:
    assert [gib(2**30), gib(2**21), gib(45_000), gib(0)] == ["1", "0.00195", "<0.001", "0"]
