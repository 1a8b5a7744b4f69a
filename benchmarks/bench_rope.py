"""Rope benchmarks: norm and rotary embedding of queries and keys as models have them, ours beside every rival."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.harness import Bar, Call, Options, Row
from benchmarks.rope_rivals import IMPLEMENTATIONS, PACKAGES, STYLES, Op, Tensors
from inlay import reference

_DTYPE = torch.bfloat16
_COMPARED = 16  # tokens
_TOLERANCE = 0.02  # relative L2, for a rival to count as computing the same thing in bf16
_GRADIENTS = ("dq", "dk")


@dataclass(frozen=True)
class Case:
    style: str
    direction: str
    batch: int
    tokens: int
    q_heads: int
    k_heads: int
    width: int
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode
    op: str = "qk_norm_rope"

    def __str__(self) -> str:
        heads = f"{self.q_heads}/{self.k_heads}x{self.width}"
        return f"{self.op} {self.direction} {self.batch}x{self.tokens} {heads} {self.style}"

    def bytes(self) -> int:
        """Each input read once, each output written once. A backward reads q and k only where they were normed."""
        style = STYLES[self.style]
        heads = self.batch * self.tokens * (self.q_heads + self.k_heads) * self.width
        angles = 2 * self.batch * self.tokens * self.width // style.rotary
        passes = 3 if self.direction == "backward" and style.norm else 2
        return _DTYPE.itemsize * (passes * heads + angles)

    def tensors(self, device: str) -> Tensors:
        style = STYLES[self.style]

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=_DTYPE, device=device)

        rotary = self.width // style.rotary
        frequencies = 1.0 / 10000 ** (torch.arange(0, rotary, 2, device=device) / rotary)
        pairs = torch.arange(self.tokens, device=device)[:, None] * frequencies
        angles = pairs.repeat_interleave(2, dim=-1) if style.interleaved else torch.cat([pairs, pairs], dim=-1)
        q = normal(self.batch, self.tokens, self.q_heads, (2 if style.gated else 1) * self.width)
        tensors = {
            "q": q[..., : self.width],
            "k": normal(self.batch, self.tokens, self.k_heads, self.width),
            "cos": angles.cos().to(_DTYPE).repeat(self.batch, 1, 1),
            "sin": angles.sin().to(_DTYPE).repeat(self.batch, 1, 1),
        }
        if style.norm:
            for name in ("q_weight", "k_weight"):
                tensors[name] = (0.0 if style.zero_centred else 1.0) + 0.1 * normal(self.width)
        if self.direction == "backward":
            tensors["dq"] = normal(self.batch, self.tokens, self.q_heads, self.width)
            tensors["dk"] = torch.randn_like(tensors["k"])
        return tensors

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: op(tensors, self.style))
        fixed = (*_GRADIENTS, "cos", "sin")
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name not in fixed}
        outputs = op({**tensors, **leaves}, self.style)
        inputs, douts = tuple(leaves.values()), tuple(tensors[name] for name in _GRADIENTS)
        return lambda: torch.autograd.grad(outputs, inputs, douts, retain_graph=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The first tokens in float64."""
        few = {name: (t[:, :_COMPARED] if t.dim() > 1 else t).double() for name, t in tensors.items()}
        return self.call(_exact, few)()

    def difference(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
        """Of the first tokens; the weights' gradients are sums over all tokens."""
        both = zip(results, exact, strict=True)
        return differing([(r[:, :_COMPARED], e) for r, e in both if e.dim() > 1], _TOLERANCE)


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick), _host_cases())


def _host_cases() -> Iterator[Case]:
    for direction in ("forward", "backward"):
        yield Case("qwen3", direction, 1, 1, 4, 1, 64)


def _cases(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    models = [
        ("qwen3", 32, 8, 128),  # Qwen3-8B
        ("qwen3", 16, 8, 128),  # Qwen3-0.6B
        ("qwen3.5", 16, 2, 256),  # Qwen3.5-35B-A3B, Qwen3-Next
        ("llama", 32, 8, 128),
        ("llama", 64, 8, 64),  # gpt-oss
        ("glm", 32, 2, 128),
    ]
    bars = {"graph": (harness.at_least_copy(0.85),)}
    for model in models[:1] if quick else models:
        for direction in ("forward", "backward"):
            yield Case(model[0], direction, 1, 8192, *model[1:], bars=bars)
    for style, *heads in models[:3:2]:
        for direction in ("forward", "backward"):
            yield Case(style, direction, 1, 32768, *heads)
    for batch in (1,) if quick else (1, 8, 64):
        yield Case("qwen3", "forward", batch, 1, 32, 8, 128, modes=("graph",))


def _cpu_cases(quick: bool) -> Iterator[Case]:
    tokens = 256 if quick else 4096
    bars = {"eager": (harness.times_faster_than(8.0, "hf_eager"),)}
    for style, *heads in [("qwen3", 32, 8, 128), ("qwen3.5", 16, 2, 256), ("llama", 32, 8, 128), ("glm", 32, 2, 128)]:
        for direction in ("forward", "backward"):
            yield Case(style, direction, 1, tokens, *heads, modes=("eager",), bars=bars)


def _exact(tensors: Tensors, style: str) -> tuple[Tensor, Tensor]:
    names = ("q", "k", "cos", "sin", "q_weight", "k_weight")
    return reference.qk_norm_rope(*(tensors.get(name) for name in names), **STYLES[style].options())


FAMILY = harness.Family(("qk_norm_rope",), SUBJECT, PACKAGES, run)
