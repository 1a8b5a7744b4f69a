"""Every way to call qk_norm_rope: which tensors, in which dtypes and order in memory, with which options."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay import reference
from tests.support.compare import assert_within_budget
from tests.support.devices import short_name

Tensors = dict[str, Tensor]
F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6
WEIGHTS = ("q_weight", "k_weight")
# [B, S, R], [1, S, R] and [S, R].
OWN, SHARED, FLAT = "own", "shared", "flat"


@dataclass(frozen=True)
class Case:
    """Options, and how cos and sin are given. ``rotary``: the share of a head that is rotated, in quarters;
    ``angles`` and ``parameters`` None: in q's dtype."""

    norm: bool = True
    rounding: str = "stepwise"
    rotary_rounding: str = "stepwise"
    weight_offset: float = 0.0
    rotary: int = 4
    interleaved: bool = False
    one_angle_per_pair: bool = False
    batches: str = OWN
    angles: torch.dtype | None = None
    parameters: torch.dtype | None = None

    def __str__(self) -> str:
        norm = f"norm_{self.rounding}+{self.weight_offset:g}" if self.norm else "rotary_alone"
        flags = [name for name in ("interleaved", "one_angle_per_pair") if getattr(self, name)]
        others = {"angles": self.angles, "parameters": self.parameters}
        dtypes = [f"{name}_{short_name(dtype)}" for name, dtype in others.items() if dtype]
        return "-".join([norm, self.rotary_rounding, f"{self.rotary}of4", self.batches, *flags, *dtypes])

    def rotary_dim(self, width: int) -> int:
        return width * self.rotary // 8 * 2

    def inputs(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> Tensors:
        """Random tensors for ``shape`` (B, S, query heads, key heads, D). Float64 q takes float64 everywhere."""
        batch, tokens, q_heads, k_heads, width = shape
        wide = dtype == torch.float64
        parameters = dtype if self.parameters is None or wide else self.parameters
        angles_dtype = dtype if self.angles is None or wide else self.angles
        rotary = self.rotary_dim(width)
        columns = rotary // 2 if self.one_angle_per_pair else rotary
        leading = {OWN: (batch, tokens), SHARED: (1, tokens), FLAT: (tokens,)}[self.batches]

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device)

        angles = 10 * normal(*leading, columns)
        tensors = {
            "q": normal(batch, tokens, q_heads, width).to(dtype),
            "k": normal(batch, tokens, k_heads, width).to(dtype),
            "cos": angles.cos().to(angles_dtype),
            "sin": angles.sin().to(angles_dtype),
        }
        if self.norm:
            for name in WEIGHTS:
                tensors[name] = (1.0 - self.weight_offset + 0.3 * normal(width)).to(parameters)
        return tensors

    def run(self, namespace: ModuleType, tensors: Tensors) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {
            "eps": EPS,
            "weight_offset": self.weight_offset,
            "rounding": self.rounding,
            "rotary_rounding": self.rotary_rounding,
            "rotary_dim": self.rotary_dim(tensors["q"].shape[-1]),
            "interleaved": self.interleaved,
        }
        return namespace.qk_norm_rope(**tensors, **options)


CASES = [
    Case(),  # Qwen3
    Case(rounding="once", weight_offset=1.0, rotary=1),  # Qwen3-Next, Qwen3.5
    Case(rounding="once", weight_offset=1.0, batches=FLAT),  # Gemma 3
    Case(norm=False, batches=SHARED),  # Llama
    Case(norm=False, rotary=2, interleaved=True, one_angle_per_pair=True),  # GLM-4
    Case(norm=False, one_angle_per_pair=True, batches=FLAT),  # gpt-oss
    Case(norm=False, interleaved=True, rotary_rounding="once"),  # Cohere
    Case(norm=False, interleaved=True, one_angle_per_pair=True, angles=F32),  # Ernie 4.5
    Case(rounding="once", interleaved=True, angles=F32, batches=FLAT),  # Flux
    Case(rotary=2, interleaved=True),
    Case(rotary=2, one_angle_per_pair=True, rotary_rounding="once"),
    Case(parameters=F32, batches=SHARED),
    Case(parameters=BF16, angles=F32, rotary=3),
    Case(rounding="once", weight_offset=1.0, parameters=F32, interleaved=True),
    Case(weight_offset=1.0),
    Case(norm=False, angles=F32),
    Case(rotary=0),
    Case(norm=False, rotary=0, interleaved=True),
]
# One of each kernel, for tests over many shapes or layouts.
BASIC = [CASES[0], CASES[1], CASES[3], CASES[4], CASES[8]]

# Around vectors, and what threads and warps hold of a head.
WIDTHS = [2, 6, 8, 16, 24, 32, 40, 64, 72, 80, 96, 100, 128, 192, 256, 288, 512, 528]
# B, S, query heads, key heads, D.
SHAPES = [(2, 9, 4, 2, 64), (1, 5, 3, 1, 128), (3, 4, 8, 8, 36)]


def gradients(case: Case, namespace: ModuleType, tensors: Tensors, douts: tuple[Tensor | None, ...]) -> Tensors:
    """Gradients of q, k and the weights given those of the outputs."""
    leaves = {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    outputs = case.run(namespace, leaves)
    wanted = [(output, dout) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    torch.autograd.backward(*zip(*wanted, strict=True))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def widened(tensors: Tensors) -> Tensors:
    return {name: t.double() for name, t in tensors.items()}


def check_values(case: Case, tensors: Tensors) -> None:
    with torch.no_grad():
        actual, eager = case.run(inlay, tensors), case.run(reference, tensors)
        exact = case.run(reference, widened(tensors))
    for name, results in zip("qk", zip(actual, eager, exact, strict=True), strict=True):
        # A rotation is a sum of two terms, which may cancel.
        assert_within_budget(*results, f"{case} {name}", largest(results[2]))


def check_gradients(case: Case, tensors: Tensors, douts: tuple[Tensor, ...]) -> None:
    actual, eager = gradients(case, inlay, tensors, douts), gradients(case, reference, tensors, douts)
    exact = gradients(case, reference, widened(tensors), tuple(dout.double() for dout in douts))
    upstream = max(largest(dout) for dout in douts)
    for name, gradient in actual.items():
        # The weights' gradients are sums over all tokens and heads.
        x = tensors[name[0]]
        rows = x.shape[0] * x.shape[1] * x.shape[2]
        terms = upstream * rows**0.5 if name in WEIGHTS else largest(exact[name])
        assert_within_budget(gradient, eager[name], exact[name], f"{case} d{name}", 3 * terms)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
