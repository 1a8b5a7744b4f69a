"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.rope.cases import BASIC, Case, check_gradients, gradients
from tests.support.compare import assert_within_budget
from tests.support.devices import random_like
from tests.support.on_cuda import (
    check_current_stream,
    check_in_a_graph,
    check_second_device,
    needs_memory,
    no_synchronisation,
    two_gpus,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("width", [128, 100])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, width):
    shape = (2, 100, 8, 2, width)
    tensors = case.inputs(shape, torch.bfloat16, "cuda")
    leaves = {name: t.requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    refills = (case.inputs(shape, torch.bfloat16, "cuda") for _ in range(3))
    check_in_a_graph(lambda given: case.run(inlay, given), leaves, refills, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_launches_on_the_current_stream(case):
    tensors = case.inputs((2, 256, 8, 2, 128), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))

    def run(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return *case.run(inlay, given), *gradients(case, inlay, given, douts).values()

    check_current_stream(run, tensors, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_no_synchronisation(case):
    tensors = case.inputs((2, 50, 8, 2, 128), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    with no_synchronisation():
        gradients(case, inlay, tensors, douts)


@two_gpus
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((2, 50, 8, 2, 128), torch.bfloat16, "cuda:1")
    check_second_device(
        lambda given: case.run(inlay, given), lambda given, douts: gradients(case, inlay, given, douts), tensors
    )


@pytest.mark.parametrize("case", BASIC[:2], ids=str)
@pytest.mark.parametrize("tokens", [512, 3000])
def test_more_heads_than_blocks_run_at_once(tokens, case):
    """Every block takes several turns, the last ones without work for all warps."""
    tensors = case.inputs((2, tokens, 32, 8, 128), torch.bfloat16, "cuda")
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("width", [128, 132])
def test_more_than_2_31_elements(width):
    """Register kernels and the general ones: the last tokens of a tensor that 32-bit offsets cannot reach."""
    needs_memory(30)
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
