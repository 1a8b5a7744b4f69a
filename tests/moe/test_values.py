"""Is what experts give as accurate as eager code, for every routing, layout and size?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.moe.cases import MODELS, OPTIONS, ROUTINGS, SHAPES, TOKENS, Case, check_values, same_non_finite
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import each_dtype

_FEW_CHOICES = 128  # of tokens times slots, that CUDA has kernels of their own for


@each_dtype()
@pytest.mark.parametrize("case", [*MODELS, *OPTIONS], ids=str)
def test_models_and_options(case, device, dtype):
    if dtype == torch.float64 and case.weights_dtype is not None:
        pytest.skip("float64 goes with float64")
    check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, dtype, device):
    check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, dtype, device):
    for case in (Case(routing=routing, tokens=90), Case(routing=routing, biases=True, shared=True)):
        check_values(case, case.inputs(dtype, device))


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens, device):
    """From one to several tiles of rows and several tasks."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(tokens=tokens, biases=True)
        check_values(case, case.inputs(dtype, device))


@pytest.mark.slow
def test_many_tokens(device):
    case = Case(tokens=4096, hidden=64, intermediate=32, experts=16, slots=4, routing="skewed")
    check_values(case, case.inputs(torch.bfloat16, device))


@pytest.mark.parametrize("case", [Case(), Case(options={"transposed": True}, biases=True), MODELS[2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_others(case, dtype, device):
    """The same bits alone, among a few, and among many; on CUDA few have kernels of their own."""
    case = Case(**{**vars(case), "tokens": 200, "hidden": 300, "intermediate": 70})
    tensors = case.inputs(dtype, device)
    whole = case.run(inlay, tensors)
    for count in (1, 2, 3, 5, 20, 90):
        few = {name: t[:count] if t.shape[:1] == (200,) else t for name, t in tensors.items()}
        y = case.run(inlay, few)
        if device == "cuda" and few["indices"].numel() <= _FEW_CHOICES:
            torch.testing.assert_close(y, whole[:count])
            alone = {name: t[:1] if t.shape[:1] == (count,) else t for name, t in few.items()}
            assert_same_bits(case.run(inlay, alone), y[:1], f"y of 1 and {count}")
        else:
            assert_same_bits(y, whole[:count], f"y of {count}")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_index_dtypes(index_dtype, device):
    case = Case()
    tensors = case.inputs(torch.float32, device)
    expected = case.run(inlay, tensors)
    tensors["indices"] = tensors["indices"].to(index_dtype)
    assert_same_bits(case.run(inlay, tensors), expected, "y")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_tokens_stay_among_themselves(value, device):
    case = Case(tokens=50, shared=True)
    tensors = case.inputs(torch.float32, device)
    tensors["x"][[3, 20]] = value
    same_non_finite(case, tensors)
    clean = torch.ones(50, dtype=torch.bool)
    clean[[3, 20]] = False
    assert case.run(inlay, tensors)[clean].isfinite().all()


def test_an_expert_that_nobody_chose_may_hold_anything(device):
    case = Case(routing="half_unused")
    tensors = case.inputs(torch.float32, device)
    expected = case.run(inlay, tensors)
    for name in ("gate_up_proj", "down_proj"):
        tensors[name][:3] = torch.nan
    assert_same_bits(case.run(inlay, tensors), expected, "y")


@pytest.mark.parametrize("case", [Case(biases=True), Case(options={"gated": False}), MODELS[2]], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_permuted(case, weighted, dtype, device):
    """Rows sorted by expert, some experts without any, and rows of no expert at the end."""
    tensors = case.inputs(dtype, device)
    x = tensors["x"]
    ends = torch.tensor([5, 5, 12, 20, 30, 33], device=device)
    options = {name: t for name, t in tensors.items() if name.endswith("bias")} | dict(case.options)
    if weighted:
        options["weights"] = tensors["weights"][:, 0].clone()
    arguments = x, ends, tensors["gate_up_proj"], tensors["down_proj"]
    actual = inlay.moe_experts_permuted(*arguments, **options)
    exact = reference.moe_experts_permuted(
        *(t.double() if t.is_floating_point() else t for t in arguments),
        **{name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()},
    )
    assert_within_budget(actual, reference.moe_experts_permuted(*arguments, **options), exact, "y")
    assert (actual[33:] == 0).all()
    assert (actual[:33] != 0).any(-1).all()
