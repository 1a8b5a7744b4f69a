"""Is every bad input refused with its argument's name, by the public function and again by the raw op?"""

from __future__ import annotations

import pytest
import torch

import inlay

# A tensor argument made wrong, the exception, and its text after "<op>: <argument> ".
BAD_X = [
    ([1.0, 2.0], TypeError, "must be a Tensor, got list"),
    (torch.ones(4, 8, dtype=torch.int64), ValueError, "must be float32 or bfloat16 or float16 or float64 on cpu"),
    (torch.ones(4, 8, dtype=torch.complex64), ValueError, r"got torch\.complex64"),
    (torch.tensor(1.0), ValueError, "must have at least one dimension, got a scalar"),
    (torch.ones(8, 4).t(), ValueError, r"must have stride 1 in its last dimension, got strides \[1, 4\]"),
]
BAD_LIKE = [
    (None, TypeError, "must be a Tensor, got NoneType"),
    (torch.ones(4, 7), ValueError, r"must have x's shape \[4, 8\], got \[4, 7\]"),
    (torch.ones(8), ValueError, r"must have x's shape \[4, 8\], got \[8\]"),
    (torch.ones(4, 8, dtype=torch.float16), ValueError, r"must be float32.*, got torch\.float16"),
    (torch.ones(4, 8, device="meta"), ValueError, "must be on x's device cpu, got meta"),
    (torch.ones(8, 4).t(), ValueError, "must have stride 1 in its last dimension"),
]
BAD_VECTOR = [
    ("ones", TypeError, "must be a Tensor or None, got str"),
    (torch.ones(7), ValueError, r"must have shape \[8\] \(x's width\), got \[7\]"),
    (torch.ones(1, 8), ValueError, r"must have shape \[8\] \(x's width\), got \[1, 8\]"),
    (torch.ones(8, dtype=torch.float64), ValueError, r"for torch\.float32 x, got torch\.float64"),
    (torch.ones(8, dtype=torch.int32), ValueError, r"got torch\.int32"),
    (torch.ones(8, device="meta"), ValueError, "must be on x's device cpu, got meta"),
    (torch.ones(16)[::2], ValueError, r"must have stride 1 in its last dimension, got strides \[2\]"),
]
FUNCTIONS = {
    inlay.rms_norm: ("weight", "bias"),
    inlay.layer_norm: ("weight", "bias"),
    inlay.l2_norm: (),
    inlay.add_rms_norm: ("residual", "weight", "bias"),
    inlay.gated_rms_norm: ("gate", "weight", "bias"),
}


def arguments(function) -> dict[str, torch.Tensor]:
    shapes = {"weight": (8,), "bias": (8,)}
    return {name: torch.randn(shapes.get(name, (4, 8))) for name in ("x", *FUNCTIONS[function])}


def public_cases():
    for function, names in FUNCTIONS.items():
        for name in ("x", *names):
            for bad in {"x": BAD_X, "residual": BAD_LIKE, "gate": BAD_LIKE}.get(name, BAD_VECTOR):
                yield pytest.param(function, name, *bad, id=f"{function.__name__}-{name}-{bad[2][:40]}")


@pytest.mark.parametrize(("function", "name", "value", "error", "text"), public_cases())
def test_public_functions(function, name, value, error, text):
    with pytest.raises(error, match=rf"^{function.__name__}: {name} .*{text}"):
        function(**{**arguments(function), name: value})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_four_strides(function):
    x = torch.randn(2, 3, 4, 5, 8).permute(3, 2, 1, 0, 4)
    rows = {name: x for name, tensor in arguments(function).items() if tensor.dim() == 2}
    with pytest.raises(ValueError, match=r"x must have leading dimensions that merge into at most 3, .*contiguous\(\)"):
        function(**{**arguments(function), **rows})


@pytest.mark.parametrize(
    ("function", "name", "value", "text"),
    [
        (inlay.rms_norm, "rounding", "never", "must be one of 'once', 'stepwise', got 'never'"),
        (inlay.add_rms_norm, "rounding", None, "must be one of 'once', 'stepwise', got None"),
        (inlay.gated_rms_norm, "activation", "relu", "must be one of 'silu', 'sigmoid', got 'relu'"),
        (inlay.add_rms_norm, "residual_dtype", torch.float16, "must be float32.*, got torch.float16"),
    ],
)
def test_options(function, name, value, text):
    with pytest.raises(ValueError, match=f"^{function.__name__}: {name} {text}"):
        function(**arguments(function), **{name: value})


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["weight", "residual"])
def test_tensors_on_two_devices(name):
    tensors = {**arguments(inlay.add_rms_norm), "x": torch.randn(4, 8, device="cuda")}
    tensors = {key: value if key == name else value.cuda() for key, value in tensors.items()}
    with pytest.raises(ValueError, match=f"{name} must be on x's device cuda:0, got cpu"):
        inlay.add_rms_norm(**tensors)


def test_meta_tensors_give_meta_results():
    x = torch.ones(4, 8, device="meta", dtype=torch.bfloat16)
    y, residual = inlay.add_rms_norm(x, x.float(), rounding="once")
    assert y.device.type == "meta"
    assert (y.shape, y.dtype, residual.dtype) == (x.shape, torch.bfloat16, torch.float32)


@pytest.mark.cuda
def test_float64_on_cuda():
    with pytest.raises(ValueError, match=r"x must be float32 or bfloat16 or float16 on cuda, got torch\.float64"):
        inlay.rms_norm(torch.randn(4, 8, dtype=torch.float64, device="cuda"))


# The raw ops: a safety net for whoever calls them past the public functions.
FORWARD = {
    "x": torch.randn(4, 8), "weight": torch.randn(8), "bias": torch.randn(8), "gate": torch.randn(4, 8), "eps": 1e-6,
    "weight_offset": 0.0, "kind": 0, "rounding": 0, "activation": 0, "gate_first": False,
}  # fmt: skip
ADD = {name: value for name, value in FORWARD.items() if name not in ("gate", "activation", "gate_first")} | {
    "residual": torch.randn(4, 8),
    "residual_dtype": torch.float32,
}
BACKWARD = {
    "dy": torch.randn(4, 8), "dresidual_out": None, "x": torch.randn(4, 8), "stats": torch.ones(1, 4),
    "weight": torch.randn(8), "bias": torch.randn(8), "gate": None, "weight_offset": 0.0, "kind": 0, "activation": 0,
    "gate_first": False, "x_dtype": torch.float32, "residual_dtype": torch.float32, "needs_dweight": True,
    "needs_dbias": True,
}  # fmt: skip

RAW = [
    ("norm", FORWARD, {"x": torch.ones(4, 8, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64"),
    ("norm", FORWARD, {"x": torch.tensor(1.0)}, "x must have 1 to 16 dimensions, got 0"),
    ("norm", FORWARD, {"x": torch.ones(8, 4).t()}, "x must have stride 1 in its last dimension"),
    ("norm", FORWARD, {"x": torch.randn(2, 3, 4, 5, 8).permute(3, 2, 1, 0, 4)}, "x must have leading dimensions that"),
    ("norm", FORWARD, {"weight": torch.ones(7)}, r"weight must have shape \[8\] \(x's width\), got \[7\]"),
    ("norm", FORWARD, {"weight": torch.ones(8).double()}, "weight must be float64 exactly when x is"),
    ("norm", FORWARD, {"weight": torch.ones(16)[::2]}, "weight must have stride 1"),
    ("norm", FORWARD, {"bias": torch.ones(2, 8)}, r"bias must have shape \[8\]"),
    ("norm", FORWARD, {"gate": torch.ones(4, 7)}, r"gate must have x's shape \[4, 8\], got \[4, 7\]"),
    ("norm", FORWARD, {"gate": torch.ones(4, 8).half()}, "gate must be float32, got float16"),
    ("norm", FORWARD, {"kind": 3}, "kind must be 0 to 2, got 3"),
    ("norm_fwd", FORWARD, {"rounding": -1}, "rounding must be 0 to 1, got -1"),
    ("norm_fwd", FORWARD, {"activation": 2}, "activation must be 0 to 1, got 2"),
    ("add_norm", ADD, {"residual": torch.ones(4, 8).half()}, "residual must be float32.*, got float16"),
    ("add_norm", ADD, {"residual": torch.ones(5, 8)}, r"residual must have x's shape \[4, 8\], got \[5, 8\]"),
    ("add_norm_fwd", ADD, {"residual_dtype": torch.float16}, "residual_dtype must be float32.*, got float16"),
    ("add_norm_fwd", ADD, {"residual_dtype": torch.int8}, "residual_dtype must be float32"),
    ("norm_bwd", BACKWARD, {"dy": torch.ones(4, 7)}, r"dy must have x's shape \[4, 8\], got \[4, 7\]"),
    ("norm_bwd", BACKWARD, {"dy": torch.ones(4, 8).half()}, "dy must be float32.*, got float16"),
    ("norm_bwd", BACKWARD, {"dy": torch.ones(8, 4).t()}, "dy must have stride 1"),
    ("norm_bwd", BACKWARD, {"dresidual_out": torch.ones(3, 8)}, "dresidual_out must have x's shape"),
    ("norm_bwd", BACKWARD, {"stats": torch.ones(1, 3)}, r"stats must have shape \[1, 4\], got \[1, 3\]"),
    ("norm_bwd", BACKWARD, {"kind": 1}, r"stats must have shape \[2, 4\], got \[1, 4\]"),
    ("norm_bwd", BACKWARD, {"stats": torch.ones(1, 4).half()}, "stats must be float32, got float16"),
    ("norm_bwd", BACKWARD, {"stats": torch.ones(1, 8)[:, ::2]}, "stats must be contiguous"),
    ("norm_bwd", BACKWARD, {"x_dtype": torch.float64}, "x must be float64 or float32, got float32"),
    ("norm_bwd", BACKWARD, {"residual_dtype": torch.bfloat16}, "residual_dtype must be float32"),
    ("norm_bwd", BACKWARD, {"weight": None}, "weight must be given when its gradient is wanted, got None"),
    ("norm_bwd", BACKWARD, {"bias": None}, "bias must be given when its gradient is wanted, got None"),
    (
        "norm_bwd",
        BACKWARD,
        {"gate": torch.ones(4, 8), "dresidual_out": torch.ones(4, 8)},
        "gate must be None when there",
    ),
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


@pytest.mark.parametrize(("op", "good"), [("norm", FORWARD), ("add_norm", ADD), ("norm_bwd", BACKWARD)])
def test_raw_ops_refuse_what_is_no_tensor(op, good):
    with pytest.raises(RuntimeError, match="x"):
        getattr(torch.ops.inlay, op)(**{**good, "x": "rows"})


@pytest.mark.cuda
def test_raw_ops_refuse_two_devices():
    tensors = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in FORWARD.items()}
    with pytest.raises(RuntimeError, match="norm: weight must be on x's device"):
        torch.ops.inlay.norm(**{**tensors, "weight": torch.ones(8)})
