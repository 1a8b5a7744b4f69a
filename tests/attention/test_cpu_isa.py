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
from tests.attention import test_masks
from tests.attention.cases import MODELS, SINGLES, Case, check_gradients, check_values, random_like

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

# Around the widths of all vectors.
LENGTHS = [1, 3, 4, 5, 8, 9, 17, 33, 65, 150]
WIDTHS = [8, 24, 40, 136]


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    environment = {**os.environ, "INLAY_CPU_ISA": tier}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def check(case: Case, dtype: torch.dtype) -> None:
    tensors = case.inputs(dtype)
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length):
    check(Case(queries=length, keys=length, batch=1, features=("causal",)), torch.float32)
    check(Case(queries=10, keys=length, batch=1, features=("bias",)), torch.bfloat16)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width):
    for dim, value_dim in ((width, 24), (24, width)):
        check(Case(batch=1, dim=dim, value_dim=value_dim, features=("gate",)), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*SINGLES, *MODELS], ids=str)
def test_features(case, dtype):
    check(case, dtype)


def test_masked_rows():
    test_masks.test_masked_rows("cpu", torch.float32)
    test_masks.test_masked_rows_beside_very_negative_scores(torch.bfloat16, 64, "cpu")
