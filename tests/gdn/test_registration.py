"""Are the raw ops registered as torch wants them, and do the public functions compile, export and stay in one graph?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from inlay.ops.gdn import rule as ops
from tests.gdn.cases import LEAVES, Case
from tests.gdn.layer_cases import STATES, LayerCase, with_own_states
from tests.support.compare import assert_same_bits
from tests.support.registration import (
    check_compiled,
    check_enums,
    check_exported,
    check_fake_form,
    check_functional_grad,
    check_inductor,
    check_op,
    needs_compiler,
)

BF16, F32 = torch.bfloat16, torch.float32
AUTO, CHUNK, RECURRENT = (int(mode) for mode in ops.Mode)


def _gate_tensors(device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    for dtype in (F32, BF16):
        a, b = torch.randn(2, 5, 16, device=device).to(dtype).split(8, -1)
        yield a, b, torch.randn(8, device=device).to(dtype), torch.randn(8, device=device)


def _gates_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for tensors in _gate_tensors(device):
        yield *tensors, 1.0, tensors[1].dtype
        yield *tensors, 2.0, F32


def _gates_backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for tensors in _gate_tensors(device):
        dg, dbeta = (torch.randn(2, 5, 8, device=device) for _ in range(2))
        for needs_vectors in (True, False):
            yield dg, dbeta.to(tensors[1].dtype), *tensors, 1.0, needs_vectors


def _inputs(device: str) -> Iterator[tuple[Any, ...]]:
    """q, k, v, g, beta, initial_state, cu_seqlens."""
    case = Case(tokens=20, value_heads=4, key_dim=16, value_dim=24)
    yield *case.inputs(F32, device).values(), None
    tensors = case.inputs(BF16, device)
    yield *(tensors[name] for name in LEAVES[:5]), None, None
    packed = Case(tokens=20, batch=1, key_dim=16, value_dim=16).inputs(BF16, device)
    state = torch.randn(3, 2, 16, 16, device=device).to(BF16)
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    yield *(packed[name] for name in LEAVES[:5]), state, offsets
    sliced = torch.randn(2, 20, 3, 2, 16, device=device).unbind(2)
    yield *sliced, tensors["g"][..., :2], tensors["beta"][..., :2].float(), None, None


def _rule_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for tensors in _inputs(device):
        yield *tensors, 0.25, True, True, F32, AUTO
        yield *tensors, 0.25, False, False, BF16, CHUNK


def _rule_backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for q, k, v, g, beta, state, offsets in _inputs(device):
        if device == "cuda" and q.dtype == F32:  # no kernel
            continue
        o, final_state = ops._rule(q, k, v, g, beta, state, offsets, 0.25, True, True, F32, RECURRENT)
        needed = state is not None
        yield torch.randn_like(o), None, q, k, v, g, beta, state, offsets, 0.25, False, False
        yield torch.randn_like(o), final_state, q, k, v, g, beta, state, offsets, 0.25, True, needed


def _step_cases(device: str) -> Iterator[tuple[Any, ...]]:
    case = Case(tokens=3, value_heads=4, key_dim=16, value_dim=24)
    tensors = list(case.inputs(BF16, device).values())
    yield *tensors, None, 0.25, True
    yield *tensors, torch.empty(2, 3, 4, 16, 24, device=device), 0.25, False


def _layer_step_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for dtype, state_dtype in ((F32, F32), (BF16, F32), (BF16, BF16)):
        case = LayerCase(tokens=3, conv_bias=dtype == BF16)
        tensors = case.inputs(dtype, device, state_dtype)
        yield *tensors.values(), None, case.key_heads, 1e-6, 1.0
        state = tensors["state"]
        yield *tensors.values(), state.new_empty(2, 3, *state.shape[1:]), case.key_heads, 1e-6, 1.0


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {
    "gdn_gates": _gates_cases,
    "gdn_gates_bwd": _gates_backward_cases,
    "gated_delta_rule": _rule_cases,
    "gated_delta_rule_bwd": _rule_backward_cases,
    "gated_delta_step": _step_cases,
    "gdn_layer_step": _layer_step_cases,
}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    check_op(op, OPCHECK_CASES[op](device))


def test_mode_is_that_of_the_native_side():
    check_enums("gdn_enums", ops.Mode)


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_compiles_in_one_graph_and_once_for_all_sizes(packed, device):
    """Forward and backward of the traced graph, with a second and a third number of tokens and sequences."""
    case = Case(options={"l2norm_qk": True})

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**tensors):
        return case.run(inlay, tensors)

    for tokens, sequences in ((70, 3), (9, 2), (130, 5)):
        tensors = Case(tokens=tokens, batch=1 if packed else sequences).inputs(BF16, device)
        if packed:
            tensors["initial_state"] = torch.randn(sequences, 2, 32, 32, device=device)
            tensors["cu_seqlens"] = torch.linspace(0, tokens, sequences + 1, device=device).int()
        leaves = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        check_compiled(compiled, lambda **given: case.run(inlay, given), tensors, leaves, str(case))


def _layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> torch.Tensor:
    g, beta = inlay.gdn_gates(*gates)
    return inlay.gated_delta_rule(q.tanh(), k, v, g, beta, l2norm_qk=True).square()


@pytest.mark.usefixtures("fresh_dynamo")
@needs_compiler
def test_inductor(device):
    """Between operations that Inductor fuses itself, gates included."""
    tensors = Case(tokens=70).inputs(F32, device)
    projections = [torch.randn(2, 70, 2, device=device) for _ in range(2)]
    vectors = [torch.zeros(2, device=device) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (tensors["q"], tensors["k"], tensors["v"], *projections, *vectors)]
    check_inductor(_layer, leaves, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_step_updates_its_state(backend, device):
    case = Case(tokens=1)
    tensors = case.inputs(BF16, device)

    def step(q, k, v, g, beta, state):
        return inlay.gated_delta_step(q * 2, k, v, g, beta, state, l2norm_qk=True) + 1

    arguments = [tensors[name] for name in LEAVES[:5]]
    state, expected_state = (tensors["initial_state"].clone() for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        expected = step(*arguments, expected_state)
        torch.testing.assert_close(compiled(*arguments, state), expected, rtol=0.01, atol=0.01)
        assert_same_bits(state, expected_state, "state")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_layer_step_updates_its_states(backend, device):
    case = LayerCase()
    tensors = with_own_states(case.inputs(BF16, device))
    expected = with_own_states(tensors)

    def step(mixed_qkv, **rest):
        return case.run(inlay, {"mixed_qkv": mixed_qkv * 2, **rest}) + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(**tensors), step(**expected), rtol=0.01, atol=0.01)
        for name in STATES:
            assert_same_bits(tensors[name], expected[name], name)


class Layer(torch.nn.Module):
    def forward(self, q, k, v, g, beta):
        return inlay.gated_delta_rule(q, k, v, g, beta, output_final_state=True)


def test_export(device):
    example, other = (tuple(Case(tokens=tokens, with_state=False).inputs(BF16, device).values()) for tokens in (20, 77))
    check_exported(Layer(), "gated_delta_rule", example, other, ({1: torch.export.Dim("tokens", min=2)},) * 5)


def test_fake_tensors_have_the_real_form(device):
    case = Case(value_heads=4, value_dim=48)
    tensors = case.inputs(BF16, device)
    check_fake_form(lambda given: case.run(inlay, given), tensors)


def test_functional_grad(device):
    tensors = Case(tokens=20, with_state=False).inputs(F32, device)

    def loss(v):
        return inlay.gated_delta_rule(**{**tensors, "v": v}).sin().sum()

    check_functional_grad(loss, tensors["v"])
