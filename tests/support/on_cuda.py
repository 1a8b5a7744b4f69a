"""What the tests on CUDA of every family ask of graphs, streams and devices, whatever its ops compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tests.support.compare import assert_same_bits
from tests.support.devices import free_cuda_bytes, random_like

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
_Result = TypeVar("_Result")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")

# A kernel that does nothing for so many cycles, some tens of milliseconds.
_DELAY_CYCLES = 50_000_000


def needs_memory(gib: int) -> None:
    free = free_cuda_bytes()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.0f} are free")


@contextmanager
def on_a_side_stream() -> Iterator[None]:
    """Ordered behind what the current stream has to do, and before what it is given afterwards."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(
    step: Callable[[], _Result], warm_up: Callable[[], object] | None = None
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """The graph of ``step()``, and what its replays write. ``warm_up``, by default the step itself, comes before."""
    with on_a_side_stream():
        (warm_up or step)()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def check_in_a_graph(run: Callable[[Tensors], Outputs], leaves: Tensors, refills: Iterable[Tensors], what: str) -> None:
    """Forward and backward: capture, change the inputs in place, replay: the same bits as eager calls.

    Gradients are taken of those ``leaves`` that require them.
    """
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    douts = random_like(run(leaves))

    def step() -> Outputs:
        outputs = run(leaves)
        return (*outputs, *torch.autograd.grad(outputs, wanted, douts))

    graph, captured = capture(step)
    for fresh in refills:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(fresh[name])
        graph.replay()
        for result, expected in zip(captured, step(), strict=True):
            assert_same_bits(result, expected, what)


def check_current_stream(run: Callable[[Tensors], Outputs], tensors: Tensors, what: str) -> None:
    """The producer is held back on a side stream: an op on any other stream would read the inputs too early."""
    expected = run(tensors)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with on_a_side_stream():
        torch.cuda._sleep(_DELAY_CYCLES)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        outputs = run(late)
    torch.cuda.current_stream().synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted, what)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Anything that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_second_device(
    run: Callable[[Tensors], Outputs],
    gradients: Callable[[Tensors, Outputs], Tensors],
    tensors: Tensors,
) -> None:
    """``tensors`` on the second device while the first is current, against the same on the first."""
    douts = random_like(run(tensors))
    assert torch.cuda.current_device() == 0
    grads = gradients(tensors, douts)
    first = {name: tensor.to("cuda:0") for name, tensor in tensors.items()}
    expected = gradients(first, tuple(dout.to("cuda:0") for dout in douts))
    for name, grad in grads.items():
        assert grad.device == torch.device("cuda:1")
        assert_same_bits(grad.cpu(), expected[name].cpu(), f"d{name}")
