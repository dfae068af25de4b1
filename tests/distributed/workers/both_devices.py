"""On each rank: the process group reduces tensors of the CPU and of the rank's device; DDP, batch norm's own group and
a snapshot work on that device; sums travel without the host waiting. Exits non-zero with the assertion that fails."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_deeplab.checkpointing.snapshot import Snapshot
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.distributed.parallel import prepare_model, separate_group
from dist_deeplab.distributed.process_group import (
    DistEnv,
    all_reduce_sum,
    broadcast_from_main,
    gather_bytes,
    gather_to_all,
    process_group,
)
from dist_deeplab.distributed.rank_sums import RankSums
from dist_deeplab.distributed.replicas import check_replicas
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.sync_batch_norm import use_group


def check_collectives(env: DistEnv) -> None:
    ranks = sum(range(env.world_size))
    for device in (torch.device("cpu"), env.device):
        assert all_reduce_sum(torch.full((3,), float(env.rank), device=device)).tolist() == [ranks] * 3
    assert broadcast_from_main({"rank": env.rank}) == {"rank": 0}
    assert gather_to_all([env.rank, "x"]) == [[rank, "x"] for rank in range(env.world_size)]
    assert gather_bytes(bytes(env.rank)) == [bytes(rank) for rank in range(env.world_size)]


def check_sums_on_their_way(env: DistEnv) -> None:
    """Two at a time. A rank starts half a second after the one before, which waits for none and knows it afterwards."""
    rank_sums, store = RankSums(env.device), dist.distributed_c10d._get_default_store()
    rank_sums.start([0]).read()  # connected
    if env.rank:
        store.wait(
            [f"started by {env.rank - 1}"], timedelta(seconds=120)
        )  # never there, if starting waited for this rank
        time.sleep(0.5)
    first, second = rank_sums.start([env.rank, 1, 0.5]), rank_sums.start([2.0**40 + env.rank])
    store.set(f"started by {env.rank}", "")
    assert first.read() == [sum(range(env.world_size)), env.world_size, 0.5 * env.world_size]
    assert second.on_device().device == env.device
    assert second.on_device().tolist() == [env.world_size * 2.0**40 + sum(range(env.world_size))]
    waits = gather_to_all(first.wait_s())
    assert waits == sorted(waits, reverse=True), waits
    assert min(waits[:-1]) > 0.4, waits


def check_step(env: DistEnv) -> None:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"))
    group = separate_group(env.device)
    use_group(net, group)
    model = prepare_model(MultiScale(net), env).train()
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(env.rank)).to(env.device)
    for _ in range(2):
        model(image)["scale_1"].square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 1e-4 * parameter.grad
                parameter.grad = None
    assert group is not dist.group.WORLD
    check_replicas(net)
    copy = Snapshot().take(net.state_dict())
    sums = [float(tensor.double().sum()) for tensor in copy.values()]
    assert gather_to_all(sums) == [sums] * env.world_size


env = DistEnv.from_environ()
with process_group(env):
    check_collectives(env)
    check_sums_on_their_way(env)
    check_step(env)
hard_exit(0)
