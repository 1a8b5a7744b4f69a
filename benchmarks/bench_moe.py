"""MoE benchmarks: experts of models as released, and their routers, ours beside every rival.

FLOPs: 6 T K H I forward, twice that backward. Bytes: of the experts that are chosen, and of what goes in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.harness import Bar, Call, Options, Row
from benchmarks.moe_rivals import IMPLEMENTATIONS, PACKAGES, STYLES, Op, Tensors
from inlay import reference

_COMPARED = 8  # tokens
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # relative L2, to count as computing the same thing


@dataclass(frozen=True)
class Case:
    """Experts. Routing is "uniform", or "zipf": the n-th expert is chosen in proportion to 1 / n."""

    direction: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    slots: int
    dtype: torch.dtype = torch.bfloat16
    style: str = "qwen"
    routing: str = "uniform"
    op: str = "moe_experts"
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    def __str__(self) -> str:
        shape = f"T{self.tokens} H{self.hidden} I{self.intermediate} E{self.experts} k{self.slots}"
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.op} {self.direction} {shape} {dtype} {self.style} {self.routing}"

    def flops(self) -> float:
        passes = 12 if self.direction == "backward" else 6
        return passes * self.tokens * self.slots * self.hidden * self.intermediate

    def bytes(self) -> int:
        """With uniform routing: of the experts that so many choices hit on average."""
        chosen = self.experts * (1 - (1 - self.slots / self.experts) ** self.tokens)
        matrices = 3 * chosen * self.hidden * self.intermediate
        rows = 2 * self.tokens * self.hidden
        if self.direction == "backward":  # which also reads what was saved, and writes every gradient
            matrices += 3 * self.experts * self.hidden * self.intermediate
            rows += self.tokens * (self.hidden + 2 * self.slots * self.intermediate)
        return round(self.dtype.itemsize * (matrices + rows))

    def tensors(self, device: str) -> Tensors:
        generator = torch.Generator(device).manual_seed(self.tokens)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            tensor = torch.empty(sizes, dtype=self.dtype, device=device)
            return tensor.normal_(generator=generator).mul_(scale)

        share = torch.ones(self.experts, device=device)
        if self.routing == "zipf":
            share /= torch.arange(1, self.experts + 1, device=device)
        noise = torch.empty(self.tokens, self.experts, device=device).exponential_(generator=generator)
        indices = (share / noise).topk(self.slots)[1]  # without replacement, in proportion to the shares
        up = (self.experts, 2 * self.intermediate, self.hidden)
        down = (self.experts, self.hidden, self.intermediate)
        if STYLES[self.style].transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        tensors = {
            "x": normal(self.tokens, self.hidden),
            "weights": torch.rand(self.tokens, self.slots, device=device, generator=generator).to(self.dtype),
            "gate_up_proj": normal(*up, scale=self.hidden**-0.5),
            "down_proj": normal(*down, scale=self.intermediate**-0.5),
            "indices": indices,
        }
        if self.style == "gpt_oss":
            tensors["gate_up_bias"] = normal(self.experts, 2 * self.intermediate)
            tensors["down_bias"] = normal(self.experts, self.hidden)
        if self.op == "moe_experts_permuted":
            per_expert = self.tokens // self.experts
            tensors["ends"] = torch.arange(1, self.experts + 1, device=device, dtype=torch.int32) * per_expert
        if self.direction == "backward":
            tensors["dy"] = normal(self.tokens, self.hidden)
        return tensors

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, the forward of training, or the backward alone."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: (op(tensors, self.style),))
        fixed = ("indices", "ends", "dy")
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name not in fixed}
        if self.direction == "training":
            return lambda: (op({**tensors, **leaves}, self.style).detach(),)
        y = op({**tensors, **leaves}, self.style)
        inputs = tuple(leaves.values())
        return lambda: torch.autograd.grad(y, inputs, tensors["dy"], retain_graph=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The first tokens in float64, of the experts that they chose alone."""
        first = {name: tensors[name][:_COMPARED].double() for name in ("x", "weights", "dy") if name in tensors}
        indices = tensors["indices"][:_COMPARED]
        if self.op == "moe_experts_permuted":
            row = torch.arange(min(_COMPARED, self.tokens), device=indices.device)
            indices = torch.searchsorted(tensors["ends"].long(), row, right=True)[:, None]
            first["weights"] = torch.ones(indices.shape, dtype=torch.float64, device=indices.device)
        chosen, local = indices.unique(return_inverse=True)
        chosen = chosen[chosen < self.experts]
        matrices = {
            name: tensors[name][chosen].double()
            for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
            if name in tensors
        }
        own = {name: t.requires_grad_() for name, t in first.items() if name != "dy"}
        y = reference.moe_experts(
            own["x"], local, own["weights"], matrices.pop("gate_up_proj"), matrices.pop("down_proj"), **matrices,
            **STYLES[self.style].options(),
        )  # fmt: skip
        if self.direction != "backward":
            return (y.detach(),)
        return torch.autograd.grad(y, tuple(own.values()), first["dy"])

    def difference(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
        """Of the first tokens: results, or gradients of x and weights; experts' gradients are sums over all."""
        both = zip(results[: len(exact)], exact, strict=True)
        return differing([(result[:_COMPARED], wanted) for result, wanted in both], _TOLERANCE[self.dtype])


@dataclass(frozen=True)
class RouterCase:
    """Softmax, the k largest, renormalised."""

    direction: str
    tokens: int
    experts: int
    slots: int
    dtype: torch.dtype = torch.float32  # in 16 bits logits are equal, and who is chosen differs
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)
    op: str = "moe_router"

    def __str__(self) -> str:
        return f"{self.op} {self.direction} T{self.tokens} E{self.experts} k{self.slots}"

    def bytes(self) -> int:
        passes = 2 if self.direction == "backward" else 1
        return self.tokens * (passes * self.experts * self.dtype.itemsize + 12 * self.slots)

    def tensors(self, device: str) -> Tensors:
        tensors = {
            "logits": torch.randn(self.tokens, self.experts, dtype=self.dtype, device=device),
            "slots": torch.empty(self.slots, device=device),
        }
        if self.direction == "backward":
            tensors["dweights"] = torch.randn(self.tokens, self.slots, device=device)
        return tensors

    def call(self, op: Op, tensors: Tensors) -> Call:
        if self.direction == "forward":
            return torch.no_grad()(lambda: (op(tensors, "qwen"),))
        logits = tensors["logits"].detach().requires_grad_()
        weights = op({**tensors, "logits": logits}, "qwen")
        return lambda: torch.autograd.grad(weights, logits, tensors["dweights"].to(weights.dtype), retain_graph=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        def router(t: Tensors, _style: str) -> Tensor:
            return reference.moe_router(t["logits"], self.slots, renormalize=True)[0]

        wide = {name: t.double() for name, t in tensors.items()}
        return self.call(router, wide)()  # type: ignore[return-value]

    def difference(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
        return differing(zip(results, exact, strict=True), _TOLERANCE[self.dtype])


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick))


# H, I, E, k.
_QWEN3_30B = (2048, 768, 128, 8)
_QWEN3_5_35B = (2048, 512, 256, 8)
_OLMOE = (2048, 1024, 64, 8)
_MIXTRAL = (4096, 14336, 8, 2)
_GPT_OSS = (2880, 2880, 32, 4)


def _cases(device: str, quick: bool) -> Iterator[Case | RouterCase]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    # TFLOP/s of the fastest rival known, on an H200: forward, forward of training, backward.
    anchors = [
        (16384, _QWEN3_30B, (582, 538, 550)),
        (4096, _QWEN3_30B, (385, 382, 390)),
        (16384, _QWEN3_5_35B, (489, 452, 473)),
        (16384, _OLMOE, (557, 552, 562)),
        (8192, _MIXTRAL, (652, 599, 614)),
    ]
    for tokens, shape, rates in anchors[:1] if quick else anchors:
        for direction, rate in zip(("forward", "training", "backward"), rates, strict=True):
            bars = {"graph": (harness.at_least_tflops(float(rate)),)}
            yield Case(direction, tokens, *shape, bars=bars)
    if quick:
        return
    for direction in ("forward", "backward"):
        yield Case(direction, 16384, *_QWEN3_30B, routing="zipf")
        yield Case(direction, 8192, *_GPT_OSS, style="gpt_oss")
    yield Case("forward", 131072, *_QWEN3_30B[:3], 1, op="moe_experts_permuted")
    for tokens, shape, limit in ((1, _QWEN3_5_35B, 18.0), (16, _QWEN3_5_35B, 200.0), (256, _QWEN3_30B, 360.0)):
        yield Case("forward", tokens, *shape, modes=("graph",), bars={"graph": (harness.at_most_us(limit),)})
    for direction in ("forward", "backward"):
        yield RouterCase(direction, 32768, 128, 8, bars={"graph": (harness.at_most_us(40.0),)})


def _cpu_cases(quick: bool) -> Iterator[Case | RouterCase]:
    modes = ("eager",)
    faster = {"eager": (harness.times_faster_than(1.5, "hf_grouped_mm"),)}
    # A quarter of the experts of Qwen3-30B, at as many rows an expert.
    shape = (2048, 768, 8, 2) if quick else (2048, 768, 32, 8)
    for dtype in (torch.bfloat16, torch.float32):
        for direction in ("forward",) if quick else ("forward", "training", "backward"):
            bars = {} if direction == "training" else faster
            yield Case(direction, 64 if quick else 256, *shape, dtype, modes=modes, bars=bars)
    yield Case("forward", 64 if quick else 256, *shape[:3], 1, op="moe_experts_permuted", modes=modes)
    reach = {"eager": (harness.at_least_copy(0.6),)}
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1,) if quick else (1, 4):
            yield Case("forward", tokens, 2048, 512, 32 if quick else 64, 8, dtype, modes=modes, bars=reach)
    if not quick:
        yield Case("forward", 64, *_GPT_OSS[:2], 8, 4, style="gpt_oss", modes=modes, bars=faster)
    for direction in ("forward", "backward"):
        eager = {"eager": (harness.times_faster_than(1.5, "hf_eager"),)}
        yield RouterCase(direction, 512 if quick else 4096, 128, 8, modes=modes, bars=eager)


FAMILY = harness.Family(("moe_router", "moe_experts", "moe_experts_permuted"), SUBJECT, PACKAGES, run)
