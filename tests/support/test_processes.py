from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from tests.support.processes import Processes


@pytest.fixture
def pair() -> Iterator[Processes]:
    processes = Processes(2, seconds=60)
    yield processes
    processes.close()


def _sum_of_ranks(rank: int, plus: int) -> tuple[int, int]:
    value = torch.tensor(rank + plus)
    torch.distributed.all_reduce(value)
    return int(value), os.getpid()


def _fails_on_the_second(rank: int) -> None:
    if rank == 1:
        raise ValueError("as it should")
    torch.distributed.barrier()


def _sleeps(rank: int) -> None:
    time.sleep(60)


def test_processes_compute_together_and_stay(pair: Processes) -> None:
    first, second = pair.run(_sum_of_ranks, 10), pair.run(_sum_of_ranks, 20)
    assert [total for total, _ in first] == [21, 21]
    assert [total for total, _ in second] == [41, 41]
    assert [pid for _, pid in first] == [pid for _, pid in second]
    assert len({os.getpid(), *(pid for _, pid in first)}) == 3


def test_an_error_is_raised_and_others_start(pair: Processes) -> None:
    pair.run(_sum_of_ranks, 0)
    with pytest.raises(RuntimeError, match=r"rank 1: (.|\n)*ValueError: as it should"):
        pair.run(_fails_on_the_second)
    assert [total for total, _ in pair.run(_sum_of_ranks, 10)] == [21, 21]


def test_time_is_limited(pair: Processes) -> None:
    pair.run(_sum_of_ranks, 0)
    pair.seconds = 0.5
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer within 0\.5 s"):
        pair.run(_sleeps)
    assert time.monotonic() - start < 30
