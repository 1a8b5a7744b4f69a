"""Experts and routings that are easy and hard, and how their results are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay import reference
from inlay.ops import _moe_kernels
from tests.support.compare import assert_same_non_finite, assert_within_budget

Tensors = dict[str, Tensor]
LEAVES = (
    *("x", "weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "shared", "shared_gate"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Shapes, how tokens are routed, which optional tensors there are, and keyword options."""

    tokens: int = 37
    hidden: int = 40
    intermediate: int = 24
    experts: int = 6
    slots: int = 2
    routing: str = "uniform"
    biases: bool = False
    shared: bool = False
    weights_dtype: torch.dtype | None = None  # None: x's
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        own |= own.pop("options", {})
        return "-".join(f"{name}_{value}" for name, value in own.items()) or "plain"

    def indices(self, device: str = "cpu") -> Tensor:
        """[T, K], without an expert twice in a row but for "twice"."""
        scores = torch.rand(self.tokens, self.experts, device=device)
        if self.routing == "skewed":  # as many as there are, the first much more often
            scores = scores * torch.arange(self.experts, 0, -1, device=device) ** 2
        if self.routing == "one_takes_all":
            scores[:, 1] += 2
        if self.routing == "half_unused":
            scores[:, : self.experts // 2] -= 2
        indices = scores.topk(self.slots)[1]
        if self.routing == "sentinels":  # experts of other ranks
            indices = torch.where(torch.rand(indices.shape, device=device) < 0.5, self.experts, indices)
        if self.routing == "nobody":
            indices = torch.full_like(indices, self.experts)
        if self.routing == "twice":
            indices[:, -1] = indices[:, 0]
        return indices

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Activations of size 1: weights are scaled by what they add up, as trained ones are."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(sizes, device=device, dtype=wide) * scale).to(dtype)

        width = self.intermediate * (2 if self.options.get("gated", True) else 1)
        tensors = {
            "x": normal(self.tokens, self.hidden),
            "indices": self.indices(device),
            "weights": torch.rand(self.tokens, self.slots, device=device, dtype=wide).to(self.weights_dtype or dtype),
            "gate_up_proj": normal(self.experts, width, self.hidden, scale=self.hidden**-0.5),
            "down_proj": normal(self.experts, self.hidden, self.intermediate, scale=self.intermediate**-0.5),
        }
        if self.options.get("transposed"):
            for name in ("gate_up_proj", "down_proj"):
                tensors[name] = tensors[name].mT.contiguous()
        if self.biases:
            tensors["gate_up_bias"] = normal(self.experts, width)
            tensors["down_bias"] = normal(self.experts, self.hidden)
        if self.shared:
            tensors["shared"] = normal(self.tokens, self.hidden)
            tensors["shared_gate"] = normal(self.tokens, 1)
        return tensors

    def run(self, namespace: ModuleType, tensors: Tensors, **options: Any) -> Tensor:
        first = ("x", "indices", "weights", "gate_up_proj", "down_proj")
        rest = {name: tensor for name, tensor in tensors.items() if name not in first}
        return namespace.moe_experts(*(tensors[name] for name in first), **rest, **self.options, **options)


ROUTINGS = ["uniform", "skewed", "one_takes_all", "half_unused", "sentinels", "nobody", "twice"]
GPT_OSS = {"activation": "gpt_oss", "interleaved": True, "transposed": True, "limit": 1.0}
MODELS = [
    Case(weights_dtype=torch.float32),  # Mixtral
    Case(slots=3, shared=True),  # Qwen3.5-MoE
    Case(options=GPT_OSS, biases=True, weights_dtype=torch.float32),
    Case(options={"activation": "relu2", "gated": False}),  # Nemotron-H
    Case(options={"activation": "gelu_tanh"}, slots=1),
]
OPTIONS = [
    *(Case(options={"activation": name}) for name in ("gelu", "gelu_tanh", "relu", "relu2")),
    Case(options={"interleaved": True}),
    Case(options={"transposed": True}),
    Case(options={"interleaved": True, "transposed": True}, biases=True),
    Case(options={"limit": 0.5}, biases=True),
    Case(options={"limit": 0.5, "interleaved": True}),
    Case(options={"gated": False, "transposed": True, "limit": 0.5}, biases=True),
    Case(biases=True, shared=True),
]
SHAPES = [
    Case(hidden=48, intermediate=24),  # 2 I == H: the layout must not be told by shapes
    Case(hidden=48, intermediate=24, options={"transposed": True}),
    Case(hidden=1, intermediate=1),
    Case(hidden=300, intermediate=7, biases=True),
    Case(hidden=17, intermediate=270),
    Case(hidden=33, intermediate=259, options={"interleaved": True, "transposed": True}),
    # Over the edges of what the tensor cores of a GPU are given at a time.
    Case(tokens=300, hidden=520, intermediate=264, experts=3),
    Case(tokens=300, hidden=136, intermediate=280, experts=3, options=GPT_OSS, biases=True),
    Case(tokens=200, hidden=256, intermediate=264, experts=2, options={"activation": "relu2", "gated": False}),
    Case(experts=1, slots=1, tokens=150),
    Case(experts=300, slots=10, tokens=20, hidden=16, intermediate=8),
    Case(experts=16, slots=16, tokens=9),
    Case(tokens=0),
    Case(tokens=5, slots=0),
]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 65, 130, 1100]


def needs_kernels(device: str) -> None:
    """For what eager code does not promise."""
    if not _moe_kernels.has_kernel(torch.empty(0, device=device)):
        pytest.skip(f"the ops are eager code on {device}")


def check_values(case: Case, tensors: Tensors) -> None:
    exact = case.run(reference, {name: _double(t) for name, t in tensors.items()})
    eager = case.run(reference, tensors)
    actual = case.run(inlay, tensors)
    assert_within_budget(actual, eager, exact, "y")


def check_gradients(case: Case, tensors: Tensors, dy: Tensor, **options: Any) -> None:
    exact = gradients(case, reference, {name: _double(t) for name, t in tensors.items()}, dy.double())
    eager = gradients(case, reference, tensors, dy)
    actual = gradients(case, inlay, tensors, dy, **options)
    for name, wanted in exact.items():
        # Sums over tokens may cancel: their terms are of the size of what is summed.
        terms = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_within_budget(actual[name], eager[name], wanted, f"d{name}", terms=terms or 1.0)


def gradients(case: Case, namespace: ModuleType, tensors: Tensors, dy: Tensor, **options: Any) -> Tensors:
    leaves = {name: tensors[name].detach().requires_grad_() for name in LEAVES if name in tensors}
    y = case.run(namespace, {**tensors, **leaves}, **options)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def same_non_finite(case: Case, tensors: Tensors) -> None:
    assert_same_non_finite(case.run(inlay, tensors), case.run(reference, tensors), "y")


def with_options(case: Case, **options: Any) -> Case:
    return replace(case, options={**case.options, **options})


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
