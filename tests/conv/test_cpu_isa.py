"""Is every instruction set tier of the CPU kernels right? This file's tests run once more for each of them.

The tier is chosen once per process, so `test_tier_in_a_process_of_its_own` runs this file again with INLAY_CPU_ISA set.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import inlay
from tests.conv.cases import BASIC, CASES, LENGTHS, Case, check_gradients, check_values
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the widths of all vectors and of their unrolled loops.
SIZES = [1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 67, 129]


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    environment = {**os.environ, "INLAY_CPU_ISA": tier}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_sizes(case, size, dtype):
    for shape in ((2, size, 19), (2, 19, size)):
        tensors = case.inputs(shape, dtype, "cpu")
        check_values(case, tensors)
        check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case, dtype):
    for shape, lengths in (((2, 70, 131), None), ((1, sum(LENGTHS), 33), LENGTHS)):
        tensors = case.inputs(shape, dtype, "cpu", lengths)
        check_values(case, tensors)
        check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", range(2, 9))
def test_steps_equal_the_whole(width, dtype):
    case = Case(width=width, bias=True)
    tensors = case.inputs((2, 20, 523), dtype, "cpu")
    y = case.run(inlay, tensors)[0]
    state = tensors["x"].new_zeros(2, 523, width)
    for x, expected in zip(tensors["x"].split(5, dim=1), y.split(5, dim=1), strict=True):
        actual = inlay.causal_conv1d_step(x, state, tensors["weight"], tensors["bias"], activation="silu")
        assert_same_bits(actual, expected, "y")
