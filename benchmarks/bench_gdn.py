"""Gated delta rule benchmarks: whole sequences, decoding and gates, ours beside every rival on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.comparison import SUBJECT, compare, differing
from benchmarks.gdn_rivals import IMPLEMENTATIONS, INPUTS, PACKAGES, Converted, Op, Tensors, layer_key_heads
from benchmarks.harness import Bar, Call, Options, Row
from inlay import reference

_DTYPE = torch.bfloat16
# Relative L2 of each result, for a rival to count as computing the same thing in bf16. A backward's include those of
# the gates, differences of sums that nearly cancel.
_TOLERANCE = {"forward": 0.02, "backward": 0.05}
_LEAVES = {"gdn_gates": ("a", "b", "A_log", "dt_bias"), "gated_delta_rule": INPUTS}
_CONV_WIDTH = 4
_HEAD_DIM = 128  # of keys and of values, as in every Qwen model

# Batch, tokens, key heads, value heads, and what the forward and the backward may take in ms; None: not a case. Short
# ones first, so that rivals with little time left, or with much to compile, leave out the long ones.
_RULE: tuple[tuple[tuple[int, int, int, int], float, float | None], ...] = (
    ((1, 2048, 16, 16), 0.076, 0.110),
    ((8, 1024, 16, 32), 0.103, 0.42),
    ((1, 8192, 16, 32), 0.22, 0.44),
    ((4, 4096, 16, 32), 0.185, 0.78),
    ((1, 32768, 16, 32), 0.62, 1.50),
    ((1, 32768, 16, 64), 1.4, None),
)
# Of log sigmoids of normal values. In 64 tokens a state decays by exp(-3), as in a trained Qwen, or by exp(-200).
_GATES = {"weak": 1 / 16, "strong": 4.0}


@dataclass(frozen=True)
class Case:
    op: str
    direction: str
    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    gates: str = "weak"
    modes: tuple[str, ...] = ("graph", "eager")
    bars: dict[str, tuple[Bar, ...]] = field(default_factory=dict)  # per mode

    @property
    def channels(self) -> int:
        """Of the convolution in front of the rule."""
        return (2 * self.key_heads + self.value_heads) * _HEAD_DIM

    def __str__(self) -> str:
        strong = " strong gates" if self.gates == "strong" else ""
        return f"{self.op} {self.direction} {self.batch}x{self.tokens} {self.key_heads}/{self.value_heads}{strong}"

    def tensors(self, device: str) -> Tensors:
        """Inputs and, for the rule's backward, "do", the gradient of its output."""

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
            "g": F.logsigmoid(normal(*rows, self.value_heads, dtype=torch.float32)) * _GATES[self.gates],
            "beta": normal(*rows, self.value_heads).sigmoid(),
        }
        if self.op == "gated_delta_step":
            tensors["state"] = normal(*state, dtype=torch.float32)
        elif self.direction == "backward":
            tensors["do"] = normal(*rows, self.value_heads, _HEAD_DIM)
        return tensors

    def bytes(self) -> int:
        """Inputs read once and outputs written once; a backward writes a gradient for each input."""
        sizes = {name: t.numel() * t.element_size() for name, t in self.tensors("meta").items()}
        once = sum(sizes.values())
        if self.op == "gdn_gates":
            gates = self.batch * self.tokens * self.value_heads * (4 + _DTYPE.itemsize)
            return 2 * once + gates if self.direction == "backward" else once + gates
        output = self.batch * self.tokens * self.value_heads * _HEAD_DIM * _DTYPE.itemsize
        if self.direction == "backward":
            return 2 * once - output
        states = self.batch * self.value_heads * _HEAD_DIM**2 * 4  # the final ones of a rule
        conv_states = sizes.get("conv_state", 0)
        return once + output + states + conv_states

    def call(self, op: Op | Converted, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd.

        Forwards of the rule write the final state too. Its backward is a training step's: no gradient arrives there.
        """
        if isinstance(op, Converted):
            if self.direction == "backward":
                raise NotImplementedError("forward only")
            tensors, op = op.convert(tensors), op.function
        if self.direction == "forward":
            return torch.no_grad()(lambda: _tuple(op(tensors)))
        leaves = {name: tensors[name].detach().requires_grad_() for name in _LEAVES[self.op]}
        outputs = _tuple(op({**tensors, **leaves}))
        if self.op == "gated_delta_rule":
            outputs, douts = outputs[:1], (tensors["do"].to(outputs[0].dtype),)
        else:
            douts = tuple(torch.ones_like(output) for output in outputs)
        inputs = tuple(leaves.values())
        return lambda: torch.autograd.grad(outputs, inputs, douts, retain_graph=True)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference's, in float32."""
        return self.call(_reference(self.op), {name: tensor.float() for name, tensor in tensors.items()})()

    def difference(self, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
        return differing(zip(results, exact, strict=True), _TOLERANCE[self.direction])


def run(options: Options) -> Iterator[Row]:
    return compare(IMPLEMENTATIONS, options, _cases(options.device, options.quick))


def _cases(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield from _cpu_cases(quick)
        return
    for shape, forward, backward in _RULE:
        if quick and shape[:2] != (1, 8192):
            continue
        for direction, limit in (("forward", forward), ("backward", backward)):
            if limit is not None:
                bars = dict.fromkeys(("graph", "eager"), (harness.at_most_ms(limit),))
                for gates in _GATES:
                    yield Case("gated_delta_rule", direction, *shape, gates=gates, bars=bars)
    for heads in [(16, 32)] if quick else [(16, 32), (16, 16), (16, 64)]:
        yield from _step_cases(*heads)
        for direction in ("forward", "backward"):
            yield Case("gdn_gates", direction, 1, 8192, *heads)


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
        return lambda t: reference.gated_delta_rule(
            *(t[name] for name in INPUTS), l2norm_qk=True, output_final_state=True
        )
    if op == "gdn_layer_step":
        return lambda t: reference.gdn_layer_step(**t, conv_bias=None, key_heads=layer_key_heads(t))
    return lambda t: reference.gated_delta_step(*(t[name] for name in INPUTS), t["state"], l2norm_qk=True)


def _tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


FAMILY = harness.Family(("gdn_gates", "gated_delta_rule", "gated_delta_step", "gdn_layer_step"), SUBJECT, PACKAGES, run)
