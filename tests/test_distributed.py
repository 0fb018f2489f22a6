"""The process pools that the other tests stand on."""

import os
import subprocess
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_distributed


def sum_of_ranks(scale: torch.Tensor) -> torch.Tensor:
    value = scale * (dist.get_rank() + 1)
    dist.all_reduce(value)
    return value


def process_id() -> int:
    return os.getpid()


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("rank 1 alone")
    dist.barrier()


def exit_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def start_a_child() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def initialize_layout(tensor: int, pipeline: int) -> tuple[int, int]:
    """Make Megatron's groups; return the tensor rank and the number of open descriptors before."""
    from megatron.core import parallel_state

    descriptors = len(os.listdir("/proc/self/fd"))
    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    return parallel_state.get_tensor_model_parallel_rank(), descriptors


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_communicate_and_results_come_in_rank_order(world_size):
    results = run_distributed(world_size, sum_of_ranks, torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    total = world_size * (world_size + 1) / 2
    expected = torch.tensor([total, 2 * total], dtype=torch.bfloat16)
    assert len(results) == world_size and all(torch.equal(result, expected) for result in results)
    assert run_distributed(world_size, dist.get_rank) == list(range(world_size))


def test_processes_start_once_and_the_parent_is_not_one_of_them():
    first = run_distributed(2, process_id)
    assert run_distributed(2, process_id) == first
    assert len({*first, os.getpid()}) == 3


def test_layouts_follow_one_another_in_one_world_and_leave_nothing_open():
    calls = [run_distributed(4, initialize_layout, tensor, 2) for tensor in (2, 1, 2, 1, 2)]
    assert [[rank for rank, _ in call] for call in calls] == [[0, 1, 0, 1] if i % 2 == 0 else [0] * 4 for i in range(5)]
    growth = [after - before for (_, before), (_, after) in zip(calls[2], calls[4], strict=True)]
    assert max(growth) < 20, growth  # one layout opens a hundred; the first two calls import, so they do not count


def test_a_failing_rank_gives_its_own_traceback_and_leaves_no_process_behind():
    before = run_distributed(2, process_id) + run_distributed(2, start_a_child)
    with pytest.raises(RankError, match=r"failed on rank 1 of 2(?s:.)*raise_on_rank_1(?s:.)*KeyError: 'rank 1 alone'"):
        run_distributed(2, raise_on_rank_1)
    assert not set(before) & set(run_distributed(2, process_id))
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in before)


def test_a_dying_rank_is_reported_with_its_status():
    with pytest.raises(RankError, match=r"rank 0 of 2(?s:.)*status 7"):
        run_distributed(2, exit_on_rank_0)


def test_a_hanging_rank_is_reported_with_where_it_hangs():
    run_distributed(2, process_id)  # so that the start does not count towards the limit
    with pytest.raises(RankError, match=r"within 2 s(?s:.)*rank 1 of 2 was here(?s:.)*sleep_on_rank_1"):
        run_distributed(2, sleep_on_rank_1, timeout=2.0)
