"""The experts function behind ``experts_implementation="inlay"``, and the forward that experts are patched with.

Both are :func:`inlay.moe_experts` with the arguments of transformers' experts functions: hidden_states [T, H],
top_k_index and top_k_weights [T, K]. What the op cannot compute goes to transformers' ``grouped_mm``, or to what a
patched module would have called without us; such calls are counted with the reason.

An experts module says itself how its projections are stored, in attributes that transformers' decorator sets. What is
between them is found out by experiment (:func:`gate_of`), as a class may bring its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from inlay.hf.attention import Counters
from inlay.hf.binding import Plan, binding_of
from inlay.hf.norms import device_reason, is_plain, transform_reason
from inlay.hf.stand_in import uninitialised
from inlay.ops import _checks as checks
from inlay.ops._moe_checks import ACTIVATIONS
from inlay.ops.moe import moe_experts
from inlay.reference.moe import _activated

OPS = ("moe_experts",)
NAME = "inlay"

_MODULE = "transformers.integrations.moe"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")
# Attributes that a class's own gate may read.
_NUMBERS = ("limit", "alpha", "swiglu_limit", "swiglu_alpha")

_counters: WeakKeyDictionary[nn.Module, Counters] = WeakKeyDictionary()


class Gate(NamedTuple):
    """What an experts module has between its projections, as the op's options."""

    activation: str
    interleaved: bool
    limit: float | None


class Projections(NamedTuple):
    """An experts module's parameters, as plain tensors."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def counters_of(module: nn.Module) -> Counters | None:
    """The counters of a module that has called the experts function, or None."""
    return _counters.get(module)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """For transformers' ``ExpertsInterface``."""
    reason = why_not(self, hidden_states, top_k_index, top_k_weights)
    if not torch.compiler.is_compiling():  # a changing counter would make compiled code recompile
        counters = _counters.setdefault(self, Counters())
        if reason is None:
            counters.calls[hidden_states.device] += 1
        else:
            counters.fallbacks[reason] += 1
    if reason is not None:
        grouped_mm = sys.modules[_MODULE].ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return grouped_mm(self, hidden_states, top_k_index, top_k_weights)
    return compute(self, hidden_states, top_k_index, top_k_weights)


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a module of experts; why not, for one with another gate; None for any other."""
    if not all(hasattr(module, name) for name in _FLAGS) or not hasattr(module, "_apply_gate"):
        return None
    reason = _structural_reason(module) or _gate_reason(module)
    return reason or Plan("moe_experts", forward, None)


def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    binding = binding_of(self)
    if binding is None:
        return type(self).forward(self, *args, **kwargs)
    inputs = positional(self, args, kwargs)
    reason = "called with other arguments than its class's" if inputs is None else why_not(self, *inputs)
    if inputs is None or reason is not None:
        binding.count_fallback(str(reason))
        return type(self).forward(self, *args, **kwargs)
    binding.count_call(inputs[0].device)
    return compute(self, *inputs)


def positional(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """hidden_states, indices and weights, whatever the class calls them."""
    if not kwargs:
        return args if len(args) == 3 else None  # type: ignore[return-value]
    names = _argument_names(type(module))
    if len(names) != 3 or len(args) + len(kwargs) != 3 or not kwargs.keys() <= set(names[len(args) :]):
        return None
    return (*args, *(kwargs[name] for name in names[len(args) :]))  # type: ignore[return-value]


@torch.compiler.assume_constant_result
def _argument_names(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def compute(
    module: Any,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """The module's result in x's dtype, and what is shared added to it. Ask :func:`why_not` first."""
    gate = _gate_of(module)
    assert gate is not None
    parameters = projections(module)
    dtype = parameters.down_proj.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if weights.dtype not in (dtype, wide):
        weights = weights.to(wide)
    y = moe_experts(
        x.to(dtype), indices, weights, parameters.gate_up_proj, parameters.down_proj,
        gate_up_bias=parameters.gate_up_bias, down_bias=parameters.down_bias, activation=gate.activation,
        gated=module.has_gate, interleaved=gate.interleaved, transposed=module.is_transposed, limit=gate.limit,
        shared=None if shared is None else shared.to(dtype),
        shared_gate=None if shared_gate is None else shared_gate.to(dtype), num_experts=module.num_experts,
    )  # fmt: skip
    return y.to(x.dtype)


def projections(module: Any) -> Projections:
    """Under tensor parallelism the own part of sharded parameters."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return Projections(*(_local(tensor) for tensor in (getattr(module, name), module.down_proj, *biases)))


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def why_not(module: Any, x: Tensor, indices: Tensor, weights: Tensor) -> str | None:
    """Why the op cannot compute this call, or None."""
    reason = _structural_reason(module) or _gate_reason(module)
    if reason is not None:
        return reason
    parameters = projections(module)
    named = {"x": x, "indices": indices, "weights": weights, **parameters._asdict()}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not (is_plain(tensor) or torch.compiler.is_compiling()):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device.type}, x on {x.device.type}"
    if x.dim() != 2 or indices.dim() != 2 or weights.shape != indices.shape or indices.shape[0] != x.shape[0]:
        return "tokens, indices and weights do not fit together"
    up, down = parameters.gate_up_proj, parameters.down_proj
    if up.dim() != 3 or down.dim() != 3 or up.dtype != down.dtype:
        return "its projections are not of three dimensions and one dtype"
    if up.dtype not in (*checks.HALVES_AND_FLOAT32, torch.float64):
        return f"its projections are {checks.names((up.dtype,))}"
    if not x.is_floating_point() or (x.dtype == torch.float64) != (up.dtype == torch.float64):
        return f"its projections are {checks.names((up.dtype,))}, x is {checks.names((x.dtype,))}"
    for bias in (parameters.gate_up_bias, parameters.down_bias):
        if bias is not None and bias.dtype not in (up.dtype, torch.float32):
            return f"a bias is {checks.names((bias.dtype,))}, its projections are {checks.names((up.dtype,))}"
    if up.stride(-1) != 1 or down.stride(-1) != 1:
        return "its projections are not dense in their last dimension"
    if module.is_transposed:
        up, down = up.mT, down.mT
    if up.shape[2] != x.shape[1] or up.shape[1] != down.shape[2] * (2 if module.has_gate else 1):
        return "its projections do not fit x or each other"
    if not up.shape[0] == down.shape[0] == module.num_experts:
        # Of some experts only, and nobody has told the module: indices are not those of what is here.
        return f"its projections are of {up.shape[0]} experts, not {module.num_experts}"
    return device_reason(x) or transform_reason()


def _structural_reason(module: Any) -> str | None:
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm behind each expert"
    return None


def _gate_reason(module: Any) -> str | None:
    return "what is between its projections is no activation of the op" if _gate_of(module) is None else None


def _gate_of(module: Any) -> Gate | None:
    act_fn = getattr(module, "act_fn", None)
    numbers = tuple(getattr(module, name, None) for name in _NUMBERS)
    return gate_of(type(module), None if act_fn is None else type(act_fn), module.has_gate, numbers)


_known: dict[tuple, Gate | None] = {}


@torch.compiler.assume_constant_result
def gate_of(cls: type, act_fn: type | None, gated: bool, numbers: tuple) -> Gate | None:
    """The options with which the op gives what a class of experts has between its projections; None: there are none.

    A stand-in with an activation made anew, and the same numbers, computes some values in float64.
    """
    key = cls, act_fn, gated, numbers
    if key not in _known:
        _known[key] = _by_experiment(cls, act_fn, gated, dict(zip(_NUMBERS, numbers, strict=True)))
    return _known[key]


def _by_experiment(cls: Any, act_fn: Any, gated: bool, numbers: dict[str, Any]) -> Gate | None:
    twin = uninitialised(cls)
    nn.Module.__init__(twin)
    twin.__dict__.update({name: value for name, value in numbers.items() if value is not None})
    limits = [numbers[name] for name in ("limit", "swiglu_limit") if isinstance(numbers[name], (int, float))]
    generator = torch.Generator().manual_seed(0)
    size = max([2.0, *map(float, limits)])
    h = size * torch.randn(64, 16, generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            if act_fn is not None:
                twin.act_fn = act_fn()
            expected = cls._apply_gate(twin, h) if gated else twin.act_fn(h)
        except Exception:  # whatever an unknown class raises, it is not a gate we know
            return None
        for gate in _candidates(gated, limits):
            actual = _activated(h, gate.activation, gated, gate.interleaved, gate.limit)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9, atol=1e-9):
                return gate
    return None


def _candidates(gated: bool, limits: list[float]) -> Iterator[Gate]:
    for activation, interleaved, limit in product(ACTIVATIONS, (False, True), (None, *limits)):
        if gated or not (interleaved or activation == "gpt_oss"):
            yield Gate(activation, interleaved, limit)
