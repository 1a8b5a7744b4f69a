"""Is every instruction set tier of the CPU kernels right? This file's tests run once more for each of them.

The tier is chosen once per process, so `test_tier_in_a_process_of_its_own` runs this file again with INLAY_CPU_ISA set.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.moe import test_router, test_values
from tests.moe.cases import MODELS, OPTIONS, SHAPES, Case, check_gradients, check_values
from tests.moe.router_cases import CASES, RouterCase
from tests.moe.router_cases import check as check_router

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the widths of all vectors.
SIZES = [1, 3, 4, 5, 8, 9, 15, 16, 17, 33]


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    environment = {**os.environ, "INLAY_CPU_ISA": tier}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def check(case: Case, dtype: torch.dtype) -> None:
    tensors = case.inputs(dtype)
    check_values(case, tensors)
    check_gradients(case, tensors, torch.randn_like(tensors["x"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*MODELS, *OPTIONS, *SHAPES], ids=str)
def test_cases(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, transposed):
    """Of every dimension in turn, and of tokens with one expert: from a few rows to a tile."""
    options = {"transposed": transposed}
    check(Case(hidden=size, options=options), torch.float32)
    check(Case(intermediate=size, options=options, biases=True), torch.bfloat16)
    check(Case(tokens=size, experts=1, slots=1, options=options), torch.float16)


@pytest.mark.parametrize("case", [Case(biases=True), Case(options={"transposed": True}), MODELS[2]], ids=str)
def test_batch_invariance(case):
    test_values.test_a_token_does_not_depend_on_others(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_routers(case, dtype):
    if case.experts > 100 and dtype != torch.float32:
        pytest.skip("so many experts have no distinct logits in 16 bits")
    check_router(case, case.inputs(dtype))


@pytest.mark.parametrize("experts", SIZES)
def test_router_widths(experts):
    case = RouterCase(experts=experts, k=min(3, experts), options={"renormalize": True})
    check_router(case, case.inputs(torch.float32))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits(value):
    test_router.test_non_finite_logits(value, {}, "cpu")
