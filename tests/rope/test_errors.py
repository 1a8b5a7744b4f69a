"""Is every bad input refused with its argument's name, by the public function and again by the raw ops?"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import inlay


def good() -> dict[str, Any]:
    return {
        "q": torch.ones(2, 6, 3, 8),
        "k": torch.ones(2, 6, 1, 8),
        "cos": torch.ones(2, 6, 8),
        "sin": torch.ones(2, 6, 8),
        "q_weight": torch.ones(8),
        "k_weight": torch.ones(8),
    }


BAD_Q = [
    ([1.0], TypeError, "must be a Tensor, got list"),
    (None, TypeError, "must be a Tensor, got NoneType"),
    (torch.ones(2, 6, 3, 8, dtype=torch.int32), ValueError, "must be float32 or bfloat16 or float16 or float64 on cpu"),
    (torch.ones(2, 6, 24), ValueError, r"must have shape \[B, S, H, D\], got \[2, 6, 24\]"),
    (torch.ones(2, 6, 3, 16)[..., ::2], ValueError, "must have stride 1 in its last dimension"),
]
BAD_K = [
    ([1.0], TypeError, "must be a Tensor, got list"),
    (torch.ones(2, 6, 1, 8).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    (torch.ones(2, 6, 1, 8, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    (torch.ones(2, 5, 1, 8), ValueError, r"must have shape \[2, 6, H, 8\] as q has, got \[2, 5, 1, 8\]"),
    (torch.ones(1, 6, 1, 8), ValueError, r"must have shape \[2, 6, H, 8\] as q has"),
    (torch.ones(2, 6, 1, 16), ValueError, r"must have shape \[2, 6, H, 8\] as q has"),
    (torch.ones(2, 6, 8), ValueError, r"must have shape \[2, 6, H, 8\] as q has"),
    (torch.ones(2, 6, 1, 16)[..., ::2], ValueError, "must have stride 1 in its last dimension"),
]
BAD_ANGLES = [
    ([1.0], TypeError, "must be a Tensor, got list"),
    (torch.ones(2, 6, 8).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    (torch.ones(2, 6, 8).double(), ValueError, r"must be float32, got torch\.float64"),
    (torch.ones(2, 6, 8, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    (torch.ones(2, 5, 8), ValueError, r"must have shape \[2 or 1, 6, .*got \[2, 5, 8\]"),
    (torch.ones(3, 6, 8), ValueError, r"must have shape \[2 or 1, 6, .*got \[3, 6, 8\]"),
    (torch.ones(8), ValueError, r"must have shape \[2 or 1, 6, .*got \[8\]"),
    (torch.ones(2, 1, 6, 8), ValueError, r"must have shape \[2 or 1, 6, .*got \[2, 1, 6, 8\]"),
    (torch.ones(2, 6, 16)[..., ::2], ValueError, "must have stride 1 in its last dimension"),
]
BAD_WEIGHTS = [
    ("ones", TypeError, "must be a Tensor or None, got str"),
    (torch.ones(7), ValueError, r"must have shape \[8\] \([qk]'s width\), got \[7\]"),
    (torch.ones(8, dtype=torch.int32), ValueError, r"must be .*, got torch\.int32"),
    (torch.ones(8).double(), ValueError, r"must be .* for torch\.float32 [qk], got torch\.float64"),
    (torch.ones(8, device="meta"), ValueError, "must be on [qk]'s device cpu, got meta"),
    (torch.ones(16)[::2], ValueError, "must have stride 1"),
]
BAD_OPTIONS = [
    ("rounding", "twice", "must be one of 'once', 'stepwise', got 'twice'"),
    ("rotary_rounding", None, "must be one of 'once', 'stepwise', got None"),
    ("rotary_dim", 7, "must be an even number up to q's width 8, got 7"),
    ("rotary_dim", 10, "must be an even number up to q's width 8, got 10"),
    ("rotary_dim", -2, "must be an even number up to q's width 8, got -2"),
    ("rotary_dim", "all", "must be an even number up to q's width 8, got all"),
]
CASES = [
    *[("q", *case) for case in BAD_Q],
    *[("k", *case) for case in BAD_K],
    *[(name, *case) for name in ("cos", "sin") for case in BAD_ANGLES],
    *[(name, *case) for name in ("q_weight", "k_weight") for case in BAD_WEIGHTS],
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("argument", "value", "error", "message"), CASES)
def test_bad_tensors(argument, value, error, message, requires_grad):
    arguments = good() | {argument: value}
    if requires_grad and argument != "q":
        arguments["q"].requires_grad_()
    with pytest.raises(error, match=f"^qk_norm_rope: {argument} {message}"):
        inlay.qk_norm_rope(**arguments)


@pytest.mark.parametrize(("argument", "value", "message"), BAD_OPTIONS)
def test_bad_options(argument, value, message):
    with pytest.raises(ValueError, match=f"^qk_norm_rope: {argument} {message}"):
        inlay.qk_norm_rope(**good(), **{argument: value})


def test_sin_must_be_as_cos():
    for sin in (torch.ones(2, 6, 4), torch.ones(2, 6, 6)):
        with pytest.raises(ValueError, match=r"^qk_norm_rope: sin must have shape"):
            inlay.qk_norm_rope(**good() | {"sin": sin})
    halves = {name: t.bfloat16() for name, t in good().items()}
    with pytest.raises(ValueError, match=r"^qk_norm_rope: sin must be float32, got torch\.bfloat16"):
        inlay.qk_norm_rope(**halves | {"cos": torch.ones(2, 6, 8)})


def test_angles_of_too_few_channels():
    with pytest.raises(ValueError, match=r"^qk_norm_rope: cos must have shape \[2 or 1, 6, 8 or 4\]"):
        inlay.qk_norm_rope(**good() | {"cos": torch.ones(2, 6, 6), "sin": torch.ones(2, 6, 6)}, rotary_dim=8)
    with pytest.raises(ValueError, match=r"^qk_norm_rope: rotary_dim must be an even number up to q's width 8, got 5"):
        inlay.qk_norm_rope(**good() | {"cos": torch.ones(2, 6, 5), "sin": torch.ones(2, 6, 5)})
    with pytest.raises(ValueError, match=r"^qk_norm_rope: rotary_dim must be an even number up to q's width 8, got 16"):
        inlay.qk_norm_rope(**good() | {"cos": torch.ones(2, 6, 16), "sin": torch.ones(2, 6, 16)})


@pytest.mark.parametrize(("missing", "got"), [("q_weight", "a tensor"), ("k_weight", "None")])
def test_weights_come_together(missing, got):
    message = f"^qk_norm_rope: k_weight must be given exactly when q_weight is, got {got}"
    with pytest.raises(ValueError, match=message):
        inlay.qk_norm_rope(**good() | {missing: None})


@pytest.mark.cuda
def test_float64_on_cuda():
    with pytest.raises(ValueError, match=r"^qk_norm_rope: q must be float32 or bfloat16 or float16 on cuda"):
        inlay.qk_norm_rope(**{name: t.double().cuda() for name, t in good().items()})


RAW = [
    ({"q": torch.ones(2, 6, 24)}, "q must have 4 dimensions (batch, tokens, heads, width), got 3"),
    ({"k": torch.ones(2, 6, 8)}, "k must have 4 dimensions (batch, tokens, heads, width), got 3"),
    ({"k": torch.ones(2, 5, 1, 8)}, "k must have shape [2, 6, 1, 8] (q's batch, tokens, heads, q's width), got [2, 5"),
    ({"k": torch.ones(2, 6, 1, 8).half()}, "k must be float32, got float16"),
    ({"cos": torch.ones(2, 6, 8).half()}, "cos must be float32, got float16"),
    ({"sin": torch.ones(2, 6, 8).half()}, "sin must be float32, got float16"),
    ({"cos": torch.ones(3, 6, 8)}, "cos must have shape [2, 6, 8] (q's batch or 1, tokens, angles), got [3, 6, 8]"),
    ({"sin": torch.ones(5, 8)}, "sin must have shape [6, 8] (tokens, angles), got [5, 8]"),
    ({"sin": torch.ones(2, 6, 4)}, "sin must have shape [2, 6, 8]"),
    ({"sin": torch.ones(2, 6, 16)[..., ::2]}, "sin must have stride 1 in its last dimension"),
    ({"q": torch.ones(2, 6, 3, 16)[..., ::2]}, "q must have stride 1 in its last dimension"),
    ({"q_weight": None}, "k_weight must be given exactly when q_weight is, got a tensor"),
    ({"k_weight": None}, "k_weight must be given exactly when q_weight is, got None"),
    ({"q_weight": torch.ones(4)}, "q_weight must have shape [8] (q's width), got [4]"),
    ({"k_weight": torch.ones(8).double()}, "k_weight must be float64 exactly when k is, got float64 with float32"),
    ({"rotary_dim": 3}, "rotary_dim must be even and at most 8 (q's width), got 3"),
    ({"rotary_dim": 10}, "rotary_dim must be even and at most 8 (q's width), got 10"),
    ({"rotary_dim": 4}, "cos must have shape [2, 6, 2]"),
]
OPTIONS = {"rotary_dim": 8, "eps": 1e-6, "weight_offset": 0.0}


@pytest.mark.parametrize(("bad", "message"), RAW)
def test_raw_forward(bad, message):
    arguments = {**good(), **OPTIONS, **bad}
    with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {re.escape(message)}"):
        torch.ops.inlay.qk_norm_rope(*arguments.values(), 0, 0, False)


@pytest.mark.parametrize("rounding", [(2, 0), (-1, 0), (0, 2)])
def test_raw_roundings(rounding):
    name = "rounding" if rounding[0] else "rotary_rounding"
    with pytest.raises(RuntimeError, match=f"^qk_norm_rope: {name} must be 0 to 1, got {max(rounding, key=abs)}"):
        torch.ops.inlay.qk_norm_rope(*good().values(), *OPTIONS.values(), *rounding, False)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *RAW,
        ({"dq_out": torch.ones(2, 6, 1, 8)}, "dq_out must have q's shape [2, 6, 3, 8], got [2, 6, 1, 8]"),
        ({"dk_out": torch.ones(2, 6, 1, 8).half()}, "dk_out must be float32, got float16"),
        ({"dk_out": torch.ones(2, 6, 1, 16)[..., ::2]}, "dk_out must have stride 1 in its last dimension"),
        (
            {"q_weight": None, "k_weight": None},
            "q_weight must be given when its gradient is wanted, got None",
        ),
    ],
)
def test_raw_backward(bad, message):
    gradients = {"dq_out": torch.ones(2, 6, 3, 8), "dk_out": torch.ones(2, 6, 1, 8)}
    arguments = {**gradients, **good(), **OPTIONS, **bad}
    with pytest.raises(RuntimeError, match=f"^qk_norm_rope_bwd: {re.escape(message)}"):
        torch.ops.inlay.qk_norm_rope_bwd(*arguments.values(), False, True, True)
