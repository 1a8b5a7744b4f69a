"""Inputs of attention in every combination of two features, and how its results are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay import reference
from inlay.reference.attention import _dropout, _Places, _visible
from tests.support.compare import assert_within_budget

Tensors = dict[str, Tensor]
LEAVES = ("q", "k", "v", "sinks", "gate", "bias")  # what gradients are for


@dataclass(frozen=True)
class Case:
    """Shapes, features by name, and keyword options."""

    queries: int = 70
    keys: int = 90
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    dim: int = 32
    value_dim: int = 32
    features: tuple[str, ...] = ()
    size: float = 1.0  # of q
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        features = own.pop("features", ())
        own |= own.pop("options", {})
        return "-".join([*features, *(f"{name}_{value}" for name, value in own.items())]) or "plain"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Of every tensor argument, by name."""
        tensors = {
            "q": self.size * torch.randn(self.batch, self.queries, self.heads, self.dim),
            "k": torch.randn(self.batch, self.keys, self.key_heads, self.dim),
            "v": torch.randn(self.batch, self.keys, self.key_heads, self.value_dim),
        }
        for feature in self.features:
            tensors |= FEATURES[feature](self)[0]
        return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()}

    def keywords(self) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        for feature in self.features:
            keywords |= FEATURES[feature](self)[1]
        return {**keywords, **self.options}

    def run(self, namespace: ModuleType, tensors: Tensors, **options: Any) -> tuple[Tensor, Tensor]:
        """y and lse. The same dropout each time."""
        torch.manual_seed(1)
        return namespace.attention(**tensors, **{**self.keywords(), "return_lse": True, **options})


def cuts(tokens: int) -> Tensor:
    """Five sequences of different lengths, one of them empty."""
    return torch.tensor([0, tokens // 7, tokens // 7, tokens // 2, tokens - tokens // 8, tokens], dtype=torch.int32)


def _mask(case: Case) -> Tensor:
    mask = torch.rand(case.batch, 1, case.queries, case.keys) < 0.6
    mask[0, :, case.queries // 2] = False  # a query that sees nothing
    return mask


def _lengths(case: Case) -> Tensor:
    return torch.arange(case.batch, dtype=torch.int32) * case.keys // max(1, case.batch)  # the first row's is 0


def _ranges(case: Case) -> Tensor:
    begin = torch.randint(-5, max(1, case.keys - 20), (case.batch, case.queries, 1))
    return torch.cat([begin, begin + torch.randint(-2, case.keys, begin.shape)], -1).int()


# The tensors and the keywords that a feature adds.
FEATURES: dict[str, Callable[[Case], tuple[Tensors, dict[str, Any]]]] = {
    "causal": lambda case: ({}, {"causal": True}),
    "window": lambda case: ({}, {"window": (29, 3)}),
    "softcap": lambda case: ({}, {"softcap": 1.5}),
    "sinks": lambda case: ({"sinks": 2 * torch.randn(case.heads)}, {}),
    "gate": lambda case: ({"gate": torch.randn(case.batch, case.queries, case.heads, case.value_dim)}, {}),
    "mask": lambda case: ({"mask": _mask(case)}, {}),
    "bias": lambda case: ({"bias": torch.randn(1, case.heads, case.queries, case.keys)}, {}),
    "packed": lambda case: ({"cu_seqlens_q": cuts(case.queries), "cu_seqlens_k": cuts(case.keys).long()}, {}),
    "lengths": lambda case: ({"kv_lengths": _lengths(case)}, {}),
    "dropout": lambda case: ({}, {"dropout_p": 0.2}),
    "ranges": lambda case: ({"key_ranges": _ranges(case)}, {}),
}
_IMPOSSIBLE = [{"packed", other} for other in ("mask", "bias", "lengths")]

# Shapes that the pairs take in turn.
_SHAPES: list[dict[str, int]] = [
    {},
    {"heads": 2, "queries": 150, "keys": 150},
    {"heads": 6, "key_heads": 1, "dim": 64, "value_dim": 64},
    {"dim": 24, "value_dim": 40, "queries": 33, "keys": 300},
    {"queries": 130, "keys": 60, "dim": 72, "value_dim": 72},
]


def _pairs() -> list[Case]:
    cases = []
    for features in combinations(FEATURES, 2):
        if set(features) in _IMPOSSIBLE:
            continue
        shape = dict(_SHAPES[len(cases) % len(_SHAPES)])
        if "packed" in features:
            shape["batch"] = 1
        cases.append(Case(features=features, **shape))
    return cases


SINGLES = [Case(), *(Case(features=(name,), batch=1 if name == "packed" else 2) for name in FEATURES)]
PAIRS = _pairs()
# What a model's layers ask for together.
MODELS = [
    Case(features=("causal", "gate"), dim=256, value_dim=256, heads=8, key_heads=1),  # Qwen3.5
    Case(features=("causal", "softcap", "window"), dim=128, value_dim=128),  # Gemma 2
    Case(features=("causal", "sinks", "window"), dim=64, value_dim=64, heads=8, key_heads=1),  # gpt-oss
    Case(features=("causal", "packed", "dropout"), batch=1, dim=192, value_dim=128),  # DeepSeek
    Case(features=("mask", "bias", "dropout", "gate", "sinks", "softcap"), queries=100, keys=100),
]
# One of each path, for tests over many layouts or options.
BASIC = [
    Case(),
    Case(features=("causal", "gate", "sinks")),
    Case(features=("mask", "bias", "dropout")),
    Case(features=("packed", "window", "ranges"), batch=1),
]


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    key_ranges: Tensor | None = None,
    **_ignored: object,
) -> tuple[Tensor, Tensor]:
    """As models write it: products in q's dtype, the softmax in float32 and rounded. Measures what rounding costs."""
    queries, keys = _Places(cu_seqlens_q, q), _Places(cu_seqlens_k, k)
    visible = _visible(queries, keys, causal, window, kv_lengths, key_ranges)
    visible = visible if mask is None else visible & mask
    group = q.shape[2] // k.shape[2]
    wide_keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = q.transpose(1, 2) @ wide_keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores if bias is None else scores + bias).float().masked_fill(~visible, -torch.inf)
    sink = torch.full((q.shape[2],), -torch.inf, device=q.device) if sinks is None else sinks.float()
    logits = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
    blind = logits.isneginf().all(-1, keepdim=True)
    lse = logits.masked_fill(blind, 0.0).logsumexp(-1)
    probabilities = torch.exp(scores - lse[..., None])
    if dropout_p:
        probabilities = probabilities * _dropout(dropout_p, probabilities, queries, keys)
    y = (probabilities.to(v.dtype) @ values).transpose(1, 2)
    y = y if gate is None else y * torch.sigmoid(gate)
    return y, lse.masked_fill(blind[..., 0], -torch.inf)


class _Eager:
    """Eager code with the roundings of 16 bits, in the place of a namespace."""

    attention = staticmethod(eager_attention)


def eager_namespace(tensors: Tensors, *, widens: bool) -> Any:
    """What errors are measured against. Code that widens to float32 at once is compared with the reference, which does;
    tensor cores multiply 16-bit values, as models do in eager code."""
    return reference if widens or tensors["q"].dtype in (torch.float32, torch.float64) else _Eager


def gradients(case: Case, namespace: Any, tensors: Tensors, douts: tuple, **options: Any) -> Tensors:
    """Of every floating tensor, from those outputs whose gradient is not None."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name in LEAVES}
    outputs = case.run(namespace, {**tensors, **leaves}, **options)
    wanted = [(output, dout) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    grads = torch.autograd.grad(
        [output for output, _ in wanted], list(leaves.values()), [dout for _, dout in wanted], allow_unused=True
    )
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return {name: zero if grad is None else grad for name, grad, zero in zip(leaves, grads, zeros, strict=True)}


def widened(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def random_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(output.shape, device=output.device).to(output.dtype) for output in outputs)


def check_values(case: Case, tensors: Tensors, **options: Any) -> None:
    actual = case.run(inlay, tensors, **options)
    widens = tensors["q"].device.type == "cpu"
    eager = case.run(eager_namespace(tensors, widens=widens), tensors, **options)
    exact = case.run(reference, widened(tensors), **options)
    for name, *results in zip(("y", "lse"), actual, eager, exact, strict=True):
        assert_within_budget(*results, f"{case} {name}", terms=_terms(results[-1]))


# Gradients of scores are differences, of terms so many times as large; those of sinks are sums of these over queries,
# and those of a bias may be.
_CANCELLED = {"sinks": 48, "bias": 16}
_CANCELLED_ELSEWHERE = 8


def check_gradients(case: Case, tensors: Tensors, douts: tuple[Tensor | None, ...], **options: Any) -> None:
    """The backward knows o as the forward has rounded it, wherever it runs: 16-bit gradients have eager's errors."""
    wide_douts = tuple(None if dout is None else dout.double() for dout in douts)
    actual = gradients(case, inlay, tensors, douts, **options)
    eager = gradients(case, eager_namespace(tensors, widens=False), tensors, douts, **options)
    exact = gradients(case, reference, widened(tensors), wide_douts, **options)
    for name in actual:
        terms = _CANCELLED.get(name, _CANCELLED_ELSEWHERE) * _terms(exact[name])
        if name == "sinks":  # sums of o's own roundings, which eager code's softmax does not know
            terms += torch.finfo(tensors["q"].dtype).eps / torch.finfo(torch.float32).eps / 8 * _terms(exact[name])
        assert_within_budget(actual[name], eager[name], exact[name], f"{case} d{name}", terms=terms)


def _terms(exact: Tensor) -> float:
    """Sums of many terms round in the size of the largest results, and a few may come out small."""
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
