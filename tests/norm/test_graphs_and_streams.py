"""CUDA only: graphs, streams, several devices, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.norm.cases import BASIC, gradients
from tests.support.compare import assert_same_bits, assert_within_budget
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


@pytest.mark.parametrize("shape", [(4, 2048), (3000, 128)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_forward_and_backward_in_a_cuda_graph(case, shape):
    tensors = case.inputs(shape, torch.bfloat16, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    refills = (case.inputs(shape, torch.bfloat16, "cuda") for _ in range(3))
    check_in_a_graph(lambda given: case.run(inlay, given), leaves, refills, str(case))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_launches_on_the_current_stream(case):
    tensors = case.inputs((512, 1024), torch.bfloat16, "cuda")
    check_current_stream(lambda given: case.run(inlay, given), tensors, str(case))


def test_backward_runs_on_the_stream_of_its_forward():
    case = BASIC[0]
    tensors = case.inputs((512, 1024), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    late = {str(i): dout for i, dout in enumerate(douts)}
    check_current_stream(
        lambda given: tuple(gradients(case, inlay, tensors, tuple(given.values())).values()), late, str(case)
    )


def test_no_synchronisation():
    case = BASIC[0]
    tensors = case.inputs((64, 256), torch.bfloat16, "cuda")
    douts = random_like(case.run(inlay, tensors))
    with no_synchronisation():
        gradients(case, inlay, tensors, douts)


@two_gpus
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_second_device_while_the_first_is_current(case):
    tensors = case.inputs((64, 256), torch.bfloat16, "cuda:1")
    check_second_device(
        lambda given: case.run(inlay, given), lambda given, douts: gradients(case, inlay, given, douts), tensors
    )


def test_more_than_2_31_elements():
    needs_memory(24)
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
    needs_memory(20)
    x = torch.randn(3, device="cuda", dtype=torch.bfloat16).view(3, 1, 1).expand(3, 2**31, 1)[:, : 2**30 + 2**29]
    y = inlay.l2_norm(x)
    expected = reference.l2_norm(x[:, :1])
    for block in y.split(2**28, dim=1):
        assert_same_bits(block, expected.expand_as(block), "y")
