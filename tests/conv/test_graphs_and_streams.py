"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.conv.cases import BASIC, LAYOUTS, LENGTHS, TOKENS_INNERMOST, Case, gradients, random_like
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import free_cuda_bytes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, packed):
    """Capture, change the inputs in place, replay: the same bits as eager calls."""
    lengths = LENGTHS if packed else None
    shape = (1, sum(LENGTHS), 256) if packed else (2, 300, 256)
    tensors = case.inputs(shape, torch.bfloat16, "cuda", lengths)
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    floating = [leaf for leaf in leaves.values() if leaf.is_floating_point()]
    douts = random_like(case.run(inlay, tensors))

    def step() -> tuple[torch.Tensor, ...]:
        outputs = case.run(inlay, leaves)
        return (*outputs, *torch.autograd.grad(outputs, floating, douts))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for turn in range(3):
        # The boundaries change as well: the graph must not have kept their values.
        fresh = case.inputs(shape, torch.bfloat16, "cuda", lengths and lengths[turn:] + lengths[:turn])
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(fresh[name])
        graph.replay()
        for result, expected in zip(captured, step(), strict=True):
            assert_same_bits(result, expected, str(case))


def test_steps_in_a_cuda_graph():
    weight = torch.randn(256, 4, device="cuda").bfloat16()
    x, state = torch.randn(8, 1, 256, device="cuda").bfloat16(), torch.zeros(8, 256, 4, device="cuda").bfloat16()
    inlay.causal_conv1d_step(x, state, weight, activation="silu")
    state.zero_()
    expected_state = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = inlay.causal_conv1d_step(x, state, weight, activation="silu")
    for _ in range(6):
        x.normal_()
        graph.replay()
        assert_same_bits(y, inlay.causal_conv1d_step(x, expected_state, weight, activation="silu"), "y")
        assert_same_bits(state, expected_state, "state")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_launches_on_the_current_stream(case):
    """The producer is held back on a side stream: an op on any other stream would read the inputs too early."""
    tensors = case.inputs((2, 512, 512), torch.bfloat16, "cuda")
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
    tensors = case.inputs((1, sum(LENGTHS), 256), torch.bfloat16, "cuda", LENGTHS)
    douts = random_like(case.run(inlay, tensors))
    state = torch.zeros(4, 256, 4, device="cuda").bfloat16()
    slots = torch.tensor([2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, inlay, tensors, douts)
        inlay.causal_conv1d_step(tensors["x"][:, 0], state, tensors["weight"][:, :2].contiguous(), state_indices=slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((2, 64, 256), torch.bfloat16, "cuda:1")
    douts = random_like(case.run(inlay, tensors))
    assert torch.cuda.current_device() == 0
    grads = gradients(case, inlay, tensors, douts)
    first = {name: tensor.to("cuda:0") for name, tensor in tensors.items()}
    expected = gradients(case, inlay, first, tuple(dout.to("cuda:0") for dout in douts))
    for name, grad in grads.items():
        assert grad.device == torch.device("cuda:1")
        assert_same_bits(grad.cpu(), expected[name].cpu(), f"d{name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_31_elements(layout):
    free = free_cuda_bytes()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} are free")
    time, channels = 2**31 // 4096 + 8, 4096
    shape = (1, channels, time) if layout == TOKENS_INNERMOST else (1, time, channels)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = x.transpose(1, 2) if layout == TOKENS_INNERMOST else x
    weight = torch.randn(channels, 4, device="cuda").bfloat16()
    leaf = x.requires_grad_()
    y = inlay.causal_conv1d(leaf, weight, activation="silu")
    dy = torch.empty_like(y).normal_()
    (dx,) = torch.autograd.grad(y, leaf, dy)
    # The last tokens, which depend on few before them.
    few, kept = x.detach()[:, -40:], slice(-30, None)
    case = Case(layout=layout)
    exact = case.run(reference, {"x": few.double(), "weight": weight.double()})[0]
    eager = case.run(reference, {"x": few, "weight": weight})[0]
    assert_within_budget(y.detach()[:, kept], eager[:, kept], exact[:, kept], "y")
    eager_dx = gradients(case, reference, {"x": few, "weight": weight}, (dy[:, -40:],))["x"]
    exact_dx = gradients(case, reference, {"x": few.double(), "weight": weight.double()}, (dy[:, -40:].double(),))["x"]
    assert_within_budget(dx[:, kept], eager_dx[:, kept], exact_dx[:, kept], "dx")
