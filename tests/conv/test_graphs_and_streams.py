"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.conv.cases import BASIC, LAYOUTS, LENGTHS, TOKENS_INNERMOST, Case, gradients
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import random_like
from tests.support.on_cuda import (
    capture,
    check_current_stream,
    check_in_a_graph,
    check_second_device,
    needs_memory,
    no_synchronisation,
    two_gpus,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, packed):
    lengths = LENGTHS if packed else None
    shape = (1, sum(LENGTHS), 256) if packed else (2, 300, 256)
    tensors = case.inputs(shape, torch.bfloat16, "cuda", lengths)
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    # The boundaries change as well: the graph must not have kept their values.
    refills = (
        case.inputs(shape, torch.bfloat16, "cuda", lengths and lengths[turn:] + lengths[:turn]) for turn in range(3)
    )
    check_in_a_graph(lambda given: case.run(inlay, given), leaves, refills, str(case))


def test_steps_in_a_cuda_graph():
    weight = torch.randn(256, 4, device="cuda").bfloat16()
    x, state = torch.randn(8, 1, 256, device="cuda").bfloat16(), torch.zeros(8, 256, 4, device="cuda").bfloat16()
    expected_state = state.clone()
    graph, y = capture(
        lambda: inlay.causal_conv1d_step(x, state, weight, activation="silu"),
        warm_up=lambda: inlay.causal_conv1d_step(x, state.clone(), weight, activation="silu"),
    )
    for _ in range(6):
        x.normal_()
        graph.replay()
        assert_same_bits(y, inlay.causal_conv1d_step(x, expected_state, weight, activation="silu"), "y")
        assert_same_bits(state, expected_state, "state")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_launches_on_the_current_stream(case):
    tensors = case.inputs((2, 512, 512), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))

    def run(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return *case.run(inlay, given), *gradients(case, inlay, given, douts).values()

    check_current_stream(run, tensors, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_no_synchronisation(case):
    tensors = case.inputs((1, sum(LENGTHS), 256), torch.bfloat16, "cuda", LENGTHS)
    douts = random_like(case.run(inlay, tensors))
    state = torch.zeros(4, 256, 4, device="cuda").bfloat16()
    slots = torch.tensor([2], device="cuda")
    with no_synchronisation():
        gradients(case, inlay, tensors, douts)
        inlay.causal_conv1d_step(tensors["x"][:, 0], state, tensors["weight"][:, :2].contiguous(), state_indices=slots)


@two_gpus
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((2, 64, 256), torch.bfloat16, "cuda:1")
    check_second_device(
        lambda given: case.run(inlay, given), lambda given, douts: gradients(case, inlay, given, douts), tensors
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_31_elements(layout):
    needs_memory(24)
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
