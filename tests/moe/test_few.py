"""Few tokens without gradients, as in decoding: a GPU has kernels of their own for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import inlay
from tests.moe.cases import GPT_OSS, Case, check_values, same_non_finite
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype

# Rows of one load and of several, whole and not; experts enough that tokens share few.
CASES = [
    Case(hidden=1032, intermediate=136, experts=32, slots=8, shared=True, weights_dtype=torch.float32),  # Qwen3.5-MoE
    Case(hidden=136, intermediate=776, experts=40, slots=10, biases=True),
    Case(hidden=1544, intermediate=264, experts=8, slots=2),  # Mixtral
    Case(hidden=360, intermediate=336, experts=32, slots=4, biases=True, options=GPT_OSS),
    Case(hidden=1544, intermediate=8, experts=9, slots=3, biases=True, shared=True, options={"interleaved": True}),
    Case(hidden=8, intermediate=1160, experts=9, slots=1, shared=True, options={"transposed": True, "limit": 0.5}),
    Case(hidden=136, intermediate=72, experts=128, slots=32, options={"activation": "relu2", "gated": False}),
    Case(hidden=136, intermediate=272, experts=20, slots=5, biases=True,
         options={"activation": "gelu", "gated": False, "transposed": True}),
]  # fmt: skip


@each_dtype()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device, dtype):
    if dtype == torch.float64 and case.weights_dtype is not None:
        pytest.skip("float64 goes with float64")
    for tokens in (1, 2):
        few = replace(case, tokens=tokens)
        check_values(few, few.inputs(dtype, device))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
@pytest.mark.parametrize("routing", ["one_takes_all", "sentinels", "nobody", "twice"])
def test_routings(case, routing, device):
    for tokens in (1, 3):
        few = replace(case, tokens=tokens, routing=routing)
        check_values(few, few.inputs(torch.bfloat16, device))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_among_others(case, dtype, device):
    case = replace(case, tokens=2)
    tensors = case.inputs(dtype, device)
    both = case.run(inlay, tensors)
    for token in range(2):
        one = {name: t[token : token + 1] if t.shape[0] == 2 else t for name, t in tensors.items()}
        assert_same_bits(case.run(inlay, one), both[token : token + 1], f"y of token {token}")


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_wider_rows(case, device):
    """Aligned rows with others' values between them."""
    case = replace(case, tokens=2)
    tensors = case.inputs(torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    wider = {}
    for name, tensor in tensors.items():
        if name in ("x", "gate_up_proj", "down_proj"):
            room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16), torch.nan)
            room[..., 8:-8] = tensor
            tensor = room[..., 8:-8]
        wider[name] = tensor
    assert_same_bits(case.run(inlay, wider), expected, "y")


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_what_is_not_chosen_may_hold_anything(case, device):
    case = replace(case, tokens=2, routing="half_unused", experts=32)
    tensors = case.inputs(torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    for name in ("gate_up_proj", "down_proj"):
        tensors[name][:8] = torch.nan
    chosen = tensors["indices"].flatten().unique()
    assert (chosen >= 8).all()
    assert_same_bits(case.run(inlay, tensors), expected, "y")


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_tokens(case, value, device):
    case = replace(case, tokens=2)
    tensors = case.inputs(torch.float32, device)
    tensors["x"][1, 3] = value
    same_non_finite(case, tensors)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_one_call_after_another(case):
    """Kernels start before those in front of them have ended: each call reads what the last one wrote."""
    case = replace(case, tokens=1, routing="uniform")
    tensors = case.inputs(torch.bfloat16, "cuda")
    choices = [replace(case, routing="uniform").indices("cuda") for _ in range(50)]

    def chain(synchronize: bool) -> list[torch.Tensor]:
        x, results = tensors["x"], []
        for indices in choices:
            x = case.run(inlay, {**tensors, "x": x, "indices": indices})
            x = x / x.float().square().mean().sqrt().clamp(min=1e-3).to(x.dtype)
            results.append(x)
            if synchronize:
                torch.cuda.synchronize()
        return results

    wanted = chain(True)
    for _ in range(20):
        for step, (y, expected) in enumerate(zip(chain(False), wanted, strict=True)):
            assert_same_bits(y, expected, f"y of call {step}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(False)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for step, (y, expected) in enumerate(zip(captured, wanted, strict=True)):
        assert_same_bits(y, expected, f"y of call {step} in a graph")
