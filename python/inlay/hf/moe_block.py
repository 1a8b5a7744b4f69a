"""The forward that blocks with a shared expert are patched with: what is shared is added in the pass over the experts.

Mixture-of-experts blocks of Qwen2-MoE, Qwen3-Next and Qwen3.5-MoE, whose shared expert has a sigmoid gate, and of
DeepSeek-V3 and GLM-4-MoE, whose has none. A block without a shared expert needs no forward of its own. Whether a class
computes that is found out by experiment: its own ``forward`` runs with stand-ins for its parts, which record what they
are given. Router, shared expert and its gate are called as modules, so that recorders, adapters and hooks work as
before; the experts are not, and where they have hooks, or are wrapped, the block runs its own code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from inlay.hf import experts
from inlay.hf.binding import Plan, binding_of
from inlay.hf.norms import _has_hooks, is_plain
from inlay.hf.stand_in import uninitialised

OPS = ("moe_block",)

_GATED = {"gate", "experts", "shared_expert", "shared_expert_gate"}
_PLAIN = {"gate", "experts", "shared_experts"}


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """How a block calls its parts.

    Attributes:
        shared: name of the shared expert.
        shared_gate: name of its gate, or None.
        experts_cls: the class of the experts when the block was patched.
    """

    shared: str
    shared_gate: str | None
    experts_cls: type[nn.Module]

    def __deepcopy__(self, memo: dict) -> BlockSpec:
        return self


_known: dict[type, str | None] = {}


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a block with a shared expert; why not, for a module that looks like one; None for any other."""
    children = set(module._modules)
    if children not in (_GATED, _PLAIN) or any(True for _ in module.parameters(recurse=False)):
        return None
    inner = experts.plan(module._modules["experts"])  # type: ignore[arg-type]
    if not isinstance(inner, Plan):
        return inner if inner is None else f"its experts: {inner}"
    cls = type(module)
    if cls not in _known:
        _known[cls] = _difference(cls, children == _GATED)
    reason = _known[cls]
    if reason is not None:
        return reason
    inner_cls = type(module.experts)
    if children == _GATED:
        spec = BlockSpec("shared_expert", "shared_expert_gate", inner_cls)  # type: ignore[arg-type]
    else:
        spec = BlockSpec("shared_experts", None, inner_cls)  # type: ignore[arg-type]
    return Plan("moe_block", forward, spec)


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    binding = binding_of(self)
    if binding is None:
        return type(self).forward(self, *args, **kwargs)
    x = args[0] if len(args) == 1 and not kwargs else kwargs.get("hidden_states") if len(kwargs) == 1 else None
    reason = _reason(self, binding.plan.spec, x)
    if reason is not None:
        binding.count_fallback(reason)
        return type(self).forward(self, *args, **kwargs)
    y = _run(self, binding.plan.spec, x)
    binding.count_call(y.device)
    return y


def _reason(block: Any, spec: BlockSpec, x: Any) -> str | None:
    """Why the block's own code has to compute this call, or None. Asked before anything is computed."""
    if not isinstance(x, Tensor) or not (is_plain(x) or torch.compiler.is_compiling()):
        return "called with other arguments than tokens"
    if x.dim() != 3:
        return f"x has {x.dim()} dimensions, not 3"
    inner = block.experts
    if type(inner) is not spec.experts_cls:
        return f"its experts are a {type(inner).__name__} now"
    own = inner.forward
    function = own.__func__ if isinstance(own, MethodType) else None
    if function is not experts.forward and function is not spec.experts_cls.forward:
        return "its experts' forward is wrapped"
    if _has_hooks(inner):
        return "its experts have hooks"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast changes what is added"
    # Indices and weights are not known yet; what else the experts ask of a call is.
    flat = x.reshape(-1, x.shape[-1])
    none = flat.new_empty((flat.shape[0], 0))
    return experts.why_not(inner, flat, none.long(), none)


def _run(block: Any, spec: BlockSpec, x: Any) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    shared = getattr(block, spec.shared)(flat)
    _, weights, indices = block.gate(flat)
    gate = None if spec.shared_gate is None else getattr(block, spec.shared_gate)(flat)
    return experts.compute(block.experts, flat, indices, weights, shared, gate).view(x.shape)


class _Recorder(nn.Module):
    """Stands in for a part of a block: gives what it was told to, and keeps what it was given."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *args: Any) -> Any:
        self.calls.append(args)
        return self.make(*args)


def _difference(cls: Any, gated: bool) -> str | None:
    """What the class does otherwise than :func:`forward`, or None."""
    if list(inspect.signature(cls.forward).parameters) != ["self", "hidden_states"]:
        return "its forward takes other arguments than tokens"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, device="cpu")
    weights = torch.rand(6, 2, generator=generator, dtype=torch.float64, device="cpu")
    indices = torch.zeros(6, 2, dtype=torch.int64, device="cpu")
    block = uninitialised(cls)
    nn.Module.__init__(block)
    block.gate = _Recorder(lambda v: (weights, weights, indices))
    block.experts = _Recorder(lambda v, i, w: v.sin() * w.sum(-1, keepdim=True))
    shared = block.shared_expert = _Recorder(lambda v: v.cos())
    if gated:
        block.shared_expert_gate = _Recorder(lambda v: v[..., :1] * 2)
    else:
        del block.shared_expert
        block.shared_experts = shared
    flat = x.reshape(-1, 4)
    factor = torch.sigmoid(flat[:, :1] * 2) if gated else 1.0
    expected = flat.sin() * weights.sum(-1, keepdim=True) + factor * flat.cos()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            actual = cls.forward(block, x)
        except Exception as error:  # whatever an unknown class raises, it is not a block we know
            return f"its forward could not be tried out: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not isinstance(actual, Tensor) or not torch.allclose(actual, expected.view(2, 3, 4), rtol=1e-12, atol=1e-12):
        return "it computes something else than experts and a shared one"
    for part in block.children():
        if len(part.calls) != 1 or not torch.equal(part.calls[0][0].reshape(-1, 4), flat):
            return "it gives its parts something else than tokens"
    return None
