"""Are the raw ops registered as torch wants them, and do the public functions compile, export and stay in one graph?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from inlay.ops import conv as ops
from tests.conv.cases import BASIC, BF16, F32, LAYOUTS, LENGTHS, boundaries, in_order
from tests.support.compare import assert_same_bits
from tests.support.registration import (
    check_compiled,
    check_enums,
    check_exported,
    check_fake_form,
    check_inductor,
    check_op,
    needs_compiler,
)

NONE, SILU = ops.Activation


def _forward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of `causal_conv1d`."""

    def normal(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for layout in LAYOUTS:
        x, packed = in_order(normal(2, 9, 16), layout), in_order(normal(1, 9, 16, dtype=BF16), layout)
        yield x, normal(16, 4), None, None, None, NONE, False
        yield x, normal(16, 1, 3), normal(16), normal(2, 16, 2), None, SILU, True
        yield packed, normal(16, 4), normal(16), None, boundaries([2, 0, 7], device), SILU, True
        yield packed, normal(16, 2, dtype=BF16), None, None, boundaries([2, 7], device, torch.int64), SILU, False
        yield x[:, :0], normal(16, 4), normal(16), normal(2, 16, 3), None, SILU, True
        yield x[:, 1:5], normal(16, 4), None, None, None, SILU, False


def _backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, initial_state, cu_seqlens, activation, wants_state in _forward_cases(device):
        y, state = ops._conv(x, weight, bias, initial_state, cu_seqlens, activation, wants_state)
        yield (
            torch.randn_like(y), torch.randn_like(state) if wants_state else None, x, weight, bias, initial_state,
            cu_seqlens, activation, True, bias is not None, initial_state is not None,
        )  # fmt: skip
    yield (torch.randn_like(y), None, x, weight, None, None, None, NONE, False, False, False)


def _step_cases(device: str) -> Iterator[tuple[Any, ...]]:
    weight, bias = torch.randn(16, 4, device=device), torch.randn(16, device=device)
    for x_shape, dtype in [((3, 2, 16), F32), ((3, 16), BF16)]:
        x, state = torch.randn(x_shape, device=device).to(dtype), torch.randn(3, 16, 4, device=device).to(dtype)
        yield x, state, weight, None, None, NONE
        yield x, state, weight, bias, torch.tensor([2, 0, -1], device=device), SILU


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {
    "causal_conv1d": _forward_cases,
    "causal_conv1d_bwd": _backward_cases,
    "causal_conv1d_step": _step_cases,
}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    check_op(op, OPCHECK_CASES[op](device))


def test_enum_is_that_of_the_native_side():
    check_enums("conv_enums", ops.Activation)


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_compiles_in_one_graph_and_once_for_all_sizes(case, device):
    """Forward and backward of the traced graph, with a second and a third length."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**tensors):
        return case.run(inlay, tensors)

    for time in (10, 17, 31):
        tensors = case.inputs((5, time, 40), BF16, device)
        check_compiled(compiled, lambda **given: case.run(inlay, given), tensors, list(tensors), str(case))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_packed_sequences_compile(case, device):
    compiled = torch.compile(lambda **tensors: case.run(inlay, tensors), fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [5, *LENGTHS[:-1]]):
        tensors = case.inputs((1, sum(lengths), 24), BF16, device, lengths)
        for output, wanted in zip(compiled(**tensors), case.run(inlay, tensors), strict=True):
            assert_same_bits(output, wanted, str(case))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_steps_compile_and_update_the_state(backend, device):
    def decode(x, state, weight):
        return inlay.causal_conv1d_step(x * 2, state, weight, activation="silu") + 1

    weight = torch.randn(24, 4, device=device)
    states = [torch.randn(2, 24, 4, device=device)]
    states.append(states[0].clone())
    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    for _ in range(3):
        x = torch.randn(2, 1, 24, device=device)
        torch.testing.assert_close(compiled(x, states[0], weight), decode(x, states[1], weight))
        assert_same_bits(states[0], states[1], "state")


@pytest.mark.usefixtures("fresh_dynamo")
@needs_compiler
def test_inductor(device):
    """Between operations that Inductor fuses itself, on an input of each order in memory."""

    def block(x, weight, bias):
        y = inlay.causal_conv1d(x.transpose(1, 2) * 2, weight, bias, activation="silu")
        z, state = inlay.causal_conv1d(torch.sin(y).contiguous(), weight, return_final_state=True)
        return z.square().mean() + state.sum()

    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in [(2, 24, 19), (24, 4), (24,)]]
    check_inductor(block, leaves, rtol=1e-4, atol=1e-4)


class Block(torch.nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1d = torch.nn.Conv1d(channels, channels, 4, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return inlay.causal_conv1d(x, self.conv1d.weight, self.conv1d.bias, activation="silu")


def test_export(device):
    example, other = ((torch.randn(2, time, 16, device=device),) for time in (9, 30))
    check_exported(Block(16).to(device), "causal_conv1d", example, other, ({1: torch.export.Dim("time", min=2)},))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_fake_tensors_have_the_real_form(case, device):
    tensors = case.inputs((4, 5, 24), BF16, device)
    check_fake_form(lambda given: case.run(inlay, given), tensors)
