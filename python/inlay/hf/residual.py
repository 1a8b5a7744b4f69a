"""Fuses the residual add with the norm that follows it, inside a layer's own ``forward``.

A pre-norm layer reads, in any model and any transformers release::

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

The layer's own source is rewritten at exactly these places and nowhere else, into::

    hidden_states, _inlay_normed = _inlay_add_norm(self, 'post_attention_layernorm', residual, hidden_states)
    residual = hidden_states
    hidden_states = _inlay_normed

so that everything else of the layer stays its own: caches, routers, extra arguments, whatever a release adds. The sum
and the norm are still computed by the module where a call cannot be fused (:func:`add_norm`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.hf import norms
from inlay.hf.binding import Plan, binding_of
from inlay.hf.recognise import NormSpec, Setting, recognise
from inlay.hf.rewrite import Edited, rewrite
from inlay.ops.norm import add_rms_norm

OPS = ("add_rms_norm",)


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a layer that adds a residual and then calls one of its RMSNorms; why not; None for other modules."""
    found = {name: recognise(child) for name, child in module.named_children()}
    specs = {name: spec for name, spec in found.items() if isinstance(spec, NormSpec) and spec.op == "rms_norm"}
    if not specs:
        return None
    forward = _forward_for(type(module).forward, frozenset(specs))
    return Plan("add_rms_norm", forward, _LayerSpec(specs)) if callable(forward) else forward


@dataclass(frozen=True, eq=False)
class _LayerSpec:
    norms: dict[str, NormSpec]

    def __deepcopy__(self, memo: dict) -> _LayerSpec:
        return self


def add_norm(layer: nn.Module, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``h = a + b`` and ``layer.<name>(h)``, in one op where that gives what the two steps give."""
    norm = getattr(layer, name)
    binding = binding_of(layer)
    if binding is not None:
        spec = binding.plan.spec.norms[name]
        setting = _setting(norm, spec, a, b)
        if isinstance(setting, Setting):
            y, h = add_rms_norm(b, a, *norms.vectors(norm, spec), eps=getattr(norm, spec.eps), **setting.options)
            binding.count_call(h.device)
            return h, y
        binding.count_fallback(f"{name}: {setting}")
    h = a + b
    return h, norm(h)


def _setting(norm: nn.Module, spec: NormSpec, a: Any, b: Any) -> Setting | str:
    """How to compute the norm together with the add, or why it has to be called as a module."""
    reason = norms.call_reason(norm, spec)
    if reason is not None:
        return reason
    if type(a) is not Tensor or type(b) is not Tensor:
        return f"adds a {type(a).__name__} and a {type(b).__name__}"
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return "the residual and the sublayer's output differ in dtype, shape or device"
    if not (a.is_contiguous() and b.is_contiguous()):
        return "the residual or the sublayer's output is not contiguous"
    setting = norms.setting_for(spec, a, *norms.vectors(norm, spec))
    if isinstance(setting, Setting) and setting.widen:
        return "its result is wider than the residual"
    return setting


@functools.cache
def _forward_for(original: Callable, names: frozenset[str]) -> Callable | str | None:
    """The instance forward for layers whose class's forward is ``original``."""
    rewritten = _fused(original, names)
    if not callable(rewritten):
        return rewritten
    derived: dict[Callable, Callable | str | None] = {}

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = type(self).forward
        if current is original:
            return rewritten(self, *args, **kwargs)
        # The layer's class changed after patching: FSDP2 derives one, whose forward may wrap the original once more.
        if current not in derived and not torch.compiler.is_compiling():
            derived[current] = _fused(current, names)
        function = derived.get(current)
        return (function if callable(function) else current)(self, *args, **kwargs)

    return forward


def _fused(function: Callable, names: frozenset[str]) -> Callable | str | None:
    """``function`` with every residual add before one of the norms fused; why not; None if it adds no residual."""
    return rewrite(function, functools.partial(_fuse_all, names=names), {"_inlay_add_norm": add_norm})


def _fuse_all(definition: ast.FunctionDef, names: frozenset[str]) -> Edited | str | None:
    arguments = definition.args.posonlyargs + definition.args.args
    if not arguments:
        return None
    layer = arguments[0].arg
    fused = [name for body in list(_bodies(definition)) for name in _fuse(body, layer, names)]
    if fused:
        return Edited("fused " + ", ".join(fused))
    nodes = list(ast.walk(definition))
    sums = {addition[0] for addition in map(_addition, nodes) if addition}
    norms_called = {call[1] for node in nodes for total in sums if (call := _norm_call(node, layer, total))}
    return "no residual add of its forward is directly followed by an RMSNorm" if norms_called & names else None


def _bodies(definition: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """Every list of statements in the function, nested ones included."""
    for node in ast.walk(definition):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield value


def _fuse(body: list[ast.stmt], layer: str, names: frozenset[str]) -> Iterator[str]:
    """Rewrites each ``h = a + b; [r = h;] y = layer.norm(h)`` in place, and yields the norms' names."""
    for index, statement in enumerate(body):
        addition = _addition(statement)
        if addition is None:
            continue
        total, a, b = addition
        at = index + 1
        if at < len(body) and _is_alias(body[at], total):
            at += 1
        call = _norm_call(body[at], layer, total) if at < len(body) else None
        if call is None or call[1] not in names:
            continue
        target, name = call
        body[index] = _statement(f"{total}, _inlay_normed = _inlay_add_norm({layer}, {name!r}, {a}, {b})")
        body[at] = _statement(f"{target} = _inlay_normed")
        yield name


def _statement(source: str) -> ast.stmt:
    return ast.parse(source).body[0]


def _addition(node: ast.AST) -> tuple[str, str, str] | None:
    """The names or sources of h, a and b, for ``h = a + b``."""
    match node:
        case ast.Assign(targets=[ast.Name(id=total)], value=ast.BinOp(left=a, op=ast.Add(), right=b)):
            return total, ast.unparse(a), ast.unparse(b)
    return None


def _is_alias(node: ast.AST, total: str) -> bool:
    """``r = h``."""
    match node:
        case ast.Assign(targets=[ast.Name()], value=ast.Name(id=name)):
            return name == total
    return False


def _norm_call(node: ast.AST, layer: str, total: str) -> tuple[str, str] | None:
    """The names y and norm, for ``y = layer.norm(h)``."""
    match node:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[ast.Name(id=argument)], keywords=[]
            ),
        ) if owner == layer and argument == total:
            return target, name
    return None
