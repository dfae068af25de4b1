"""The simulated timeline, costs of collectives and stragglers, by hand on small cases."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from benchmarks.gloo_parts import ComputeRun, common_events, cores_received
from benchmarks.network import Collective, Measured, Nccl
from benchmarks.stragglers import NO_STRAGGLERS, Stragglers
from benchmarks.timeline import BUCKET, FIRST_BUCKET, Event, Machine, SmallSums, _Timeline, bucketed, simulate

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.errors import UserError


@dataclass(frozen=True)
class Links:
    """Collectives of `latency_s` and a second per byte; a gather takes twice the latency."""

    latency_s: float = 1.0
    demand: float = 0.0

    def all_reduce(self, num_bytes: int, ranks: int) -> Collective:
        return Collective(self.latency_s, float(num_bytes), self.demand)

    def all_gather(self, num_bytes: int, ranks: int) -> Collective:
        return Collective(2 * self.latency_s, float(num_bytes), self.demand)


TWO = Machine(2, Links())


def test_a_bucket_travels_while_backward_continues_and_only_the_rest_is_waited_for() -> None:
    step = simulate([Event("bucket", 10, 4), Event("wait", 3), Event("end", 2)], TWO)
    assert step.compute_s == 15
    assert step.gradients_s == pytest.approx(1 + 4 - 3)
    assert step.seconds == pytest.approx(17)


def test_buckets_travel_one_after_the_other() -> None:
    step = simulate([Event("bucket", 10, 4), Event("bucket", 1, 4), Event("wait", 0)], TWO)
    assert step.gradients_s == pytest.approx(5 + 5 - 1)


def test_batch_norm_is_waited_for_in_forward_and_in_backward() -> None:
    step = simulate([Event("gather", 10, 3), Event("sum", 20, 3), Event("end", 30)], TWO)
    assert step.batch_norm_s == pytest.approx((2 + 3) + (1 + 3))
    assert step.seconds == pytest.approx(60 + 9)


def test_late_weight_gradients_are_computed_while_the_next_sum_travels() -> None:
    events = [Event("sum", 10, 3, weight_gradients_s=2), Event("sum", 10, 3, weight_gradients_s=9), Event("end", 5)]
    step = simulate(events, replace(TWO, late_weight_gradients=True))
    assert step.compute_s == 25
    assert step.batch_norm_s == pytest.approx((1 + 3 - 2) + 0)
    assert simulate(events, TWO).batch_norm_s == pytest.approx(2 * (1 + 3))


def test_a_single_rank_communicates_nothing() -> None:
    events = [Event("gather", 10, 3), Event("bucket", 20, 3), Event("wait", 0), Event("end", 30)]
    assert simulate(events, replace(TWO, ranks=1, sums=SmallSums(Collective(9.0), ahead=False))).seconds == 60


def test_transfers_of_two_groups_share_the_links_and_latencies_do_not() -> None:
    # The bucket's bytes take 1..11 alone. The sum starts at 2, travels from 3 on, and has 4 bytes at half the speed.
    step = simulate([Event("bucket", 0, 10), Event("sum", 2, 4), Event("wait", 0)], TWO)
    assert step.batch_norm_s == pytest.approx(1 + 2 * 4)
    assert step.gradients_s == pytest.approx((1 + 10 + 4) - (2 + 9))  # all bytes are through at 15


def test_without_a_group_of_its_own_batch_norm_queues_up_behind_a_bucket() -> None:
    events = [Event("bucket", 0, 10), Event("sum", 0, 4), Event("wait", 0)]
    step = simulate(events, replace(TWO, own_group=False))
    assert step.batch_norm_s == pytest.approx(1 + 10 + 1 + 4)
    assert step.gradients_s == 0


def test_a_host_that_launches_slower_than_the_device_computes_is_the_bound() -> None:
    events = [Event("bucket", 1.0, 0, 10), Event("wait", 1.0, 0, 10), Event("end", 0.5, 0, 10)]
    step = simulate(events, replace(TWO, ranks=1, launch_s=0.2))
    assert step.seconds == pytest.approx(30 * 0.2)
    assert step.host_s == pytest.approx(6.0 - 2.5)


def test_a_host_that_launches_faster_than_the_device_computes_costs_nothing() -> None:
    events = [Event("bucket", 1.0, 0, 10), Event("end", 1.5, 0, 10)]
    assert simulate(events, replace(TWO, ranks=1, launch_s=0.1)).seconds == pytest.approx(2.5)


def test_waits_of_the_device_hide_launches() -> None:
    """While the device waits for a collective, the host launches what follows."""
    events = [Event("sum", 1.0, 4, 10), Event("end", 1.0, 0, 50)]
    step = simulate(events, replace(TWO, launch_s=0.1))
    assert (step.batch_norm_s, step.host_s) == (pytest.approx(5.0), pytest.approx(0.0))
    assert step.seconds == pytest.approx(7.0)


def test_all_wait_for_the_slowest_rank() -> None:
    step = simulate([Event("sum", 10, 0), Event("end", 10)], replace(TWO, slowest=1.1))
    assert step.straggling_s == pytest.approx(2)
    assert step.seconds == pytest.approx(22 + 1)


def test_compute_and_communication_share_a_gpu() -> None:
    # A quarter of the GPU for a bucket of 5 s: both advance at 1 / 1.25 while it lasts, 6.25 s.
    step = simulate([Event("bucket", 0, 4), Event("wait", 20)], Machine(2, Links(demand=0.25)))
    assert step.sharing_s == pytest.approx(1.25)
    assert step.gradients_s == 0


def test_ranks_share_cores_with_each_other_and_with_the_communication() -> None:
    four = Machine(4, Links(demand=2.0), capacity=2.0, compute_demand=4.0, host_computes=True)
    step = simulate([Event("sum", 3, 0), Event("end", 3)], four)
    assert step.sharing_s == pytest.approx(6)  # half the speed; the sum has both cores for itself
    assert step.batch_norm_s == pytest.approx(1)
    # Under a bucket of 1 + 4 s the demand is 6 of 2 cores: it lasts 15 s, in which 5 of 8 s are computed.
    step = simulate([Event("bucket", 0, 4), Event("wait", 8)], four)
    assert step.seconds == pytest.approx(15 + 2 * 3)


def test_small_sums_ahead_cost_nothing_and_waited_for_they_delay_the_host() -> None:
    events = [Event("wait", 5, 0, 10), Event("end", 5, 0, 10)]
    fast_host = replace(TWO, launch_s=0.1)
    assert simulate(events, replace(fast_host, sums=SmallSums(Collective(6.0)))).seconds == pytest.approx(10)
    waited = replace(fast_host, sums=SmallSums(Collective(6.0), ahead=False))
    assert simulate(events, waited).seconds == pytest.approx(10)  # 6 s + 2 s of launches: still under 10 s of compute
    waited = replace(fast_host, sums=SmallSums(Collective(9.0), ahead=False))
    assert simulate(events, waited).host_s == pytest.approx(1)  # the host needs 11 s per step
    on_cpu = replace(TWO, host_computes=True, sums=SmallSums(Collective(6.0), ahead=False))
    assert simulate(events, on_cpu).seconds == pytest.approx(16)  # a CPU can't run ahead


def test_small_sums_that_take_longer_than_a_step_hold_up_the_next_one() -> None:
    step = simulate([Event("end", 5)], replace(TWO, sums=SmallSums(Collective(7.0))))
    assert step.seconds == pytest.approx(7)


def test_parts_of_a_step_add_up_to_the_time_that_passes() -> None:
    events = [
        Event("gather", 1, 2, 3),
        Event("bucket", 1, 5, 9),
        Event("sum", 2, 1, 9),
        Event("wait", 1),
        Event("end", 1),
    ]
    sums = SmallSums(Collective(1.0, 1.0, 0.3))
    timeline = _Timeline(Machine(2, Links(demand=0.3), launch_s=0.15, slowest=1.05, sums=sums))
    for _ in range(3):
        began = timeline.now
        step = timeline.step(events)
        assert step.seconds == pytest.approx(timeline.now - began)
        assert step.straggling_s == pytest.approx(0.05 * 6)


def test_a_bucket_starts_after_the_last_launch_before_it() -> None:
    # The host needs 5 s for the first event and 5 s for the second. The bucket travels from 5 to 13.
    events = [Event("bucket", 1, 7, 50), Event("wait", 4.8, 0, 50)]
    step = simulate(events, replace(TWO, launch_s=0.1))
    assert step.gradients_s == pytest.approx(3)
    assert step.host_s == pytest.approx(10 - 5.8 - 3)
    assert step.seconds == pytest.approx(10)


def test_gradients_are_collected_into_buckets_a_small_one_first() -> None:
    gradients = [Event("gradient", 1, FIRST_BUCKET, 2)] * (1 + BUCKET // FIRST_BUCKET + 1)
    events = list(bucketed([Event("sum", 5, 8, 1), *gradients, Event("wait", 3, 0, 1), Event("end", 4, 0, 1)]))
    assert [event.kind for event in events] == ["sum", "bucket", "bucket", "bucket", "wait", "end"]
    assert [event.num_bytes for event in events] == [8, FIRST_BUCKET, BUCKET, FIRST_BUCKET, 0, 0]
    assert [event.compute_s for event in events] == [5, 1, 25, 1 + 3, 0, 4]
    assert sum(event.launches for event in events) == 1 + 2 * len(gradients) + 2


def test_a_batch_norm_between_two_gradients_of_one_bucket_keeps_its_place() -> None:
    events = list(bucketed([Event("gradient", 1, 10), Event("sum", 2, 8), Event("gradient", 4, 10), Event("wait", 0)]))
    assert [(event.kind, event.compute_s, event.num_bytes) for event in events] == [
        ("sum", 3, 8),
        ("bucket", 4, 20),
        ("wait", 0, 0),
    ]


def test_nccl_inside_a_node_by_hand() -> None:
    small = Nccl(50e9).all_reduce(0, 8)
    assert small.seconds == pytest.approx(6.6e-6 + 14 * 0.6e-6)  # a ring of 14 hops in LL; a tree has as many, later
    assert Nccl(50e9).all_gather(0, 8).seconds == pytest.approx(6.6e-6 + 7 * 0.6e-6)
    large = Nccl(50e9).all_reduce(10**9, 8)
    assert large.transfer_s == pytest.approx(2 * 7 / 8 * 1e9 / 360e9)  # the network is not used
    assert large.latency_s == pytest.approx(8.4e-6 + 14 * 3.4e-6)


def test_nccl_between_nodes_by_hand() -> None:
    small = Nccl(50e9).all_reduce(0, 64)
    assert small.seconds == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 3 * 5e-6))  # a chain of 8 and a tree of 8 nodes
    large = Nccl(50e9).all_reduce(10**10, 64)
    assert large.transfer_s == pytest.approx(2 * 63 / 64 * 1e10 / 50e9)  # a ring, at the node's bandwidth
    assert large.latency_s == pytest.approx(8.4e-6 + (112 * 3.4 + 16 * 14) * 1e-6)
    assert Nccl(50e9, latency_scale=0.5).all_reduce(0, 64).seconds == pytest.approx(6.8e-6 + 7 * 0.6e-6 + 3 * 5e-6)
    assert Nccl(50e9).all_gather(10**6, 64).seconds > 63 * 1e6 / 50e9
    assert Nccl(50e9).all_reduce(10**6, 1).seconds == Nccl(50e9).all_gather(10**6, 1).seconds == 0


def test_measured_collectives_are_found_by_kind_and_size() -> None:
    measured = Measured({("all_reduce", 8): Collective(1.0), ("all_gather", 8): Collective(2.0)})
    assert (measured.all_reduce(8, 2).seconds, measured.all_gather(8, 2).seconds) == (1.0, 2.0)


def test_expected_maximum_of_known_distributions() -> None:
    coin = Stragglers.of([1.0, 2.0])
    assert coin.expected_maximum(1) == pytest.approx(1.5)
    assert coin.expected_maximum(3) == pytest.approx(2 - 0.5**3)
    uniform = Stragglers.of([(i + 0.5) / 10_000 for i in range(10_000)])
    assert uniform.expected_maximum(9) == pytest.approx(9 / 10, abs=1e-4)
    normal = Stragglers.normal(0.01)
    assert normal.expected_maximum(1) == pytest.approx(1)
    assert normal.expected_maximum(2) == pytest.approx(1 + 0.01 / 3.14159265**0.5, abs=1e-6)
    assert normal.expected_maximum(1000) == pytest.approx(1 + 0.01 * 3.2414, abs=2e-5)  # Tippett 1925
    assert Stragglers.normal(0.0).expected_maximum(1024) == NO_STRAGGLERS.expected_maximum(8) == 1


def test_stragglers_of_a_run(tmp_path: Path) -> None:
    run = RankTimes(DistEnv(), tmp_path)
    run._write(10, {"data_s": [0.0, 0.5, 0.0], "compute_s": [1.0, 1.5, 1.0], "wait_s": [1.0, 0.0, 1.0]}, 2.0)
    run._write(20, {"data_s": [0.0, 0.0, 0.0], "compute_s": [2.0, 2.0, 2.0], "wait_s": [0.0, 0.0, 0.0]}, 2.0)
    assert Stragglers.from_rank_times(run.path).values == (1, 1, 1, 1, 1, 2)


@pytest.mark.parametrize("content", [None, "", "{", '{"step": 1}\n', '{"data_s": [0.1], "compute_s": [1.0]}\n', "7\n"])
def test_rank_times_that_cannot_be_used_are_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "rank_times.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="rank_times"):
        Stragglers.from_rank_times(file)


def run_of(*seconds: float, processor_s: float = 1.0, wall_s: float = 1.0) -> ComputeRun:
    return ComputeRun([Event("sum", value, 4) for value in seconds], processor_s, wall_s)


def test_ranks_with_a_core_each_wait_for_the_slowest_and_ranks_that_share_cores_for_all_work() -> None:
    both = [run_of(1.0, 4.0), run_of(3.0, 2.0)]
    assert [event.compute_s for event in common_events(both, 2.0)] == [3, 4]
    four = [run_of(1.0), run_of(1.0), run_of(1.0), run_of(3.0)]
    assert [event.compute_s for event in common_events(four, 2.0)] == [1.5]  # 6 s of work on 2 cores: 3 s at half speed
    assert [event.compute_s for event in common_events([*four[:3], run_of(9.0)], 2.0)] == [4.5]  # 9 s on one core


def test_cores_received() -> None:
    half = run_of(1.0, processor_s=0.9, wall_s=1.8)
    assert cores_received([half] * 4, cores=2) == pytest.approx(2.0)
    assert cores_received([half] * 2, cores=2) == pytest.approx(1.0)  # others have the rest
    assert cores_received([run_of(1.0, processor_s=0.9, wall_s=1.2)] * 4, cores=2) == 2.0  # not all at the same time
    assert cores_received([half] * 2, cores=8) == pytest.approx(4.0)  # of cores that these ranks do not ask for too


def test_batch_norm_of_fewer_ranks_travels_among_these_and_buckets_among_all() -> None:
    asked: list[int] = []

    class Listening(Links):
        def all_reduce(self, num_bytes: int, ranks: int) -> Collective:
            asked.append(ranks)
            return super().all_reduce(num_bytes, ranks)

    simulate([Event("sum", 1, 4), Event("bucket", 1, 4), Event("wait", 0)], Machine(64, Listening(), norm_ranks=8))
    assert set(asked[::2]) == {8} and set(asked[1::2]) == {64}
