"""Inputs of the gated delta rule that are easy and hard, and how its results are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import inlay
from inlay import reference
from tests.support.compare import assert_same_non_finite, assert_within_budget

Tensors = dict[str, Tensor]
LEAVES = ("q", "k", "v", "g", "beta", "initial_state")


@dataclass(frozen=True)
class Case:
    """Shapes, the kind of gates, keys and betas, and keyword options."""

    tokens: int = 130
    batch: int = 2
    key_heads: int = 2
    value_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    gates: str = "weak"
    correlation: float = 0.0  # the mean cosine between keys
    beta: float | None = None  # None: anywhere between 0 and 1
    with_state: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        own |= own.pop("options", {})
        return "-".join(f"{name}_{value}" for name, value in own.items()) or "plain"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = (self.batch, self.tokens)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*tokens, *sizes, device=device, dtype=wide)

        k = normal(self.key_heads, self.key_dim)
        common = torch.randn(self.batch, 1, self.key_heads, self.key_dim, device=device, dtype=wide)
        k = self.correlation**0.5 * common + (1 - self.correlation) ** 0.5 * k
        beta = torch.rand(*tokens, self.value_heads, device=device, dtype=wide)
        if self.beta is not None:
            beta = self.beta + 0.01 * (beta - 0.5)
        tensors = {
            "q": normal(self.key_heads, self.key_dim),
            # Of unit length but for rounding, so that the rule is stable without normalising them.
            "k": F.normalize(k, dim=-1),
            "v": normal(self.value_heads, self.value_dim),
            "g": self._gates(normal(self.value_heads)),
            "beta": beta,
        }
        tensors = {name: tensor if name == "g" else tensor.to(dtype) for name, tensor in tensors.items()}
        if self.with_state:
            shape = (self.batch, self.value_heads, self.key_dim, self.value_dim)
            tensors["initial_state"] = torch.randn(shape, device=device, dtype=wide)
        return tensors

    def _gates(self, noise: Tensor) -> Tensor:
        weak = F.logsigmoid(noise) / 16
        if self.gates == "zero":
            return torch.zeros_like(noise)
        if self.gates == "strong":  # a chunk's sum is far below what exp can show in float32
            return 40 * F.logsigmoid(noise)
        if self.gates == "mixed":  # a head that forgets all the time, one that never does, and the rest
            heads = noise.shape[-1]
            scale = torch.tensor([640.0, 0.0, 1.0, 16.0], device=noise.device).repeat(heads)[:heads]
            return weak * scale
        if self.gates == "cut":  # now and then everything is forgotten
            return torch.where(noise > 1.5, -1000.0, weak)
        return weak

    def run(self, namespace: ModuleType, tensors: Tensors, **options: Any) -> tuple[Tensor, Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if name not in LEAVES[:5]}
        return namespace.gated_delta_rule(
            *(tensors[name] for name in LEAVES[:5]), output_final_state=True, **{**rest, **self.options, **options}
        )


GATES = ["weak", "zero", "strong", "mixed", "cut"]
SHAPES = [
    Case(),
    Case(value_heads=4),
    Case(key_heads=1, value_heads=4, value_dim=64),
    Case(key_dim=64, value_dim=96),
    Case(key_dim=128, value_dim=128, batch=1),
    Case(key_dim=256, value_dim=64, batch=1, tokens=70),
    Case(key_dim=72, value_dim=40),
    Case(key_dim=8, value_dim=256, batch=1),
    Case(with_state=False),
    Case(options={"l2norm_qk": True}),
    Case(options={"scale": 0.7}),
]
HARD = [
    *(Case(gates=gates, key_heads=2, value_heads=4) for gates in GATES),
    *(Case(correlation=correlation, beta=beta) for correlation in (0.7, 0.95) for beta in (None, 0.99, 1.9)),
    Case(beta=0.005),
    Case(beta=1.0),
    Case(beta=1.9),
    Case(beta=1.9, gates="strong"),
]
LENGTHS = [1, 2, 15, 63, 64, 65, 1000]
# One of each path, for tests over many layouts.
BASIC = [
    Case(tokens=70, options={"mode": "chunk"}),
    Case(tokens=70, options={"mode": "recurrent"}),
    Case(tokens=70, value_heads=4, options={"l2norm_qk": True}),
]


def gradients(case: Case, namespace: ModuleType, tensors: Tensors, douts: tuple, **options: Any) -> Tensors:
    leaves = {name: t.detach().requires_grad_(name in LEAVES) for name, t in tensors.items() if name in LEAVES}
    outputs = case.run(namespace, {**tensors, **leaves}, **options)
    wanted = [(output, dout) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    grads = torch.autograd.grad(
        [output for output, _ in wanted], list(leaves.values()), [dout for _, dout in wanted], allow_unused=True
    )
    return dict(zip(leaves, grads, strict=True))


def kernel_dtype(device: str) -> torch.dtype:
    """One that all kernels of the device take. On CUDA those for chunks are for 16 bits; float32 is mostly eager code,
    which promises no bits."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def widened(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def check_values(case: Case, tensors: Tensors, **options: Any) -> None:
    """Output and final state against the float64 recurrence, token by token."""
    actual = case.run(inlay, tensors, **options)
    eager = case.run(reference, tensors, **{**options, "mode": "chunk"})
    exact = case.run(reference, widened(tensors), **{**options, "mode": "recurrent", "state_dtype": torch.float64})
    for name, *results in zip(("o", "final_state"), actual, eager, exact, strict=True):
        _check(case, name, *results, results[-1], like=tensors["q"])


def check_gradients(
    case: Case, tensors: Tensors, douts: tuple[Tensor | None, ...], like: tuple | None = None, **options: Any
) -> None:
    """Each gradient by itself, so that a small one cannot hide behind a large one.

    Where terms cancel in the gradients, ``like`` are other gradients of the outputs, of the same size, for which they
    do not: errors may be in proportion to what comes from those.
    """
    wide_douts = tuple(None if dout is None else dout.double() for dout in douts)
    actual = gradients(case, inlay, tensors, douts, **options)
    eager = gradients(case, reference, tensors, douts, **{**options, "mode": "chunk"})
    exact = gradients(case, reference, widened(tensors), wide_douts, **{**options, "mode": "recurrent"})
    sizes = exact
    if like is not None:
        sizes = gradients(case, reference, widened(tensors), like, **{**options, "mode": "recurrent"})
    for name in actual:
        _check(case, f"d{name}", actual[name], eager[name], exact[name], sizes[name], like=tensors["q"])


# Relative L2 errors in bfloat16, float16 has three bits more; those of FLA's tests.
_LARGEST_ERRORS = {"o": 0.005, "final_state": 0.005, "dg": 0.02, "dbeta": 0.02}
_LARGEST_ERROR = 0.008


def _check(case: Case, name: str, actual: Tensor, eager: Tensor, exact: Tensor, size: Tensor, *, like: Tensor) -> None:
    """Against eager's errors. Tensor cores, though, multiply 16-bit values, which eager code in float32 does not.

    ``size`` is what the terms of the sums come to where they do not cancel: the exact result, as a rule.
    """
    if like.device.type == "cpu" or like.dtype == torch.float32:
        return assert_within_budget(actual, eager, exact, f"{case} {name}", terms=_terms(size))
    limit = _LARGEST_ERRORS.get(name, _LARGEST_ERROR) * torch.finfo(like.dtype).eps / torch.finfo(torch.bfloat16).eps
    if case.correlation > 0.9:  # the system that is solved multiplies errors
        limit *= 2
    if case.correlation > 0.5 and (case.beta or 0) > 1:
        limit *= 2
    assert_same_non_finite(actual, eager, f"{case} {name}")
    finite = exact.isfinite()
    error = torch.where(finite, actual.double() - exact, 0.0).norm().item()
    # What is far below 1 may vanish in float16.
    allowed = limit * torch.where(finite, size, 0.0).norm().item() + 1e-6 * exact.numel() ** 0.5
    assert error <= allowed, f"{case} {name}: L2 error {error:.3g} is over {allowed:.3g}"


def _terms(exact: Tensor) -> float:
    """Sums of many products round in the size of the largest results, and a few may come out small."""
    return exact.abs().max().item() if exact.numel() else 0.0
