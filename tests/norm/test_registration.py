"""Are the raw ops registered as torch wants them, and do the public functions compile, export and stay in one graph?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from inlay.ops import norm as ops
from tests.norm.cases import BASIC, F32
from tests.support.registration import (
    check_compiled,
    check_enums,
    check_exported,
    check_fake_form,
    check_inductor,
    check_op,
    needs_compiler,
)

RMS, LAYER, L2 = ops.Kind
ONCE, STEPWISE = ops.Rounding
SILU, SIGMOID = ops.Activation
BF16 = torch.bfloat16


def _forward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of `norm` and `norm_fwd`."""

    def rows(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    weight, half = rows(64), rows(64).to(BF16)
    yield rows(4, 64), weight, None, None, 1e-6, 0.0, RMS, ONCE, SILU, False
    yield rows(2, 3, 64, dtype=BF16), half, half, None, 1e-6, 1.0, RMS, STEPWISE, SILU, False
    yield rows(4, 64, dtype=BF16), weight, None, None, 1e-6, 0.0, RMS, STEPWISE, SILU, False
    yield rows(4, 64), weight, weight, None, 1e-6, 0.0, LAYER, ONCE, SILU, False
    yield rows(4, 64, dtype=BF16), None, None, None, 1e-6, 0.0, L2, ONCE, SILU, False
    yield rows(4, 64), weight, None, rows(4, 64), 1e-6, 0.0, RMS, STEPWISE, SIGMOID, False
    yield rows(4, 64), weight, None, rows(4, 128)[:, 64:], 1e-6, 0.0, RMS, ONCE, SILU, True
    yield rows(3, 4, 64).transpose(0, 1), weight, None, None, 1e-6, 0.0, RMS, ONCE, SILU, False
    yield rows(0, 64), weight, None, None, 1e-6, 0.0, LAYER, ONCE, SILU, False
    yield rows(64), weight, None, None, 1e-6, 0.0, RMS, ONCE, SILU, False


def _add_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of `add_norm` and `add_norm_fwd`."""
    for x_dtype, residual_dtype, out_dtype in [
        (F32, F32, F32),
        (BF16, BF16, BF16),
        (BF16, F32, F32),
        (BF16, F32, BF16),
    ]:
        x = torch.randn(3, 4, 64, device=device).to(x_dtype).transpose(0, 1)
        residual = torch.randn(4, 3, 64, device=device).to(residual_dtype)
        yield x, residual, torch.randn(64, device=device), None, 1e-6, 0.0, RMS, STEPWISE, out_dtype


def _backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, gate, eps, offset, kind, rounding, activation, gate_first in _forward_cases(device):
        y, stats = ops._norm_fwd(x, weight, bias, gate, eps, offset, kind, rounding, activation, gate_first)
        yield (
            torch.randn_like(y), None, x, stats, weight, bias, gate, offset, kind, activation, gate_first, x.dtype,
            x.dtype, weight is not None, bias is not None,
        )  # fmt: skip
    for x, residual, weight, bias, eps, offset, kind, rounding, out_dtype in _add_cases(device):
        y, residual_out, stats = ops._add_norm_fwd(x, residual, weight, bias, eps, offset, kind, rounding, out_dtype)
        yield (
            torch.randn_like(y), torch.randn_like(residual_out), residual_out, stats, weight, bias, None, offset, kind,
            SILU, False, x.dtype, residual.dtype, True, False,
        )  # fmt: skip


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {
    "norm": _forward_cases,
    "norm_fwd": _forward_cases,
    "add_norm": _add_cases,
    "add_norm_fwd": _add_cases,
    "norm_bwd": _backward_cases,
}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    check_op(op, OPCHECK_CASES[op](device))


def test_enums_are_those_of_the_native_side():
    check_enums("norm_enums", ops.Kind, ops.Rounding, ops.Activation)


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_compiles_in_one_graph_and_once_for_all_sizes(case, device):
    """Forward and backward of the traced graph, with a second and a third number of rows."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**tensors):
        return case.run(inlay, tensors)

    for rows in (6, 9, 31):
        tensors = case.inputs((rows, 3, 40), BF16, device)
        check_compiled(compiled, lambda **given: case.run(inlay, given), tensors, list(tensors), str(case))


@pytest.mark.usefixtures("fresh_dynamo")
@needs_compiler
def test_inductor(device):
    """Between operations that Inductor fuses itself, on inputs that are not contiguous."""

    def block(x, residual, weight, gate):
        y, residual = inlay.add_rms_norm(x.transpose(0, 1) * 2, residual, weight)
        return inlay.gated_rms_norm(torch.sin(y), gate, weight).float().square().mean() + residual.sum()

    leaves = [
        torch.randn(*shape, device=device, requires_grad=True) for shape in [(5, 4, 64), (4, 5, 64), (64,), (4, 5, 64)]
    ]
    check_inductor(block, leaves)


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inlay.add_rms_norm(x, residual, self.weight, rounding="stepwise")


def test_export(device):
    example, other = (tuple(torch.randn(rows, 48, device=device) for _ in range(2)) for rows in (4, 11))
    rows = torch.export.Dim("rows", min=2)
    check_exported(Block(48).to(device), "add_norm", example, other, ({0: rows}, {0: rows}))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_fake_tensors_have_the_real_form(case, device):
    tensors = case.inputs((4, 5, 64), BF16, device)
    check_fake_form(lambda given: case.run(inlay, given), tensors)
