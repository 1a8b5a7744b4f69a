"""Gated delta rule benchmarks: whole sequences, decoding and gates, ours beside every rival on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare
from benchmarks.gdn_rivals import IMPLEMENTATIONS, INPUTS, PACKAGES, Op, Tensors, layer_key_heads
from benchmarks.harness import Bar, Call, Options, Row
from inlay import reference

_DTYPE = torch.bfloat16
_TOLERANCE = 0.02  # relative L2, for a rival to count as computing the same thing in bf16
_LEAVES = {"gdn_gates": ("a", "b", "A_log", "dt_bias"), "gated_delta_rule": INPUTS}
_CONV_WIDTH = 4
_HEAD_DIM = 128  # of keys and of values, as in every Qwen model


@dataclass(frozen=True)
class Case:
    op: str
    direction: str
    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    @property
    def channels(self) -> int:
        """Of the convolution in front of the rule."""
        return (2 * self.key_heads + self.value_heads) * _HEAD_DIM

    def __str__(self) -> str:
        return f"{self.op} {self.direction} {self.batch}x{self.tokens} {self.key_heads}/{self.value_heads}"

    def tensors(self, device: str) -> Tensors:
        """Strengths of decay as Qwen's: many tokens to forget most of a state."""

        def normal(*sizes: int, dtype: torch.dtype = _DTYPE) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype)

        rows = (self.batch, self.tokens)
        if self.op == "gdn_gates":
            vectors = {name: normal(self.value_heads) for name in ("A_log", "dt_bias")}
            return {"a": normal(*rows, self.value_heads), "b": normal(*rows, self.value_heads), **vectors}
        state = (self.batch, self.value_heads, _HEAD_DIM, _HEAD_DIM)
        if self.op == "gdn_layer_step":
            return {
                "mixed_qkv": normal(*rows, self.channels),
                "z": normal(*rows, self.value_heads, _HEAD_DIM),
                "a": normal(*rows, self.value_heads),
                "b": normal(*rows, self.value_heads),
                "conv_weight": normal(self.channels, _CONV_WIDTH) / 2,
                "A_log": normal(self.value_heads),
                "dt_bias": normal(self.value_heads),
                "norm_weight": normal(_HEAD_DIM),
                "conv_state": normal(self.batch, self.channels, _CONV_WIDTH),
                "state": normal(*state, dtype=torch.float32),
            }
        tensors = {
            "q": normal(*rows, self.key_heads, _HEAD_DIM),
            "k": normal(*rows, self.key_heads, _HEAD_DIM),
            "v": normal(*rows, self.value_heads, _HEAD_DIM),
            "g": F.logsigmoid(normal(*rows, self.value_heads, dtype=torch.float32)) / 16,
            "beta": normal(*rows, self.value_heads).sigmoid(),
        }
        if self.op == "gated_delta_step":
            tensors["state"] = normal(*state, dtype=torch.float32)
        return tensors

    def bytes(self) -> int:
        """Inputs read once and outputs written once; a backward reads and writes as much again for the gradients."""
        once = sum(t.numel() * t.element_size() for t in self.tensors("meta").values())
        if self.op == "gdn_gates":
            gates = self.batch * self.tokens * self.value_heads * (4 + _DTYPE.itemsize)
            return 2 * once + gates if self.direction == "backward" else once + gates
        output = self.batch * self.tokens * self.value_heads * _HEAD_DIM * _DTYPE.itemsize
        written = {"gated_delta_rule": 0, "gated_delta_step": self.batch * self.value_heads * _HEAD_DIM**2 * 4}
        written["gdn_layer_step"] = written["gated_delta_step"]
        written["gdn_layer_step"] += self.batch * self.channels * _CONV_WIDTH * _DTYPE.itemsize
        return (2 * once if self.direction == "backward" else once) + output + written[self.op]

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: _tuple(op(tensors)))
        leaves = {name: tensors[name].detach().requires_grad_() for name in _LEAVES[self.op]}
        outputs = _tuple(op({**tensors, **leaves}))
        inputs, douts = tuple(leaves.values()), tuple(torch.ones_like(output) for output in outputs)
        return lambda: torch.autograd.grad(outputs, inputs, douts, retain_graph=True)

    def agrees(self, results: tuple[Tensor, ...], tensors: Tensors) -> bool:
        """Whether the call's results are the reference's, in float32."""
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        expected = self.call(_reference(self.op), wide)()
        pairs = zip(results, expected, strict=True)
        return all((a.double() - e.double()).norm() <= _TOLERANCE * e.double().norm() for a, e in pairs)


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick))


def _cases(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    heads = [(16, 32)] if quick else [(16, 16), (16, 32), (16, 64)]
    rows = [(1, 8192)] if quick else [(1, 2048), (1, 8192), (1, 32768), (8, 4096)]
    for key_heads, value_heads in heads:
        for batch, tokens in rows:
            for direction in ("forward", "backward"):
                yield Case("gated_delta_rule", direction, batch, tokens, key_heads, value_heads)
        yield from _step_cases(key_heads, value_heads)
        for direction in ("forward", "backward"):
            yield Case("gdn_gates", direction, 1, 8192, key_heads, value_heads)


def _step_cases(key_heads: int, value_heads: int) -> Iterator[Case]:
    """Decoding: bound by latency for one sequence, by the states' bytes for many."""
    judged = (key_heads, value_heads) == (16, 32)
    bars: dict[int, Bar] = {
        1: harness.at_most_us(5.0),
        32: harness.at_least_copy(0.82),
        256: harness.at_least_copy(0.94),
    }
    for batch in (1, 8, 32, 64, 256):
        bar = {"graph": (bars[batch],)} if judged and batch in bars else {}
        yield Case("gated_delta_step", "forward", batch, 1, key_heads, value_heads, bars=bar)
    yield Case("gated_delta_step", "forward", 1, 8, key_heads, value_heads)
    yield Case("gated_delta_rule", "forward", 1, 64, key_heads, value_heads)  # few enough for the recurrence
    for batch in (1, 8, 32, 64, 256):
        bar = {"graph": (harness.at_most_us(8.0),)} if judged and batch == 1 else {}
        yield Case("gdn_layer_step", "forward", batch, 1, key_heads, value_heads, bars=bar)


def _cpu_cases(quick: bool) -> Iterator[Case]:
    twice = {"eager": (harness.times_faster_than(2.0, "hf_eager"),)}
    five_times = {"eager": (harness.times_faster_than(5.0, "hf_eager"),)}
    for key_heads, value_heads in [(16, 16)] if quick else [(16, 16), (16, 32)]:
        for tokens in [256] if quick else [1024, 4096]:
            for direction in ("forward", "backward"):
                yield Case(
                    "gated_delta_rule", direction, 1, tokens, key_heads, value_heads, modes=("eager",), bars=twice
                )
        for batch in [1] if quick else [1, 4]:
            for op in ("gated_delta_step", "gdn_layer_step"):
                yield Case(op, "forward", batch, 1, key_heads, value_heads, modes=("eager",), bars=five_times)
        for direction in ("forward", "backward"):
            yield Case("gdn_gates", direction, 1, 1024, key_heads, value_heads, modes=("eager",), bars=twice)


def _reference(op: str) -> Op:
    if op == "gdn_gates":
        return lambda t: reference.gdn_gates(t["a"], t["b"], t["A_log"], t["dt_bias"])
    if op == "gated_delta_rule":
        return lambda t: reference.gated_delta_rule(*(t[name] for name in INPUTS), l2norm_qk=True)
    if op == "gdn_layer_step":
        return lambda t: reference.gdn_layer_step(**t, conv_bias=None, key_heads=layer_key_heads(t))
    return lambda t: reference.gated_delta_step(*(t[name] for name in INPUTS), t["state"], l2norm_qk=True)


def _tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


FAMILY = harness.Family(("gdn_gates", "gated_delta_rule", "gated_delta_step", "gdn_layer_step"), SUBJECT, PACKAGES, run)
