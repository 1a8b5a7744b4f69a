"""Same inputs, same bits: from run to run, and with any number of threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import inlay
from tests.moe.cases import MODELS, Case, gradients
from tests.moe.router_cases import CASES as ROUTER_CASES
from tests.support.compare import assert_same_bits

CASES = [Case(tokens=300, routing="skewed", biases=True, shared=True), MODELS[2]]


def test_a_thousand_runs():
    """On the raw ops, so that nothing but the kernels is repeated."""
    t = Case(tokens=20, biases=True).inputs(torch.float32)
    options = 0, True, False, False, torch.inf
    dy = torch.randn_like(t["x"])
    weights = (t["gate_up_proj"], t["down_proj"], t["gate_up_bias"], t["down_bias"], None, None)
    first = None
    for _ in range(1000):
        y, h, rows, ends = torch.ops.inlay.moe_experts_fwd(
            t["x"], t["indices"], t["weights"], None, *weights, *options, True
        )
        grads = torch.ops.inlay.moe_experts_bwd(
            dy, t["x"], h, rows, ends, t["weights"], *weights, 2, *options, *[True] * 6, False, False
        )
        results = (y, *grads)
        first = results if first is None else first
        for result, wanted in zip(results, first, strict=True):
            assert torch.equal(result, wanted)


_PROGRAM = """
import sys, torch, inlay
from tests.moe.test_determinism import everything
torch.set_num_threads(int(sys.argv[1]))
torch.save(everything(), sys.argv[2])
"""


def everything() -> list[torch.Tensor]:
    torch.manual_seed(5)
    results = []
    for case in CASES:
        tensors = case.inputs(torch.float32)
        results += [case.run(inlay, tensors), *gradients(case, inlay, tensors, torch.randn_like(tensors["x"])).values()]
    for case in ROUTER_CASES[:10]:
        results += case.run(inlay, case.inputs(torch.float32)).values()
    logits = torch.randn(5000, 64, requires_grad=True)
    weights, _, stats = inlay.moe_router(logits, 4, stats=True)
    return [*results, *stats, torch.autograd.grad(weights.sum() + stats.mean_probabilities.square().sum(), logits)[0]]


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads(threads, tmp_path):
    """Each in a process of its own: torch takes the number of threads once."""
    files = []
    for count in (1, threads):
        files.append(tmp_path / f"{count}.pt")
        subprocess.run([sys.executable, "-c", _PROGRAM, str(count), str(files[-1])], check=True)
    for one, several in zip(*(torch.load(file) for file in files), strict=True):
        assert_same_bits(several, one, f"with {threads} threads")
