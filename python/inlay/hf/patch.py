"""``patch``, ``unpatch`` and ``patched``: which modules of a model get which op.

A family of ops is one entry of :data:`PATCHERS`: a module with ``OPS``, the names ``patch(ops=...)`` knows, and
``plan(module)``, which answers with a :class:`~inlay.hf.binding.Plan`, with the reason why a module that looks like a
case for it is left alone, or with None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from inlay.hf import attention, attention_layer, experts, gdn, moe_block, norms, residual, router
from inlay.hf.binding import Plan, bind, binding_of, foreign_forward, unbind
from inlay.hf.report import REGISTRY_OP, Entry, Report

PATCHERS = (norms, residual, gdn, attention_layer, router, experts, moe_block)
# Functions in transformers' registries, by the op that the report names.
REGISTRIES = {REGISTRY_OP: attention, "moe_experts": experts}
OPS = tuple(op for patcher in PATCHERS for op in patcher.OPS)


def patch(model: Any, ops: Iterable[str] | None = None, strict: bool = False) -> Report:
    """Sets Inlay's ops into a model, in place.

    Only the ``forward`` of module instances changes: classes, parameters, ``state_dict``, hooks and names stay, and
    :func:`unpatch` restores everything. Each call of a patched module runs Inlay's op where that gives what the
    module's own code gives, and the module's own code otherwise; the report counts both. Patching again adds nothing.

    Args:
        model: a ``torch.nn.Module``, or a diffusers pipeline, whose modules are patched.
        ops: names of the ops to set in ("rms_norm", "gated_rms_norm", "layer_norm", "add_rms_norm",
            "gdn_layer", "attention_layer", "moe_router", "moe_experts", "moe_block"); None means all.
        strict: raise ``RuntimeError`` where a patched module would fall back to its own code.

    Returns:
        What was patched, and what looks as if it could be but was not, and why. :func:`report` gives it again later.

    Raises:
        TypeError: model is not a module or a pipeline.
        ValueError: an unknown name in ops.
    """
    chosen = _chosen(ops)
    plans = []  # all made before any is carried out, as modules share what one may change
    for path, module in _modules("patch", model):
        binding = binding_of(module)
        if binding is not None:
            binding.strict = strict
            continue
        plan = _plan(module, chosen)
        if isinstance(plan, Plan):
            plans.append((path, module, plan))
    for path, module, plan in plans:
        if binding_of(module) is None:  # a pipeline's components may share modules
            bind(module, plan, path, strict)
    return report(model)


def unpatch(model: Any) -> None:
    """Takes Inlay's ops out of a model again: every module's ``forward`` is what it was before :func:`patch`."""
    for _, module in _modules("unpatch", model):
        if binding_of(module) is not None:
            unbind(module)


@contextmanager
def patched(model: Any, ops: Iterable[str] | None = None, strict: bool = False) -> Iterator[Report]:
    """``with inlay.patched(model):`` patches within the block, then unpatches what the block's start had patched."""
    before = {id(module) for _, module in _modules("patched", model) if binding_of(module) is not None}
    try:
        yield patch(model, ops, strict)
    finally:
        for _, module in _modules("patched", model):
            if binding_of(module) is not None and id(module) not in before:
                unbind(module)


def report(model: Any) -> Report:
    """What is patched in a model, with calls and fallbacks so far, and what could be or looks as if it could.

    Calls made by code that ``torch.compile`` compiled are not counted: a counter would make it recompile.
    """
    entries = []
    for path, module in _modules("report", model):
        binding = binding_of(module)
        if binding is not None:
            entries.append(Entry.patched(path, module, binding))
            continue
        registered = [(op, registry.counters_of(module)) for op, registry in REGISTRIES.items()]
        called = [(op, counters) for op, counters in registered if counters is not None]
        if called:
            for op, counters in called:
                entries.append(Entry.registered(path, module, op, counters.calls, counters.fallbacks))
            continue
        plan = _plan(module, frozenset(OPS))
        if plan is not None:
            entries.append(Entry.unpatched(path, module, plan))
    return Report(entries)


def _plan(module: nn.Module, ops: frozenset[str]) -> Plan | str | None:
    """The first plan any patcher has for the module; else the first reason why not; else None."""
    reasons = []
    for patcher in PATCHERS:
        plan = patcher.plan(module)
        if isinstance(plan, Plan):
            if plan.op not in ops:
                continue
            return foreign_forward(module) or plan
        if plan is not None:
            reasons.append(plan)
    return reasons[0] if reasons else None


def _chosen(ops: Iterable[str] | None) -> frozenset[str]:
    if ops is None:
        return frozenset(OPS)
    chosen = frozenset([ops] if isinstance(ops, str) else ops)
    if not chosen <= frozenset(OPS):
        unknown = ", ".join(sorted(map(repr, chosen - frozenset(OPS))))
        raise ValueError(f"patch: ops must be names out of {', '.join(OPS)}, got {unknown}")
    return chosen


def _modules(function: str, model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield from model.named_modules()
        return
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        expected = "a torch.nn.Module or a diffusers pipeline"
        raise TypeError(f"{function}: model must be {expected}, got {type(model).__name__}")
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield from component.named_modules(prefix=name)
