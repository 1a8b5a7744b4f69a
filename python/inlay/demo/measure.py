"""Time and memory on either device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def now(device: torch.device) -> float:
    """Seconds on a steady clock, after all work sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_growth(work: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors that lived at one time during ``work``, beyond those that lived before it.

    The caching allocator's own count on CUDA; on the CPU the sum over every allocation and release that the profiler
    sees. Unlike the size of the process, neither depends on what an allocator keeps for later.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _native_stderr_silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """The profiler's native side logs a line when it starts and when it stops, and reads its settings before we run."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
