"""Is every bad input refused with its argument's name, by the public functions and again by the raw ops?"""

from __future__ import annotations

import re

import pytest
import torch

import inlay
from tests.moe.cases import Case

META = torch.device("meta")
BAD_EXPERTS = [
    ("x", [1.0], TypeError, "x must be a Tensor, got list"),
    (
        "x", torch.ones(4, 8, dtype=torch.int32), ValueError,
        "x must be float32 or bfloat16 or float16 or float64 on cpu",
    ),
    ("x", torch.ones(2, 4, 8), ValueError, "x must have 2 dimensions (tokens, hidden), got 3"),
    ("x", torch.ones(4, 9), ValueError, "gate_up_proj must have shape [3, 12, 9] ([E, out, in]), got [3, 12, 8]"),
    ("x", torch.ones(4, 8, dtype=torch.bfloat16), ValueError, "gate_up_proj must be bfloat16, got torch.float32"),
    ("indices", None, TypeError, "indices must be a Tensor, got NoneType"),
    ("indices", torch.zeros(4, 2), ValueError, "indices must be int32 or int64, got torch.float32"),
    ("indices", torch.zeros(5, 2, dtype=torch.int64), ValueError, "indices must have shape [4, K], got [5, 2]"),
    ("indices", torch.zeros(4, dtype=torch.int64), ValueError, "indices must have shape [4, K], got [4]"),
    ("indices", torch.full((4, 2), 4), ValueError, "indices must be from 0 to 3 (for no expert), got 4"),
    ("indices", torch.full((4, 2), -1), ValueError, "indices must be from 0 to 3 (for no expert), got -1"),
    ("indices", torch.full((4, 2), 2**40), ValueError, "indices must be from 0 to 3"),
    ("indices", torch.zeros(4, 2, dtype=torch.int64, device=META), ValueError, "indices must be on x's device cpu"),
    ("weights", torch.ones(4, 3), ValueError, "weights must have shape [4, 2] (indices's shape), got [4, 3]"),
    ("weights", torch.ones(4, 2, dtype=torch.float16), ValueError, "weights must be float32, got torch.float16"),
    ("weights", torch.ones(4, 2, device=META), ValueError, "weights must be on x's device cpu, got meta"),
    ("gate_up_proj", torch.ones(3, 8, 12), ValueError, "gate_up_proj must have shape [3, 12, 8]"),
    ("gate_up_proj", torch.ones(12, 8), ValueError, "gate_up_proj must have 3 dimensions (experts first), got 2"),
    (
        "gate_up_proj", torch.ones(3, 8, 12).mT, ValueError,
        "must have stride 1 in its last dimension, got strides [96, 1, 12]",
    ),
    ("gate_up_proj", "w", TypeError, "gate_up_proj must be a Tensor, got str"),
    ("down_proj", torch.ones(2, 8, 6), ValueError, "gate_up_proj must have shape [2, 12, 8]"),
    ("down_proj", torch.ones(3, 9, 6), ValueError, "down_proj must have shape [3, 8, 6]"),
    ("down_proj", torch.ones(3, 8, 0), ValueError, "must not be empty in H or I, got 8 and 0"),
    (
        "gate_up_bias", torch.ones(3, 6), ValueError,
        "gate_up_bias must have shape [3, 12] (experts, outputs), got [3, 6]",
    ),
    ("down_bias", torch.ones(3, 8, dtype=torch.float64), ValueError, "down_bias must be float32, got torch.float64"),
    (
        "activation", "swish", ValueError,
        "activation must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'gpt_oss'",
    ),
    ("limit", -1.0, ValueError, "limit must be above 0 or None, got -1.0"),
    ("limit", "7", TypeError, "limit must be a number, got str"),
    ("shared", torch.ones(4, 9), ValueError, "shared must have shape [4, 8] (x's shape), got [4, 9]"),
    ("shared", torch.ones(4, 8).half(), ValueError, "shared must be float32, got torch.float16"),
    ("shared_gate", torch.ones(4), ValueError, "shared must be given with shared_gate, got None"),
    ("num_experts", 6, ValueError, "num_experts must be 3, the number of experts in gate_up_proj, got 6"),
    ("num_experts", 3.0, TypeError, "num_experts must be an int or None, got float"),
]  # fmt: skip


def _arguments() -> dict:
    return Case(tokens=4, hidden=8, intermediate=6, experts=3).inputs(torch.float32)


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_EXPERTS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("grad", [False, True])
def test_experts(name, value, error, message, grad):
    arguments = _arguments()
    arguments["down_proj"].requires_grad_(grad)
    arguments[name] = value
    with pytest.raises(error, match=f"^moe_experts: .*{re.escape(message)}"):
        inlay.moe_experts(**arguments)


def test_the_right_number_of_experts_changes_nothing():
    arguments = _arguments()
    arguments["indices"][0, 0] = 3  # no expert
    for module in (inlay, inlay.reference):
        expected = module.moe_experts(**arguments)
        assert torch.equal(module.moe_experts(**arguments, num_experts=3), expected)
    with pytest.raises(ValueError, match="num_experts must be 3, got 2"):
        inlay.reference.moe_experts(**arguments, num_experts=2)


def test_experts_options_that_contradict_each_other():
    arguments = Case(tokens=4, options={"gated": False}).inputs(torch.float32)
    with pytest.raises(ValueError, match="gated must be True with activation 'gpt_oss'"):
        inlay.moe_experts(**arguments, activation="gpt_oss", gated=False)
    arguments = _arguments()
    with pytest.raises(ValueError, match=re.escape("shared_gate must have shape [4] or [4, 1], got [4, 2]")):
        inlay.moe_experts(**arguments, shared=torch.ones(4, 8), shared_gate=torch.ones(4, 2))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([1, 2]), "ends must have shape [3] (experts), got [2]"),
        (torch.tensor([1.0, 2.0, 3.0]), "ends must be int32 or int64"),
        (torch.tensor([1, 2, 5]), "ends must be from 0 to 4 (rows of x), not decreasing, got [1, 2, 5]"),
        (torch.tensor([3, 2, 4]), "ends must be from 0 to 4 (rows of x), not decreasing, got [3, 2, 4]"),
        (torch.tensor([-1, 2, 4]), "ends must be from 0 to 4 (rows of x), not decreasing"),
    ],
    ids=str,
)
def test_ends(ends, message):
    t = _arguments()
    with pytest.raises(ValueError, match=f"^moe_experts_permuted: {re.escape(message)}"):
        inlay.moe_experts_permuted(t["x"], ends, t["gate_up_proj"], t["down_proj"])


BAD_ROUTERS = [
    ({"logits": [1.0]}, TypeError, "logits must be a Tensor, got list"),
    ({"logits": torch.ones(2, 3, 8)}, ValueError, "logits must have 2 dimensions (tokens, experts), got 3"),
    ({"logits": torch.ones(2, 8, dtype=torch.int64)}, ValueError, "logits must be float32 or bfloat16"),
    ({"logits": torch.ones(2, 0)}, ValueError, "logits must have 1 to 1024 columns (experts), got 0"),
    ({"logits": torch.ones(2, 1025)}, ValueError, "logits must have 1 to 1024 columns (experts), got 1025"),
    ({"k": 0}, ValueError, "k must be 1 to 8, got 0"),
    ({"k": 9}, ValueError, "k must be 1 to 8, got 9"),
    ({"k": 33, "logits": torch.ones(2, 64)}, ValueError, "k must be 1 to 32, got 33"),
    ({"k": 2.0}, TypeError, "k must be an int, got float"),
    ({"scoring": "tanh"}, ValueError, "scoring must be one of 'softmax', 'sigmoid', got 'tanh'"),
    (
        {"scoring": "sigmoid", "softmax_after_topk": True}, ValueError,
        "scoring must be 'softmax' with softmax_after_topk",
    ),
    ({"scaling": "x"}, TypeError, "scaling must be a number, got str"),
    ({"bias": torch.ones(7)}, ValueError, "bias must have shape [8] (experts), got [7]"),
    ({"bias": torch.ones(8).double()}, ValueError, "bias must be float32, got torch.float64"),
    ({"groups": (3, 1)}, ValueError, "groups must divide 8 experts into groups of two or more, got (3, 1)"),
    ({"groups": (8, 4)}, ValueError, "groups must divide 8 experts into groups of two or more, got (8, 4)"),
    ({"groups": (4, 5)}, ValueError, "groups must choose 1 to 4 that hold 2 experts, got (4, 5)"),
    ({"groups": (4, 1), "k": 3}, ValueError, "groups must choose 1 to 4 that hold 3 experts, got (4, 1)"),
    ({"groups": 4}, TypeError, "groups must be two ints"),
    (
        {"forced_indices": torch.zeros(4, 3, dtype=torch.int64)}, ValueError,
        "forced_indices must have shape [4, 2] (tokens, k)",
    ),
    ({"forced_indices": torch.full((4, 2), 8)}, ValueError, "forced_indices must be from 0 to 7, got 8"),
    ({"forced_indices": torch.full((4, 2), -1)}, ValueError, "forced_indices must be from 0 to 7, got -1"),
    (
        {"forced_indices": torch.zeros(4, 2, dtype=torch.int64), "groups": (4, 2)}, ValueError,
        "groups must be None with forced_indices",
    ),
    ({"mask": torch.ones(4)}, ValueError, "mask must be bool, got torch.float32"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask must have shape [4] (tokens), got [5]"),
    (
        {"weights_dtype": torch.int32}, ValueError,
        "weights_dtype must be float32 or bfloat16 or float16, got torch.int32",
    ),
    ({"weights_dtype": torch.float64}, ValueError, "weights_dtype must be float32 or bfloat16 or float16"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_ROUTERS, ids=lambda v: str(v)[:40])
def test_router(wrong, error, message):
    with pytest.raises(error, match=f"^moe_router: .*{re.escape(message)}"):
        inlay.moe_router(**{"logits": torch.randn(4, 8), "k": 2, **wrong})


RAW = [
    ("indices", torch.full((4, 2), 4), "indices must be from 0 to 3"),
    ("indices", torch.zeros(3, 2, dtype=torch.int64), "indices must have x's 4 rows, got 3"),
    ("weights", torch.ones(4, 3), "weights must have 8 elements, got 12"),
    ("gate_up_proj", torch.ones(3, 12, 9), "gate_up_proj must have shape [3, 12, 8]"),
    ("gate_up_proj", torch.ones(3, 8, 12).mT, "gate_up_proj must have stride 1 in its last dimension"),
    ("down_proj", torch.ones(3, 8, 6).half(), "down_proj must be float32, got float16"),
    ("x", torch.ones(4, 8, 1), "x must have 2 dimensions"),
]


@pytest.mark.parametrize(("name", "value", "message"), RAW, ids=lambda v: str(v)[:40])
def test_raw_experts(name, value, message):
    """Never an access out of bounds, however the op is called."""
    t = {**_arguments(), name: value}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.inlay.moe_experts(
            t["x"], t["indices"], t["weights"], None, t["gate_up_proj"], t["down_proj"], None, None, None, None, 0,
            True, False, False, torch.inf,
        )  # fmt: skip


def test_raw_rows_of_a_backward():
    """Rows that no forward has made."""
    t = _arguments()
    rows, ends = torch.arange(8, dtype=torch.int32), torch.tensor([2, 4, 8], dtype=torch.int32)

    def run(rows: torch.Tensor, ends: torch.Tensor) -> None:
        torch.ops.inlay.moe_experts_bwd(
            t["x"], t["x"], None, rows, ends, t["weights"], t["gate_up_proj"], t["down_proj"], None, None, None, None,
            2, 0, True, False, False, torch.inf, True, *[False] * 7,
        )  # fmt: skip

    run(rows, ends)
    for wrong in (rows + 1, rows - 1):
        with pytest.raises(RuntimeError, match="moe_experts_bwd: rows must be"):
            run(wrong, ends)
    for wrong in ([2, 4, 9], [4, 2, 8], [-1, 4, 8]):
        with pytest.raises(RuntimeError, match="moe_experts_bwd: ends must"):
            run(rows, torch.tensor(wrong, dtype=torch.int32))
