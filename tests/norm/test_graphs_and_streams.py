"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.norm.cases import BASIC, gradients, random_like
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import free_cuda_bytes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("shape", [(4, 2048), (3000, 128)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, shape):
    """Capture, change the inputs in place, replay: the same bits as eager calls."""
    tensors = case.inputs(shape, torch.bfloat16, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    douts = random_like(case.run(inlay, tensors))

    def step() -> tuple[torch.Tensor, ...]:
        outputs = case.run(inlay, leaves)
        return (*outputs, *torch.autograd.grad(outputs, tuple(leaves.values()), douts))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        fresh = case.inputs(shape, torch.bfloat16, "cuda")
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(fresh[name])
        graph.replay()
        for result, expected in zip(captured, step(), strict=True):
            assert_same_bits(result, expected, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_launches_on_the_current_stream(case):
    """The producer is held back on a side stream: an op on any other stream would read the inputs too early."""
    tensors = case.inputs((512, 1024), torch.bfloat16, "cuda")
    expected = case.run(inlay, tensors)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        outputs = case.run(inlay, late)
    stream.synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted, str(case))


def test_backward_runs_on_the_stream_of_its_forward():
    case = BASIC[0]
    tensors = case.inputs((512, 1024), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    expected = gradients(case, inlay, tensors, douts)
    late = tuple(torch.zeros_like(dout) for dout in douts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, dout in zip(late, douts, strict=True):
            target.copy_(dout)
        grads = gradients(case, inlay, tensors, late)
    stream.synchronize()
    for name, grad in grads.items():
        assert_same_bits(grad, expected[name], f"d{name}")


def test_no_synchronisation():
    case = BASIC[0]
    tensors = case.inputs((64, 256), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, inlay, tensors, douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((64, 256), torch.bfloat16, "cuda:1")
    douts = random_like(case.run(inlay, tensors))
    assert torch.cuda.current_device() == 0
    grads = gradients(case, inlay, tensors, douts)
    first = {name: tensor.to("cuda:0") for name, tensor in tensors.items()}
    expected = gradients(case, inlay, first, tuple(dout.to("cuda:0") for dout in douts))
    for name, grad in grads.items():
        assert grad.device == torch.device("cuda:1")
        assert_same_bits(grad.cpu(), expected[name].cpu(), f"d{name}")


def needs(gib: int) -> None:
    free = free_cuda_bytes()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.0f} are free")


def test_more_than_2_31_elements():
    needs(24)
    rows, width = 2**31 // 4096 + 3, 4096
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.randn(width, device="cuda").bfloat16()
    ends = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    leaf, weight_leaf = x.requires_grad_(), weight.requires_grad_()
    y = inlay.rms_norm(leaf, weight_leaf, eps=1e-6)
    dy = torch.empty_like(y).normal_()
    dx, dweight = torch.autograd.grad(y, (leaf, weight_leaf), dy)

    few = x.detach()[ends].requires_grad_()
    eager = reference.rms_norm(few, weight, eps=1e-6)
    (eager_dx,) = torch.autograd.grad(eager, few, dy[ends])
    wide = few.detach().double().requires_grad_()
    exact = reference.rms_norm(wide, weight.double(), eps=1e-6)
    (exact_dx,) = torch.autograd.grad(exact, wide, dy[ends].double())
    assert_within_budget(y.detach()[ends], eager.detach(), exact.detach(), "y")
    assert_within_budget(dx[ends], eager_dx, exact_dx, "dx")

    blocks = zip(x.detach().split(2**15), dy.split(2**15), strict=True)
    sums = sum((dy.double() * reference.rms_norm(x.double(), eps=1e-6)).sum(0) for x, dy in blocks)
    assert_within_budget(dweight, sums.bfloat16(), sums, "dweight")


def test_more_than_2_32_rows():
    needs(20)
    x = torch.randn(3, device="cuda", dtype=torch.bfloat16).view(3, 1, 1).expand(3, 2**31, 1)[:, : 2**30 + 2**29]
    y = inlay.l2_norm(x)
    expected = reference.l2_norm(x[:, :1])
    for block in y.split(2**28, dim=1):
        assert_same_bits(block, expected.expand_as(block), "y")
