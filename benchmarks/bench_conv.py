"""Conv benchmarks: whole sequences in both orders of memory, packed ones, and decode steps, ours beside every rival."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.conv_rivals import IMPLEMENTATIONS, PACKAGES, Op, Tensors
from benchmarks.harness import Bar, Call, Options, Row
from inlay import reference

_DTYPE = torch.bfloat16
_WIDTH = 4
_PACKED = 8  # sequences in a packed row
_COMPARED = 16  # channels
_TOLERANCE = 0.02  # relative L2, for a rival to count as computing the same thing in bf16


@dataclass(frozen=True)
class Case:
    op: str  # "causal_conv1d", "packed" or "causal_conv1d_step"
    direction: str
    batch: int
    time: int
    channels: int
    tokens_innermost: bool = False
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    def __str__(self) -> str:
        order = " [B, C, T]" if self.tokens_innermost else ""
        return f"{self.op} {self.direction} {self.batch}x{self.time}x{self.channels}{order}"

    def bytes(self) -> int:
        """Each input read once, each output written once; a step reads and writes its state."""
        signal, weight = self.batch * self.time * self.channels, self.channels * _WIDTH
        if self.op == "causal_conv1d_step":
            return _DTYPE.itemsize * (2 * signal + (2 * self.batch + 1) * weight)
        return _DTYPE.itemsize * (3 * signal + 2 * weight if self.direction == "backward" else 2 * signal + weight)

    def tensors(self, device: str) -> Tensors:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=_DTYPE, device=device)

        shape = (self.batch, self.time, self.channels)
        tensors = {"x": normal(*shape), "weight": normal(self.channels, _WIDTH) / 2}
        if self.direction == "backward":
            tensors["dy"] = normal(*shape)
        if self.tokens_innermost:
            tensors |= {name: t.mT.contiguous().mT for name, t in tensors.items() if t.dim() == 3}
        if self.op == "causal_conv1d_step":
            tensors["state"] = normal(self.batch, self.channels, _WIDTH)
        if self.op == "packed":
            ends = torch.arange(_PACKED + 1, device=device, dtype=torch.int32) * (self.time // _PACKED)
            tensors["cu_seqlens"] = ends
            tensors["seq_idx"] = torch.arange(self.time, device=device, dtype=torch.int32)[None] // (
                self.time // _PACKED
            )
        return tensors

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: (op(tensors),))
        leaves = {name: tensors[name].detach().requires_grad_() for name in ("x", "weight")}
        output, dy = op({**tensors, **leaves}), tensors["dy"]
        inputs = tuple(leaves.values())
        return lambda: torch.autograd.grad(output, inputs, dy, retain_graph=True)

    def exact(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """Of the first channels, in float64."""
        few = {name: t[..., :_COMPARED] if name in ("x", "dy") else t for name, t in tensors.items()}
        few |= {"weight": tensors["weight"][:_COMPARED]}
        if "state" in tensors:
            few["state"] = tensors["state"][:, :_COMPARED]
        few = {name: t.double() if t.is_floating_point() else t for name, t in few.items()}
        return self.call(_exact(self.op), few)()[:1]

    def difference(self, results: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> str:
        return differing([(results[0][..., :_COMPARED], exact[0])], _TOLERANCE)


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick), _host_cases())


def _host_cases() -> Iterator[Case]:
    for op, direction in [
        ("causal_conv1d", "forward"),
        ("causal_conv1d_step", "forward"),
        ("causal_conv1d", "backward"),
    ]:
        yield Case(op, direction, 1, 1, 64)


def _cases(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    # Qwen3-Next and Qwen3.5 convolve 8192 to 16384 channels, the small ones 6144.
    shapes = [(1, 8192, 8192)] if quick else [(1, 8192, 8192), (4, 2048, 8192), (1, 32768, 8192), (8, 1024, 6144)]
    bars = {"graph": (harness.at_least_copy(0.85),)}
    for shape in shapes:
        for direction in ("forward", "backward"):
            yield Case("causal_conv1d", direction, *shape, bars=bars if shape == shapes[0] else {})
            yield Case("causal_conv1d", direction, *shape, tokens_innermost=True)
    for direction in ("forward", "backward"):
        yield Case("packed", direction, 1, 8192, 8192)
    for batch in (1,) if quick else (1, 8, 64, 256):
        yield Case("causal_conv1d_step", "forward", batch, 1, 8192, modes=("graph",))


def _cpu_cases(quick: bool) -> Iterator[Case]:
    tokens = 256 if quick else 2048
    bars = {"eager": (harness.times_faster_than(4.0, "hf_eager"),)}
    for direction in ("forward", "backward"):
        yield Case("causal_conv1d", direction, 1, tokens, 8192, modes=("eager",), bars=bars)
        yield Case("causal_conv1d", direction, 1, tokens, 8192, True, modes=("eager",), bars=bars)
        yield Case("packed", direction, 1, tokens, 8192, modes=("eager",))
    yield Case("causal_conv1d_step", "forward", 1, 1, 8192, modes=("eager",), bars=bars)


def _exact(op: str) -> Op:
    if op == "causal_conv1d_step":
        return lambda t: reference.causal_conv1d_step(t["x"], t["state"], t["weight"], activation="silu")
    return lambda t: reference.causal_conv1d(t["x"], t["weight"], activation="silu", cu_seqlens=t.get("cu_seqlens"))


FAMILY = harness.Family(("causal_conv1d", "causal_conv1d_step"), SUBJECT, PACKAGES, run)
