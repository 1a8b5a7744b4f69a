"""Attention benchmarks: training, prefill and diffusion shapes, ours beside every rival on the same tensors.

Rates count two products of visible pairs in the forward and five in the backward, whatever an implementation computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.attention_rivals import IMPLEMENTATIONS, LEAVES, PACKAGES, Op, Tensors
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.harness import Bar, Call, Options, Row
from inlay import reference

# Relative L2 of each result, for a rival to count as computing the same thing.
_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
_HIDDEN, _TOKENS = 2048, 2**14  # of a batch

# Head dim, causal, length: the best rival's rate on an H200 in TFLOP/s, forward and backward; None: not a goal.
_TRAINING: dict[tuple[int, bool, int], tuple[float | None, float | None]] = {
    (64, True, 1024): (336, 323),
    (64, True, 4096): (452, 469),
    (64, True, 16384): (522, 542),
    (64, False, 16384): (551, 538),
    (128, True, 1024): (479, 364),
    (128, True, 4096): (617, 520),
    (128, True, 16384): (664, 612),
    (128, False, 1024): (599, None),
    (128, False, 16384): (702, 624),
    (256, True, 1024): (486, 295 * 1.12),
    (256, True, 4096): (669, 414 * 1.12),
    (256, True, 16384): (718, 468 * 1.12),
    (256, False, 16384): (811, 464 * 1.12),
}
# Batch, query heads, key heads, length, head dim, and the rates.
_GROUPED = (((2, 32, 8, 8192, 128), 645, 559), ((4, 16, 4, 4096, 256), 692, 396 * 1.12))
# Batch, heads, queries, keys, head dim, and what the forward may take in ms.
_DIFFUSION = (
    ((2, 8, 4096, 4096, 40), 0.85 * 0.1525),
    ((2, 8, 1024, 1024, 80), 0.85 * 0.0223),
    ((2, 8, 4096, 77, 40), 0.75 * 0.0170),
    ((2, 10, 4096, 4096, 64), 0.95 * 0.1856),
    ((1, 24, 4608, 4608, 128), 0.95 * 0.4320),
)
_CAUSAL_16K = 664.0  # a window, padding and packing are to have 0.8 of the causal rate for each visible pair
_DETERMINISTIC = Bar(
    "deterministic >= 0.85 x", lambda row, base: 0.85 * base.median_us <= row.median_us, "inlay_determ"
)


@dataclass(frozen=True)
class Case:
    direction: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = True
    feature: str = ""  # window, packed, padded, gate, sinks, softcap
    dtype: torch.dtype = torch.bfloat16
    modes: tuple[str, ...] = ("graph", "eager")
    bars: Mapping[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    @property
    def op(self) -> str:
        return "extras" if self.feature in ("gate", "sinks", "softcap") else "attention"

    def __str__(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.key_heads else f"h{self.heads}/{self.key_heads}"
        size = f"{self.queries}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        words = ["causal" if self.causal else "full", self.feature, "f32" if self.dtype == torch.float32 else ""]
        return " ".join(filter(None, (self.direction, f"b{self.batch}", heads, size, f"d{self.dim}", *words)))

    @property
    def lengths(self) -> list[int]:
        """Of packed sequences, or the rows' keys that are no padding: from a half to all."""
        if self.feature == "packed":
            eighth = self.queries // 8
            return [eighth, 2 * eighth, 0, eighth // 2, self.queries - 3 * eighth - eighth // 2]
        return [self.keys // 2 + self.keys * row // (2 * max(1, self.batch - 1)) for row in range(self.batch)]

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.causal}
        if self.feature == "window":
            options["window"] = (min(1024, self.keys // 8) - 1, None)
        if self.feature == "softcap":
            options["softcap"] = 30.0
        return options

    def tensors(self, device: str) -> Tensors:
        """Inputs and, for the backward, "dy", the gradient of y."""

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(self.dtype)

        tensors = {
            "q": normal(self.batch, self.queries, self.heads, self.dim),
            "k": normal(self.batch, self.keys, self.key_heads, self.dim),
            "v": normal(self.batch, self.keys, self.key_heads, self.dim),
        }
        if self.feature == "gate":
            tensors["gate"] = normal(self.batch, self.queries, self.heads, self.dim)
        elif self.feature == "sinks":
            tensors["sinks"] = normal(self.heads)
        elif self.feature == "packed":
            ends = torch.tensor([0, *self.lengths]).cumsum(0)
            tensors["cu_seqlens_q"] = ends.to(device, torch.int32)
        elif self.feature == "padded":
            tensors["kv_lengths"] = torch.tensor(self.lengths, dtype=torch.int32).to(device)
        if self.direction == "backward":
            tensors["dy"] = normal(self.batch, self.queries, self.heads, self.dim)
        return tensors

    def pairs(self) -> float:
        """Visible pairs of a query and a key, of one head in the whole batch."""
        if self.feature == "packed":
            return sum(replace(self, feature="", queries=n, keys=n).pairs() for n in self.lengths)
        if self.feature == "padded":
            # With a diagonal, the queries of the padding still see what lies before it.
            whole = replace(self, feature="", batch=1)
            cut = [replace(whole, queries=self.keys - n, keys=self.keys - n).pairs() for n in self.lengths]
            return sum(whole.pairs() - missing if self.causal else self.queries * n
                       for missing, n in zip(cut, self.lengths, strict=True))  # fmt: skip
        if not self.causal:
            return float(self.batch * self.queries * self.keys)
        left = self.options().get("window", (self.keys, None))[0]
        above = max(0, self.keys - left - 1)
        return self.batch * (self.queries * (self.queries + 1) - above * (above + 1)) / 2

    def flops(self) -> float:
        products = 5 if self.direction == "backward" else 2
        return products * 2 * self.pairs() * self.heads * self.dim

    def bytes(self) -> int:
        """Inputs read once and outputs written once; a backward reads y as well."""
        sizes = {name: t.numel() * t.element_size() for name, t in self.tensors("meta").items()}
        y = self.batch * self.queries * self.heads * self.dim * self.dtype.itemsize
        once = sum(sizes.values())
        return 2 * once if self.direction == "backward" else once + y

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""
        options = self.options()
        if self.direction == "forward":
            return torch.no_grad()(lambda: (op(tensors, options),))
        leaves = {name: tensors[name].detach().requires_grad_() for name in LEAVES if name in tensors}
        y = op({**tensors, **leaves}, options)
        inputs = tuple(leaves.values())
        return lambda: torch.autograd.grad((y,), inputs, (tensors["dy"],), retain_graph=True, allow_unused=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference's in float32, of the first row's first key head: all scores of more would not fit."""
        part = {name: self._part(name, tensor) for name, tensor in tensors.items()}
        wide = {name: t.float() if t.is_floating_point() else t for name, t in part.items()}
        own = replace(self, batch=1, heads=self.heads // self.key_heads, key_heads=1)
        return own.call(_reference, wide)()

    def difference(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
        names = [name for name in LEAVES if name in self.tensors("meta")] if self.direction == "backward" else ["q"]
        pairs = [
            (self._part(name, result), wanted)
            for name, result, wanted in zip(names, results, exact, strict=True)
            if result is not None and name != "sinks"  # a sink's is a sum over the whole batch
        ]
        return differing(pairs, _TOLERANCE[self.dtype])

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        group = self.heads // self.key_heads
        if name in ("cu_seqlens_q",):
            return tensor
        if name == "kv_lengths":
            return tensor[:1]
        if name == "sinks":
            return tensor[:group]
        return tensor[:1, :, : 1 if name in ("k", "v") else group]


def _reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    y = reference.attention(**{name: t for name, t in tensors.items() if name != "dy"}, **options)
    assert isinstance(y, Tensor)
    return y


def run(options: Options) -> Iterator[Row]:
    cases = _cpu_cases(options.quick) if options.device == "cpu" else _cuda_cases(options.quick)
    return compare(IMPLEMENTATIONS, options, cases)


def _cuda_cases(quick: bool) -> Iterator[Case]:
    for (dim, causal, length), rates in _TRAINING.items():
        if quick and (length != 4096 or dim != 128):
            continue
        heads = _HIDDEN // dim
        shape = (_TOKENS // length, heads, heads, length, length, dim, causal)
        yield from _both(shape, rates)
    for (batch, heads, key_heads, length, dim), *grouped_rates in _GROUPED:
        if not quick:
            yield from _both((batch, heads, key_heads, length, length, dim, True), tuple(grouped_rates))
    for feature, limit in (("gate", 1.03), ("sinks", 1.03), ("softcap", 1.15)):
        bars = {"graph": (harness.at_most_times(limit, "inlay_plain"),)}
        yield Case("forward", 4, 16, 4, 4096, 4096, 128, feature=feature, bars=bars)
        yield Case("backward", 4, 16, 4, 4096, 4096, 128, feature=feature)
    for feature, batch, length in (("window", 1, 16384), ("packed", 1, 16384), ("padded", 4, 4096)):
        bars = {"graph": (harness.at_least_tflops(0.8 * _CAUSAL_16K),)}
        yield Case("forward", batch, 16, 16, length, length, 128, feature=feature, bars=bars)
        yield Case("backward", batch, 16, 16, length, length, 128, feature=feature)
    for (batch, heads, queries, keys, dim), limit in _DIFFUSION:
        bars = {"graph": (harness.at_most_ms(round(limit, 4)),)}
        yield Case("forward", batch, heads, heads, queries, keys, dim, causal=False, bars=bars)


def _both(shape: tuple[Any, ...], rates: tuple[float | None, ...]) -> Iterator[Case]:
    for direction, rate in zip(("forward", "backward"), rates, strict=True):
        bars = () if rate is None else (harness.at_least_tflops(round(rate, 1)),)
        if direction == "backward":
            bars = (*bars, _DETERMINISTIC)
        yield Case(direction, *shape, bars={"graph": bars})


def _cpu_cases(quick: bool) -> Iterator[Case]:
    times = {"forward": 1.0, "backward": 1.5}
    shapes = [(1, 16, 16, 1024, 128), (1, 4, 4, 4096, 64)]
    for batch, heads, key_heads, length, dim in [(1, 4, 4, 256, 64)] if quick else shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for direction, factor in times.items():
                bars = {"eager": (harness.times_faster_than(factor, "sdpa"),)}
                yield Case(
                    direction, batch, heads, key_heads, length, length, dim, dtype=dtype, modes=("eager",), bars=bars
                )
    size = 256 if quick else 4096
    for feature in ("window", "packed", "gate", "sinks", "softcap"):
        for direction in times:
            yield Case(direction, 1, 4, 1, size, size, 64, feature=feature, modes=("eager",))
    for direction in times:  # one head: its cores share the queries, or the keys
        yield Case(direction, 1, 1, 1, size, size, 64, modes=("eager",))


FAMILY = harness.Family(("attention",), SUBJECT, PACKAGES, run)
