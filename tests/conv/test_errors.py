"""Is every bad input refused with its argument's name, by the public functions and again by the raw ops?"""

from __future__ import annotations

import re

import pytest
import torch

import inlay

BAD_X = [
    ([1.0, 2.0], TypeError, "must be a Tensor, got list"),
    (torch.ones(2, 6, 8, dtype=torch.int64), ValueError, "must be float32 or bfloat16 or float16 or float64 on cpu"),
    (torch.ones(2, 3, 6, 8), ValueError, r"must have shape \[B, T, C\]"),
]
BAD_WEIGHT = [
    (None, TypeError, "must be a Tensor, got NoneType"),
    (torch.ones(7, 4), ValueError, r"must have shape \[8, W\] or \[8, 1, W\] \(x's channels\), got \[7, 4\]"),
    (torch.ones(8, 2, 4), ValueError, r"must have shape \[8, W\] or \[8, 1, W\]"),
    (torch.ones(8), ValueError, r"must have shape \[8, W\] or \[8, 1, W\]"),
    (torch.ones(8, 1), ValueError, "must be 2 to 8 wide, got 1"),
    (torch.ones(8, 9), ValueError, "must be 2 to 8 wide, got 9"),
    (torch.ones(8, 4, dtype=torch.float64), ValueError, r"for torch\.float32 x, got torch\.float64"),
    (torch.ones(8, 4, device="meta"), ValueError, "must be on x's device cpu, got meta"),
    (torch.ones(4, 8).t(), ValueError, r"must be contiguous, got strides \[1, 8\]"),
    (torch.ones(8, 8)[:, ::2], ValueError, "must be contiguous"),
]
BAD_BIAS = [
    ("ones", TypeError, "must be a Tensor or None, got str"),
    (torch.ones(7), ValueError, r"must have shape \[8\] \(x's width\), got \[7\]"),
    (torch.ones(8, dtype=torch.int32), ValueError, r"got torch\.int32"),
    (torch.ones(16)[::2], ValueError, "must have stride 1"),
]
BAD_STATE = [
    ([0.0], TypeError, "must be a Tensor, got list"),
    (torch.ones(2, 7, 3), ValueError, r"must have shape .*, got \[2, 7, 3\]"),
    (torch.ones(2, 8, 2), ValueError, r"must have shape .*, got \[2, 8, 2\]"),
    (torch.ones(2, 8, 3).bfloat16(), ValueError, r"must be float32 as x is, got torch\.bfloat16"),
    (torch.ones(2, 8, 3, device="meta"), ValueError, "must be on x's device cpu, got meta"),
]
BAD_ACTIVATION = [
    ("relu", ValueError, "must be one of None, 'silu', got 'relu'"),
    (["silu"], ValueError, r"must be one of None, 'silu', got \['silu'\]"),
]
BAD_INDICES = [
    ([0, 1], TypeError, "must be a Tensor or None, got list"),
    (torch.tensor([0.0, 1.0]), ValueError, r"must be int32 or int64, got torch\.float32"),
    (torch.tensor([[0, 1]]), ValueError, r"must have 1 dimension, got shape \[1, 2\]"),
    (torch.tensor([0, 1], device="meta"), ValueError, "must be on x's device cpu, got meta"),
    (torch.tensor([0, 1, 1, 2])[::2], ValueError, "must have stride 1"),
]
BAD_OFFSETS = [
    ([0, 6], TypeError, "must be a Tensor, got list"),
    (torch.tensor([0.0, 6.0]), ValueError, r"must be int32 or int64, got torch\.float32"),
    (torch.tensor([[0, 6]]), ValueError, r"must have shape \[N \+ 1\], got \[1, 2\]"),
    (torch.tensor([0, 1, 6, 6])[::2], ValueError, r"must be contiguous, got strides \[2\]"),
]
WRONG_OFFSETS = [[1, 6], [0, 5], [0, 7], [0, 4, 2, 6], [0, -(2**40), 6], [6]]


def convolution() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 6, 8), "weight": torch.randn(8, 4)}


def step() -> dict[str, torch.Tensor]:
    return {**convolution(), "state": torch.randn(2, 8, 4)}


CASES = {
    inlay.causal_conv1d: (
        convolution,
        {
            "x": [*BAD_X, (torch.ones(2, 8), ValueError, r"must have shape \[B, T, C\], got \[2, 8\]")],
            "weight": BAD_WEIGHT,
            "bias": BAD_BIAS,
            "activation": BAD_ACTIVATION,
            "initial_state": [
                *BAD_STATE,
                (torch.ones(3, 8, 3), ValueError, r"must have shape \[2, 8, 3\], got \[3, 8, 3\]"),
                (torch.ones(2, 8, 4), ValueError, r"must have shape \[2, 8, 3\], got \[2, 8, 4\]"),
            ],
            "cu_seqlens": BAD_OFFSETS,
        },
    ),
    inlay.causal_conv1d_step: (
        step,
        {
            "x": BAD_X,
            "weight": BAD_WEIGHT,
            "bias": BAD_BIAS,
            "activation": BAD_ACTIVATION,
            "state": [
                *BAD_STATE,
                (torch.ones(3, 8, 4), ValueError, "must have x's batch size 2, got 3"),
                (None, TypeError, "must be a Tensor, got NoneType"),
            ],
            "state_indices": [
                *BAD_INDICES,
                (torch.tensor([0]), ValueError, r"must have shape \[2\] \(x's batch size\), got \[1\]"),
            ],
        },
    ),
}


def public_cases():
    for function, (arguments, bad_values) in CASES.items():
        for name, values in bad_values.items():
            for bad in values:
                yield pytest.param(function, arguments, name, *bad, id=f"{function.__name__}-{name}-{bad[2][:40]}")


@pytest.mark.parametrize(("function", "arguments", "name", "value", "error", "text"), list(public_cases()))
def test_public_functions(function, arguments, name, value, error, text):
    with pytest.raises(error, match=rf"^{function.__name__}: {name} .*{text}"):
        function(**{**arguments(), name: value})


def test_no_dense_dimension():
    x = torch.randn(2, 6, 16)[..., ::2]
    with pytest.raises(ValueError, match=r"x must have stride 1 in its last dimension or in the one before it, "):
        inlay.causal_conv1d(x, torch.randn(8, 4))


def test_packed_batches():
    with pytest.raises(ValueError, match="x must have a batch of 1 with cu_seqlens, got 2"):
        inlay.causal_conv1d(**convolution(), cu_seqlens=torch.tensor([0, 6]))
    row = {**convolution(), "x": torch.randn(1, 6, 8)}
    with pytest.raises(ValueError, match="cu_seqlens must be on x's device cpu, got meta"):
        inlay.causal_conv1d(**row, cu_seqlens=torch.tensor([0, 6], device="meta"))
    with pytest.raises(ValueError, match="cu_seqlens must have at least 2 elements, got 1"):
        inlay.causal_conv1d(row["x"][:, :0], row["weight"], cu_seqlens=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"initial_state must have shape \[3, 8, 3\], got \[1, 8, 3\]"):
        inlay.causal_conv1d(**row, initial_state=torch.randn(1, 8, 3), cu_seqlens=torch.tensor([0, 1, 2, 6]))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("values", WRONG_OFFSETS, ids=str)
def test_values_of_boundaries_on_the_cpu(values, needs_grad):
    x, weight = torch.randn(1, 6, 8, requires_grad=needs_grad), torch.randn(8, 4)
    rule = "causal_conv1d: cu_seqlens must not decrease and lead from 0 to the number of tokens 6"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{rule}, got {values}')}$"):
        inlay.causal_conv1d(x, weight, cu_seqlens=torch.tensor(values))


def test_meta_tensors_give_meta_results():
    x = torch.ones(2, 6, 8, device="meta", dtype=torch.bfloat16)
    weight = torch.ones(8, 4, device="meta")
    y, state = inlay.causal_conv1d(x, weight, return_final_state=True)
    assert y.device.type == state.device.type == "meta"
    assert (y.shape, y.dtype, state.shape) == (x.shape, torch.bfloat16, (2, 8, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["weight", "bias", "initial_state", "cu_seqlens"])
def test_tensors_on_two_devices(name):
    tensors = {
        "x": torch.randn(1, 6, 8), "weight": torch.randn(8, 4), "bias": torch.randn(8),
        "initial_state": torch.randn(1, 8, 3), "cu_seqlens": torch.tensor([0, 6]),
    }  # fmt: skip
    tensors = {key: value if key == name else value.cuda() for key, value in tensors.items()}
    with pytest.raises(ValueError, match=f"{name} must be on x's device cuda:0, got cpu"):
        inlay.causal_conv1d(**tensors)


@pytest.mark.cuda
def test_float64_on_cuda():
    with pytest.raises(ValueError, match=r"x must be float32 or bfloat16 or float16 on cuda, got torch\.float64"):
        inlay.causal_conv1d(torch.randn(2, 6, 8, dtype=torch.float64, device="cuda"), torch.randn(8, 4, device="cuda"))


# The raw ops: a safety net for whoever calls them past the public functions.
FORWARD = {
    "x": torch.randn(2, 6, 8), "weight": torch.randn(8, 4), "bias": torch.randn(8),
    "initial_state": torch.randn(2, 8, 3), "cu_seqlens": None, "activation": 1, "wants_final_state": True,
}  # fmt: skip
BACKWARD = {name: value for name, value in FORWARD.items() if name != "wants_final_state"} | {
    "dy": torch.randn(2, 6, 8), "dfinal_state": torch.randn(2, 8, 3), "needs_dweight": True, "needs_dbias": True,
    "needs_dinitial_state": True,
}  # fmt: skip
STEP = {
    "x": torch.randn(2, 1, 8), "state": torch.randn(2, 8, 4), "weight": torch.randn(8, 4), "bias": torch.randn(8),
    "state_indices": torch.tensor([0, 1]), "activation": 1,
}  # fmt: skip
TOKENS_INNERMOST = torch.randn(2, 8, 6).transpose(1, 2)

RAW = [
    ("causal_conv1d", FORWARD, {"x": torch.ones(2, 6, 8, dtype=torch.int32)}, "x must be float32, bfloat16, float16"),
    ("causal_conv1d", FORWARD, {"x": torch.ones(6, 8)}, r"x must have shape \[B, T, C\], got \[6, 8\]"),
    ("causal_conv1d", FORWARD, {"x": torch.ones(2, 6, 16)[..., ::2]}, "x must have stride 1 in its last dimension or"),
    ("causal_conv1d", FORWARD, {"weight": torch.ones(7, 4)}, r"weight must have shape \[8, W\] or \[8, 1, W\]"),
    ("causal_conv1d", FORWARD, {"weight": torch.ones(8, 9)}, "weight must be 2 to 8 wide, got 9"),
    ("causal_conv1d", FORWARD, {"weight": torch.ones(8, 4).double()}, "weight must be float64 exactly when x is"),
    ("causal_conv1d", FORWARD, {"weight": torch.ones(4, 8).t()}, "weight must have stride 1"),
    ("causal_conv1d", FORWARD, {"weight": torch.ones(8, 8)[:, :4]}, "weight must be contiguous"),
    ("causal_conv1d", FORWARD, {"bias": torch.ones(7)}, r"bias must have shape \[8\]"),
    ("causal_conv1d", FORWARD, {"initial_state": torch.ones(2, 8, 4)}, r"initial_state must have shape \[2, 8, 3\]"),
    ("causal_conv1d", FORWARD, {"initial_state": torch.ones(2, 8, 3).half()}, "initial_state must be float32"),
    ("causal_conv1d", FORWARD, {"cu_seqlens": torch.tensor([0, 6])}, "x must have a batch of 1 with cu_seqlens"),
    ("causal_conv1d", FORWARD, {"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be int32 or int64"),
    ("causal_conv1d", FORWARD, {"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens must have 1 dimension, got 2"),
    ("causal_conv1d", FORWARD, {"cu_seqlens": torch.tensor([0, 1, 6])[::2]}, "cu_seqlens must have stride 1, got 2"),
    ("causal_conv1d", FORWARD, {"activation": 2}, "activation must be 0 to 1, got 2"),
    ("causal_conv1d_bwd", BACKWARD, {"dy": torch.ones(2, 6, 7)}, r"dy must have x's shape \[2, 6, 8\], got"),
    ("causal_conv1d_bwd", BACKWARD, {"dy": torch.ones(2, 6, 8).half()}, "dy must be float32, got float16"),
    ("causal_conv1d_bwd", BACKWARD, {"dy": TOKENS_INNERMOST}, "dy must have stride 1 in the dimension where x has it"),
    ("causal_conv1d_bwd", BACKWARD, {"x": TOKENS_INNERMOST}, "dy must have stride 1 in the dimension where x has it"),
    ("causal_conv1d_bwd", BACKWARD, {"dfinal_state": torch.ones(2, 8, 4)}, "dfinal_state must have shape"),
    ("causal_conv1d_bwd", BACKWARD, {"bias": None}, "bias must be given when its gradient is wanted"),
    ("causal_conv1d_bwd", BACKWARD, {"initial_state": None}, "initial_state must be given when its"),
    ("causal_conv1d_step", STEP, {"x": torch.ones(2, 1, 1, 8)}, r"x must have shape \[B, T, C\] or \[B, C\]"),
    ("causal_conv1d_step", STEP, {"state": torch.ones(2, 8, 2)}, r"state must have shape \[B, 8, L\] with L at"),
    ("causal_conv1d_step", STEP, {"state": torch.ones(2, 8, 4).half()}, "state must be float32, got float16"),
    ("causal_conv1d_step", STEP, {"state": torch.ones(3, 8, 4), "state_indices": None}, "state must have x's batch"),
    ("causal_conv1d_step", STEP, {"state_indices": torch.tensor([0])}, r"state_indices must have shape \[2\]"),
]


@pytest.mark.parametrize(
    ("op", "good", "bad", "text"), RAW, ids=lambda value: value if isinstance(value, str) else None
)
def test_raw_ops(op, good, bad, text, device):
    def on_device(value):
        if not isinstance(value, torch.Tensor):
            return value
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)  # .to() would lose the strides

    raw = getattr(torch.ops.inlay, op)
    good = {name: on_device(value) for name, value in good.items()}
    raw(**good)
    with pytest.raises(RuntimeError, match=rf"{op}: {text}"):
        raw(**{**good, **{name: on_device(value) for name, value in bad.items()}})


@pytest.mark.cuda
def test_raw_ops_refuse_two_devices():
    tensors = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in FORWARD.items()}
    with pytest.raises(RuntimeError, match="causal_conv1d: weight must be on x's device"):
        torch.ops.inlay.causal_conv1d(**{**tensors, "weight": torch.ones(8, 4)})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1, 6], "start with 0, got 1"),
        ([0, 4, 2, 6], "not decrease, got 2 after 4"),
        ([0, 7], "end with the number of tokens 6, got 7"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["causal_conv1d", "causal_conv1d_bwd"])
def test_raw_ops_look_at_boundaries_on_the_cpu(op, values, text):
    changes = {"x": torch.randn(1, 6, 8), "initial_state": None, "cu_seqlens": torch.tensor(values)}
    if op == "causal_conv1d":
        arguments = {**FORWARD, **changes}
    else:
        row = {"dy": torch.randn(1, 6, 8), "dfinal_state": None, "needs_dinitial_state": False}
        arguments = {**BACKWARD, **changes, **row}
    with pytest.raises(RuntimeError, match=f"{op}: cu_seqlens must {text}"):
        getattr(torch.ops.inlay, op)(**arguments)
