"""Norm benchmarks: every shape and promise of the norm family, ours beside every rival on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.harness import Bar, Call, Options, Row
from benchmarks.norm_rivals import EPS, IMPLEMENTATIONS, PACKAGES, Op, Tensors
from inlay import reference

_DTYPE = torch.bfloat16
_ROW_TENSORS = {
    "rms_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "gated_rms_norm": ("x", "gate"),
    "layer_norm": ("x",),
    "l2_norm": ("x",),
}
_GRADIENTS = {"add_rms_norm": ("dy", "dresidual_out")}
# Tensors of rows that a backward reads and writes: gradients and saved rows in, gradients out. The sum of a residual
# add has one gradient for both its terms.
_BACKWARD_TRAFFIC = {"rms_norm": 3, "add_rms_norm": 4, "gated_rms_norm": 5, "layer_norm": 3, "l2_norm": 3}
_ROWS = 16  # that are compared with the reference
_TOLERANCE = 0.02  # relative L2, for a rival to count as computing the same thing in bf16


@dataclass(frozen=True)
class Case:
    op: str
    direction: str
    rows: int
    width: int
    style: str = "stepwise"
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    def __str__(self) -> str:
        style = " zero-centred" if self.style == "zero_centred" else ""
        return f"{self.op} {self.direction} {self.rows}x{self.width}{style}"

    @property
    def gradients(self) -> tuple[str, ...]:
        return _GRADIENTS.get(self.op, ("dy",)) if self.direction == "backward" else ()

    def bytes(self) -> int:
        """Each input read once, each output written once; a backward adds the vectors and the rows' statistics."""
        matrix, vector = self.rows * self.width * _DTYPE.itemsize, self.width * _DTYPE.itemsize
        if self.direction == "backward":
            return _BACKWARD_TRAFFIC[self.op] * matrix + 2 * vector + 4 * self.rows
        outputs = 2 if self.op == "add_rms_norm" else 1
        return (len(_ROW_TENSORS[self.op]) + outputs) * matrix + vector

    def tensors(self, device: str) -> Tensors:
        """Inputs and, for a backward, the outputs' gradients. "scale" is weight plus offset, for rivals without one."""
        names = _ROW_TENSORS[self.op] + self.gradients
        tensors = {name: torch.randn(self.rows, self.width, dtype=_DTYPE, device=device) for name in names}
        tensors["scale"] = 1.0 + 0.1 * torch.randn(self.width, dtype=_DTYPE, device=device)
        tensors["weight"] = tensors["scale"] - 1.0 if self.style == "zero_centred" else tensors["scale"].clone()
        if self.op == "layer_norm":
            tensors["bias"] = 0.1 * torch.randn(self.width, dtype=_DTYPE, device=device)
        return tensors

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: _tuple(op(tensors, self.style)))
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name not in self.gradients}
        outputs = _tuple(op(leaves, self.style))
        inputs, douts = tuple(leaves.values()), tuple(tensors[name] for name in self.gradients)
        return lambda: torch.autograd.grad(outputs, inputs, douts, retain_graph=True, allow_unused=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The first rows in float64."""
        few = {name: t[:_ROWS].double() if t.dim() > 1 else t.double() for name, t in tensors.items()}
        return self.call(_exact(self.op), few)()

    def difference(self, results: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> str:
        """Of the first rows; the vectors' gradients are sums over all rows."""
        both = zip(results, exact, strict=True)
        return differing(
            [(r[:_ROWS], e) for r, e in both if r is not None and e is not None and e.dim() > 1], _TOLERANCE
        )


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick), _host_cases())


def _host_cases() -> Iterator[Case]:
    for op, direction in [
        ("rms_norm", "forward"),
        ("add_rms_norm", "forward"),
        ("gated_rms_norm", "forward"),
        ("rms_norm", "backward"),
    ]:
        yield Case(op, direction, 4, 64)


def _cases(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    long_rows, short_rows = [(16384, 2048), (16384, 4096), (8192, 5120)], [(131072, 128), (131072, 256)]
    shapes = [*long_rows, *short_rows, (8192, 1024)]
    if quick:
        shapes = [(16384, 4096), (131072, 256)]

    def bar(shape: tuple[int, int], long: float, short: float, modes: tuple[str, ...] = ("graph",)) -> dict:
        share = {**dict.fromkeys(long_rows, long), **dict.fromkeys(short_rows, short)}.get(shape)
        return {} if share is None else dict.fromkeys(modes, (harness.at_least_copy(share),))

    for shape in shapes:
        yield Case("rms_norm", "forward", *shape, bars=bar(shape, 0.92, 0.90))
        yield Case("rms_norm", "forward", *shape, style="zero_centred", bars=bar(shape, 0.92, 0.90))
        yield Case("add_rms_norm", "forward", *shape, bars=bar(shape, 0.94, 0.94))
        yield Case("rms_norm", "backward", *shape, bars=bar(shape, 0.85, 0.85, ("graph", "eager")))
        yield Case("add_rms_norm", "backward", *shape)
    gated = {"graph": (harness.at_least_copy(0.85),)}
    for rows in [262144] if quick else [262144, 524288]:
        for direction in ("forward", "backward"):
            yield Case("gated_rms_norm", direction, rows, 128, bars=gated)
    for width in [3072] if quick else [1536, 3072]:
        for direction in ("forward", "backward"):
            yield Case("layer_norm", direction, 16384, width)
    for direction in ("forward", "backward"):
        yield Case("l2_norm", direction, 262144, 128)
    for rows in (1, 8, 64):
        for width in [4096] if quick else [2048, 4096, 5120]:
            for op in ("rms_norm", "add_rms_norm"):
                yield Case(op, "forward", rows, width, modes=("graph",), bars={"graph": (harness.at_most_us(2.5),)})


def _cpu_cases(quick: bool) -> Iterator[Case]:
    elements = 2**20 if quick else 2**25  # 64 MiB a tensor in bf16
    share, faster = harness.at_least_copy(0.7), harness.times_faster_than(8.0, "hf_eager")
    for width in (1024, 4096):
        for op in ("rms_norm", "add_rms_norm"):
            for direction in ("forward", "backward"):
                yield Case(op, direction, elements // width, width, modes=("eager",), bars={"eager": (share, faster)})
    for direction in ("forward", "backward"):
        yield Case("gated_rms_norm", direction, elements // 128, 128, modes=("eager",), bars={"eager": (share, faster)})
        yield Case("layer_norm", direction, elements // 1536, 1536, modes=("eager",), bars={"eager": (share,)})
        yield Case("l2_norm", direction, elements // 128, 128, modes=("eager",), bars={"eager": (share, faster)})


def _exact(op: str) -> Op:
    function = getattr(reference, op)
    names = (*_ROW_TENSORS[op], *{"layer_norm": ("scale", "bias"), "l2_norm": ()}.get(op, ("scale",)))
    return lambda t, style: function(*(t[name] for name in names), eps=EPS)


def _tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


FAMILY = harness.Family(tuple(_ROW_TENSORS), SUBJECT, PACKAGES, run)
