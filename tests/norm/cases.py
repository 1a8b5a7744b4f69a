"""Every way to call the norm family's public functions: which tensors, in which dtypes, with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay import reference
from inlay.reference.norm import default_eps
from tests.support.compare import assert_within_budget
from tests.support.devices import short_name

Tensors = dict[str, Tensor]
X = "x's dtype"
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A public function with its optional tensors' dtypes (None: not given) and its keyword options."""

    function: str
    weight: torch.dtype | str | None = X
    bias: torch.dtype | str | None = None
    residual: torch.dtype | str | None = None
    gate: torch.dtype | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "residual")}
        parts = [f"{name}_{'x' if dtype == X else short_name(dtype)}" for name, dtype in tensors.items() if dtype]
        values = ("x" if value == X else str(value).removeprefix("torch.") for value in self.options.values())
        return "-".join(
            [self.function, *parts, *(f"{name}_{value}" for name, value in zip(self.options, values, strict=True))]
        )

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensors:
        """Random tensors; float64 x takes float64 everywhere."""

        def resolve(given: torch.dtype | str) -> torch.dtype:
            return dtype if given == X or dtype == torch.float64 else given

        def normal(sizes: tuple[int, ...], given: torch.dtype | str) -> Tensor:
            return torch.randn(sizes, device=device).to(resolve(given))

        tensors = {"x": normal(shape, X)}
        if self.residual:
            tensors["residual"] = normal(shape, self.residual)
        if self.gate:
            tensors["gate"] = normal(shape, self.gate)
        if self.weight:
            centre = 1.0 - self.options.get("weight_offset", 0.0)
            tensors["weight"] = centre + 0.2 * normal(shape[-1:], self.weight)
        if self.bias:
            tensors["bias"] = 0.2 * normal(shape[-1:], self.bias)
        return tensors

    def run(self, namespace: ModuleType, tensors: Tensors) -> tuple[Tensor, ...]:
        options, dtype = dict(self.options), tensors["x"].dtype
        if "residual_dtype" in options and (options["residual_dtype"] == X or dtype == torch.float64):
            options["residual_dtype"] = dtype
        outputs = getattr(namespace, self.function)(**tensors, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def run_exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference in float64, with the eps of the narrower dtype and no rounding in between."""
        options = dict(self.options)
        if "rms_norm" in self.function:
            options["eps"] = default_eps(tensors["x"].dtype, options.get("eps"))
        wide = Case(self.function, options=options)
        return wide.run(reference, {name: tensor.double() for name, tensor in tensors.items()})


CASES = [
    Case("rms_norm"),
    Case("rms_norm", weight=None),
    Case("rms_norm", bias=X, options={"eps": 1e-5}),
    Case("rms_norm", weight=F32, options={"eps": 1e-6}),
    Case("rms_norm", weight=BF16, bias=F32),
    Case("rms_norm", options={"weight_offset": 1.0, "eps": 1e-6}),
    Case("rms_norm", weight=F32, options={"weight_offset": 1.0}),
    Case("rms_norm", options={"rounding": "stepwise", "eps": 1e-6}),
    Case("rms_norm", weight=None, options={"rounding": "stepwise"}),
    Case("rms_norm", bias=X, options={"rounding": "stepwise", "eps": 1e-6}),
    Case("rms_norm", weight=F32, options={"rounding": "stepwise", "eps": 1e-6}),
    Case("rms_norm", bias=F32, options={"rounding": "stepwise", "weight_offset": 1.0}),
    Case("layer_norm", bias=X),
    Case("layer_norm", weight=None),
    Case("layer_norm", weight=F32, bias=F32, options={"eps": 1e-6}),
    Case("l2_norm", weight=None),
    Case("l2_norm", weight=None, options={"eps": 1e-3}),
    Case("add_rms_norm", residual=X),
    Case("add_rms_norm", residual=X, options={"weight_offset": 1.0, "eps": 1e-6}),
    Case("add_rms_norm", residual=X, options={"rounding": "stepwise", "eps": 1e-6}),
    Case("add_rms_norm", residual=F32),
    Case("add_rms_norm", residual=F32, bias=X, options={"residual_dtype": X, "rounding": "stepwise"}),
    Case("add_rms_norm", residual=X, weight=F32, options={"residual_dtype": F32}),
    Case("add_rms_norm", residual=X, weight=None),
    Case("gated_rms_norm", gate=X),
    Case("gated_rms_norm", gate=X, weight=F32, options={"eps": 1e-6}),
    Case("gated_rms_norm", gate=X, bias=X, options={"activation": "sigmoid"}),
    Case("gated_rms_norm", gate=X, weight=None, options={"rounding": "once"}),
    Case("gated_rms_norm", gate=X, options={"norm_before_gate": False}),
    Case("gated_rms_norm", gate=X, options={"norm_before_gate": False, "activation": "sigmoid", "rounding": "once"}),
    Case("gated_rms_norm", gate=X, options={"weight_offset": 1.0, "rounding": "once"}),
]
# One of each kernel mode, for tests over many shapes or layouts.
BASIC = [
    Case("rms_norm", options={"eps": 1e-6}),
    Case("layer_norm", bias=X),
    Case("l2_norm", weight=None),
    Case("add_rms_norm", residual=X, options={"eps": 1e-6}),
    Case("gated_rms_norm", gate=X, options={"eps": 1e-6}),
    Case("gated_rms_norm", gate=X, options={"eps": 1e-6, "norm_before_gate": False}),
]

WIDTHS = [
    1, 2, 7, 8, 63, 64, 65, 100, 123, 127, 128, 129, 255, 256, 512, 1000, 1023, 1024, 2047, 2048, 2560, 3072, 4096,
    5120, 8191, 8192, 16384, 32768, 65535, 65536, 100_000,
]  # fmt: skip
ROWS = [0, 1, 3, 64, 1000]


def gradients(case: Case, namespace: ModuleType | None, tensors: Tensors, douts: tuple[Tensor | None, ...]) -> Tensors:
    """Gradients of every tensor given those of the outputs; ``namespace`` None is the exact reference in float64."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    if namespace is None:
        leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        douts = tuple(None if dout is None else dout.double() for dout in douts)
    outputs = case.run_exact(leaves) if namespace is None else case.run(namespace, leaves)
    wanted = [(output, dout) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    torch.autograd.backward(*zip(*wanted, strict=True))
    return {name: leaf.grad for name, leaf in leaves.items()}


def check_values(case: Case, tensors: Tensors) -> None:
    with torch.no_grad():
        actual, eager, exact = case.run(inlay, tensors), case.run(reference, tensors), case.run_exact(tensors)
    for index, results in enumerate(zip(actual, eager, exact, strict=True)):
        assert_within_budget(*results, f"{case} output {index}")


def check_gradients(case: Case, tensors: Tensors, douts: tuple[Tensor | None, ...]) -> None:
    actual = gradients(case, inlay, tensors, douts)
    eager = gradients(case, reference, tensors, douts)
    exact = gradients(case, None, tensors, douts)
    # dx is what remains of dy once the part along x is taken out: nearly nothing in a row of width 1.
    terms = max((dout.abs().max().item() for dout in douts if dout is not None and dout.numel()), default=0.0)
    for name in tensors:
        assert_within_budget(actual[name], eager[name], exact[name], f"{case} d{name}", terms)
