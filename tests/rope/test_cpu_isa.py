"""Is every instruction set tier of the CPU kernels right? This file's tests run once more for each of them.

The tier is chosen once per process, so `test_tier_in_a_process_of_its_own` runs this file again with INLAY_CPU_ISA set.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import inlay
from tests.rope.cases import BASIC, CASES, Case, check_gradients, check_values, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the widths of all vectors and of their unrolled loops.
WIDTHS = [1, 2, 3, 5, 8, 15, 16, 17, 31, 34, 64, 67, 100, 132, 256]


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    environment = {**os.environ, "INLAY_CPU_ISA": tier}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, dtype):
    tensors = case.inputs((2, 5, 3, 2, width), dtype, "cpu")
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case, dtype):
    tensors = case.inputs((2, 40, 3, 2, 72), dtype, "cpu")  # several groups of tokens in the backward
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("width", [64, 68, 70])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_outputs_larger_than_the_caches(case, width):
    """These go to memory past the caches, where whole vectors fit; the numbers must be those of a small call."""
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    elements = (cache or 32 * 2**20) // 4 + 2**20  # in bf16 just over half the cache
    if elements > 2**27:
        pytest.skip(f"a last-level cache of {cache >> 20} MiB takes too large a tensor")
    tokens = elements // (10 * width)
    tensors = case.inputs((1, tokens, 8, 2, width), torch.bfloat16, "cpu")
    few = torch.arange(0, tokens, 97)[-300:]

    def pick(t: Tensor) -> Tensor:
        return t if t.dim() == 1 else t[few] if t.dim() == 2 else t[:, few]

    small = {name: pick(t) for name, t in tensors.items()}
    for output, expected in zip(case.run(inlay, tensors), case.run(inlay, small), strict=True):
        assert_same_bits(pick(output), expected, "output")
    douts = random_like((tensors["q"], tensors["k"]))
    large_grads = gradients(case, inlay, tensors, douts)
    small_grads = gradients(case, inlay, small, tuple(pick(dout) for dout in douts))
    for name in "qk":
        assert_same_bits(pick(large_grads[name]), small_grads[name], f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype):
    """Products and sums of all magnitudes, each rounded as eager code rounds it; subnormals, too."""
    exponents = torch.arange(-130, 120) if dtype == torch.bfloat16 else torch.arange(-24, 14)
    x = (torch.randn(len(exponents), 64) * 2.0 ** exponents[:, None]).to(dtype)
    angles = torch.randn(len(exponents), 64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for interleaved in (False, True):
        case = Case(norm=False, interleaved=interleaved)
        tensors = {"q": x[None, :, None], "k": x[None, :, None].flip(-1), "cos": cos, "sin": sin}
        for output, eager in zip(case.run(inlay, tensors), case.run(inlay.reference, tensors), strict=True):
            assert_same_bits(output, eager, "output")
