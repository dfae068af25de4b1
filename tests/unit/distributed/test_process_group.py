"""Each process learns who it is from torchrun, else from Slurm, else it is alone; half a description is an error."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.distributed import process_group as distributed
from dist_deeplab.distributed.process_group import (
    DistEnv,
    all_reduce_sum,
    broadcast_from_main,
    gather_bytes,
    gather_to_all,
    get_world_size,
    process_group,
)
from dist_deeplab.distributed.rendezvous import Member, Rendezvous
from dist_deeplab.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4"}


# --- who this process is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ", [{}, {"HOME": "/"}, {"MASTER_ADDR": "host", "MASTER_PORT": "1"}, {"OMP_NUM_THREADS": "1"}]
)
def test_a_process_without_a_launcher_is_alone(environ: dict[str, str]) -> None:
    assert DistEnv.from_environ(environ) == DistEnv(0, 0, 1, "single process")


def test_torchruns_variables_are_read() -> None:
    assert DistEnv.from_environ(TORCHRUN) == DistEnv(rank=5, local_rank=1, world_size=8, launcher="torchrun")


def test_a_slurm_step_with_several_tasks_is_read() -> None:
    assert DistEnv.from_environ(SLURM) == DistEnv(rank=3, local_rank=2, world_size=4, launcher="slurm")


def test_torchrun_wins_over_slurm() -> None:
    """Inside `srun torchrun` both are set, and only torchrun's variables number the processes."""
    assert DistEnv.from_environ(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_batch_script_or_a_step_of_one_task_is_alone(environ: dict[str, str]) -> None:
    assert DistEnv.from_environ(environ) == DistEnv()


HALVES = [
    subset
    for count in range(1, 5)
    for subset in itertools.combinations(TORCHRUN, count)
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(subset)
]


@pytest.mark.parametrize("names", HALVES, ids="+".join)
def test_half_of_torchruns_variables_are_an_error_that_names_both_halves(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        DistEnv.from_environ({name: TORCHRUN[name] for name in names} | SLURM)
    there, _, missing = str(caught.value).partition(" but not ")
    assert all(name in there for name in names if not name.startswith("MASTER"))
    assert all(name in missing for name in TORCHRUN if name not in names)
    assert "torchrun" in missing


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "one", "1.5", "0x1"])
def test_a_torchrun_variable_that_is_not_a_number_is_named(name: str, value: str) -> None:
    with pytest.raises(UserError, match="not a number") as caught:
        DistEnv.from_environ(TORCHRUN | {name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", SLURM)
def test_a_slurm_variable_that_is_not_a_number_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 'x', not a number"):
        DistEnv.from_environ(SLURM | {name: "x"})


def test_a_slurm_step_without_local_ids_is_an_error() -> None:
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        DistEnv.from_environ({name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"})


@given(rank=st.integers(-3, 12), world_size=st.integers(-1, 10))
def test_a_rank_outside_the_world_is_an_error(rank: int, world_size: int) -> None:
    environ = TORCHRUN | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if 0 <= rank < world_size:
        env = DistEnv.from_environ(environ)
        assert (env.rank, env.world_size, env.is_main) == (rank, world_size, rank == 0)
    else:
        with pytest.raises(UserError, match=f"RANK={rank} .*WORLD_SIZE={world_size}"):
            DistEnv.from_environ(environ)


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert DistEnv.from_environ() == DistEnv.from_environ(TORCHRUN)


def test_only_the_main_rank_does_what_is_for_the_main_rank() -> None:
    done: list[tuple[int, str]] = []
    for rank in range(3):
        DistEnv(rank, rank, 3, "torchrun").on_main(lambda *arguments: done.append(arguments), rank, "written")
    assert done == [(0, "written")]


# --- its device -------------------------------------------------------------------------------------------------------


def test_without_gpus_every_rank_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert DistEnv(7, 7, 8, "torchrun").device == torch.device("cpu")


def test_a_single_visible_gpu_is_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1 shows each task its own GPU as the only one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert DistEnv(5, 1, 8, "slurm").device == torch.device("cuda", 0)


def test_a_rank_takes_the_gpu_of_its_local_rank_or_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert DistEnv(5, 1, 8, "torchrun").device == torch.device("cuda", 1)
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 here"):
        _ = DistEnv(2, 2, 8, "torchrun").device


# --- collectives and errors of a process that is alone ----------------------------------------------------------------


def test_a_single_process_needs_no_process_group() -> None:
    with process_group(DistEnv()):
        assert not dist.is_initialized()
        assert get_world_size() == 1
        tensor = torch.tensor([1.0, 2.0])
        assert all_reduce_sum(tensor) is tensor
        assert tensor.tolist() == [1.0, 2.0]
        assert broadcast_from_main({"a": 1}) == {"a": 1}
        assert gather_to_all("mine") == ["mine"]
        assert gather_to_all((1, math.nan, "\udc80"))[0][::2] == [1, "\udc80"]
        assert gather_bytes(b"") == [b""]


# --- rendezvous under Slurm -------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    """What the process group was asked for, with a `scontrol` that knows the nodes; nothing is really opened."""
    calls: list[dict[str, object]] = []

    def join(backend: str, **options: object) -> None:
        environ = {name: distributed.os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        calls.append({"backend": backend, **options, **environ})

    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[07-09]" ] && printf "node07\\nnode08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{distributed.os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[07-09]")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    members = tuple(Member("", "node07", "127.0.0.1") for _ in range(4))
    monkeypatch.setattr(distributed, "rendezvous", lambda *ranks, **options: Rendezvous(dist.HashStore(), members))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append({"destroyed": True}))
    return calls


def test_slurm_ranks_join_at_the_first_node_and_a_port_of_the_job(
    joined: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    with process_group(DistEnv.from_environ(SLURM)):
        pass
    opened, closed = joined
    assert (opened["MASTER_ADDR"], opened["MASTER_PORT"]) == ("node07", str(20_000 + 1_234_567 % 12_000))
    assert 20_000 <= int(str(opened["MASTER_PORT"])) < 32_768, "an ephemeral port may be taken by any client"
    assert (opened["backend"], opened["rank"], opened["world_size"]) == ("gloo", 3, 4)
    assert closed == {"destroyed": True}


def test_a_rendezvous_that_is_set_already_is_kept(
    joined: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MASTER_PORT", "4711")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with process_group(DistEnv.from_environ(SLURM)):
        pass
    assert (joined[0]["MASTER_ADDR"], joined[0]["MASTER_PORT"]) == ("elsewhere", "4711")


def test_after_an_error_the_process_group_is_left_open(
    joined: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's way to close it waits for the other ranks: the error would not be printed."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(RuntimeError, match="in the run"), process_group(DistEnv.from_environ(SLURM)):
        raise RuntimeError("in the run")
    assert {"destroyed": True} not in joined


def test_ranks_that_gloo_cannot_connect_get_a_sentence_with_the_remedy(
    joined: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [enforce fail] no error\nmore")

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with (
        pytest.raises(UserError, match=r"^rank 3 on node07 .* interface ib0 \(Gloo connect.*; set GLOO_SOCKET"),
        process_group(DistEnv.from_environ(SLURM)),
    ):
        pass


def test_what_nccl_does_not_take_travels_as_a_copy_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: list[torch.Tensor] = []

    def cuda(tensor: torch.Tensor) -> torch.Tensor:
        on_gpu.append(tensor.clone())
        return on_gpu[-1]

    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: torch.Tensor) -> None:
        assert tensor is on_gpu[-1], "a tensor of the CPU"
        reduce(tensor)
        tensor.mul_(3)  # as if there were three equal ranks

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
        assert tensor is on_gpu[-1], "a tensor of the CPU"
        gather(parts, tensor)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        monkeypatch.setattr(torch.Tensor, "cuda", cuda)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        own = torch.tensor([1.0, 2.0])
        assert all_reduce_sum(own) is own
        assert own.tolist() == [3.0, 6.0]
        monkeypatch.setattr(dist, "all_reduce", reduce)
        monkeypatch.setattr(dist, "all_gather", all_gather)
        assert gather_to_all({"a": [1]}) == [{"a": [1]}]
        assert broadcast_from_main("x") == "x"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("problem", ["fails", "is missing", "names nothing"])
def test_a_scontrol_that_does_not_help_is_named_with_the_remedy(
    joined: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: str
) -> None:
    script = {"fails": "echo 'Invalid hostlist' >&2; exit 1", "names nothing": "exit 0"}.get(problem)
    (tmp_path / "scontrol").unlink()
    if script:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with (
        pytest.raises(UserError, match=r"`scontrol show hostnames node\[07-09\]`.*set MASTER_ADDR") as caught,
        process_group(DistEnv.from_environ(SLURM)),
    ):
        pass
    assert problem != "fails" or "Invalid hostlist" in str(caught.value)
