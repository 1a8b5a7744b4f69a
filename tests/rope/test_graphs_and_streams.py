"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.rope.cases import BASIC, Case, check_gradients, gradients, random_like
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import free_cuda_bytes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("width", [128, 100])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, width):
    """Capture, change the inputs in place, replay: the same bits as eager calls."""
    shape = (2, 100, 8, 2, width)
    tensors = case.inputs(shape, torch.bfloat16, "cuda")
    leaves = {name: t.requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    douts = random_like(case.run(inlay, leaves))

    def step() -> tuple[torch.Tensor, ...]:
        outputs = case.run(inlay, leaves)
        return (*outputs, *torch.autograd.grad(outputs, wanted, douts))

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
    tensors = case.inputs((2, 256, 8, 2, 128), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    expected = (*case.run(inlay, tensors), *gradients(case, inlay, tensors, douts).values())
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        outputs = (*case.run(inlay, late), *gradients(case, inlay, late, douts).values())
    stream.synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_no_synchronisation(case):
    tensors = case.inputs((2, 50, 8, 2, 128), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, inlay, tensors, douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((2, 50, 8, 2, 128), torch.bfloat16, "cuda:1")
    douts = random_like(case.run(inlay, tensors))
    assert torch.cuda.current_device() == 0
    grads = gradients(case, inlay, tensors, douts)
    first = {name: tensor.to("cuda:0") for name, tensor in tensors.items()}
    expected = gradients(case, inlay, first, tuple(dout.to("cuda:0") for dout in douts))
    for name, grad in grads.items():
        assert grad.device == torch.device("cuda:1")
        assert_same_bits(grad.cpu(), expected[name].cpu(), f"d{name}")


@pytest.mark.parametrize("case", BASIC[:2], ids=str)
@pytest.mark.parametrize("tokens", [512, 3000])
def test_more_heads_than_blocks_run_at_once(tokens, case):
    """Every block takes several turns, the last ones without work for all warps."""
    tensors = case.inputs((2, tokens, 32, 8, 128), torch.bfloat16, "cuda")
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("width", [128, 132])
def test_more_than_2_31_elements(width):
    """Register kernels and the general ones: the last tokens of a tensor that 32-bit offsets cannot reach."""
    free = free_cuda_bytes()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    heads, few = 64, 20
    tokens = 2**31 // (heads * width) + few
    case = Case(norm=True)
    q = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16, device="cuda").normal_()
    small = case.inputs((1, few, heads, 1, width), torch.bfloat16, "cuda")
    small["q"] = q[:, -few:]
    k = small["k"].expand(1, few, 1, width)
    tensors = {
        "q": q,
        "k": torch.zeros(1, tokens, 1, width, dtype=torch.bfloat16, device="cuda"),
        "cos": torch.zeros(1, tokens, width, dtype=torch.bfloat16, device="cuda"),
        "sin": torch.zeros(1, tokens, width, dtype=torch.bfloat16, device="cuda"),
        "q_weight": small["q_weight"],
        "k_weight": small["k_weight"],
    }
    for name, value in (("k", k), ("cos", small["cos"]), ("sin", small["sin"])):
        tensors[name][:, -few:] = value
    q.requires_grad_()
    y, _ = case.run(inlay, tensors)
    dy = torch.zeros_like(y)
    dy[:, -few:].normal_()
    (dq,) = torch.autograd.grad(y, q, dy)
    leaf = {**small, "q": small["q"].detach()}
    douts = (dy[:, -few:], torch.zeros_like(small["k"]))
    eager, exact = case.run(reference, leaf), case.run(reference, {name: t.double() for name, t in leaf.items()})
    assert_within_budget(y[:, -few:].detach(), eager[0], exact[0], "y", 3.0)
    eager_dq = gradients(case, reference, leaf, douts)["q"]
    wide = {name: t.double() for name, t in leaf.items()}
    exact_dq = gradients(case, reference, wide, tuple(dout.double() for dout in douts))["q"]
    assert_within_budget(dq[:, -few:], eager_dq, exact_dq, "dq", 3.0)
    assert not dq[:, :few].any()
