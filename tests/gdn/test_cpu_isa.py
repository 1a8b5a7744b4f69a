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
from tests.gdn import test_gates, test_step
from tests.gdn.cases import HARD, SHAPES, Case, check_gradients, check_values
from tests.support.devices import HALVES, random_like

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

# Around the lengths and widths of all vectors.
LENGTHS = [1, 3, 4, 5, 8, 9, 16, 17, 33, 63, 64, 65, 150]
WIDTHS = [8, 16, 24, 40, 56, 72, 96, 136, 256]


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    environment = {**os.environ, "INLAY_CPU_ISA": tier}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def check(case: Case, dtype: torch.dtype, **options: str) -> None:
    tensors = case.inputs(dtype)
    check_values(case, tensors, **options)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)), **options)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens, mode):
    check(Case(tokens=tokens, batch=1), torch.float32, mode=mode)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, mode):
    for key_dim, value_dim in ((width, 24), (24, width)):
        check(Case(tokens=70, batch=1, key_dim=key_dim, value_dim=value_dim, value_heads=4), torch.bfloat16, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [*SHAPES[:5], *HARD], ids=str)
def test_cases(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("case", test_step.SHAPES, ids=str)
def test_steps(case, tokens):
    test_step.test_accuracy(case, tokens, torch.bfloat16, "cpu")
    test_step.test_states_of_every_token(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("shape", [(70, 3), (4, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gate_rows(dtype, shape):
    test_gates.check(test_gates.inputs(shape, dtype, "cpu"), {})


def test_extreme_gates():
    test_gates.test_extreme_values("cpu")
