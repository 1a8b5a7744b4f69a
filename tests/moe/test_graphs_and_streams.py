"""CUDA only: graphs, streams, several devices, and nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.moe.cases import LEAVES, MODELS, Case, gradients, needs_kernels
from tests.support.devices import random_like
from tests.support.on_cuda import (
    check_current_stream,
    check_in_a_graph,
    check_second_device,
    no_synchronisation,
    two_gpus,
)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("_kernels")]
CASES = [Case(hidden=128, intermediate=64, tokens=tokens) for tokens in (1, 200)] + MODELS
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def _kernels() -> None:
    needs_kernels("cuda")


def block(given: Tensors) -> tuple[torch.Tensor, ...]:
    """A router and its experts, with the losses."""
    logits = given["x"] @ given["router"]
    weights, indices, stats = inlay.moe_router(logits, 2, renormalize=True, weights_dtype=logits.dtype, stats=True)
    y = inlay.moe_experts(given["x"], indices, weights, given["gate_up_proj"], given["down_proj"])
    return y, inlay.load_balancing_loss(stats, 2), inlay.router_z_loss(stats)


def block_inputs(case: Case, device: str = "cuda") -> Tensors:
    tensors = case.inputs(torch.bfloat16, device)
    router = (torch.randn(case.hidden, case.experts, device=device) * case.hidden**-0.5).bfloat16()
    return {name: tensors[name] for name in ("x", "gate_up_proj", "down_proj")} | {"router": router}


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_block_in_a_cuda_graph(case):
    """Other tokens go to other experts in each replay."""
    leaves = {name: t.requires_grad_() for name, t in block_inputs(case).items()}
    check_in_a_graph(block, leaves, (block_inputs(case) for _ in range(3)), str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_in_a_cuda_graph(case):
    leaves = {name: t.requires_grad_(name in LEAVES) for name, t in case.inputs(torch.bfloat16, "cuda").items()}
    refills = (case.inputs(torch.bfloat16, "cuda") for _ in range(3))
    check_in_a_graph(lambda given: (case.run(inlay, given),), leaves, refills, str(case))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_launches_on_the_current_stream(case):
    check_current_stream(block, block_inputs(case), str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_synchronisation(case):
    tensors = case.inputs(torch.bfloat16, "cuda")
    (dy,) = random_like((case.run(inlay, tensors),))
    inputs = block_inputs(CASES[0])
    with no_synchronisation():
        gradients(case, inlay, tensors, dy)
        block(inputs)


@two_gpus
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_device_while_the_first_is_current(case):
    check_second_device(
        lambda given: (case.run(inlay, given),),
        lambda given, douts: gradients(case, inlay, given, *douts),
        case.inputs(torch.bfloat16, "cuda:1"),
    )
