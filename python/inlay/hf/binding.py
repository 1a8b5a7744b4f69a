"""Rebinds the ``forward`` of one module instance, and takes it back.

A patched module differs from an unpatched one by entries in its ``__dict__`` and by nothing else: the bound method
``forward`` (put where an offloading hook keeps it, if there is such a hook), the module's :class:`Binding`, and a
bound ``_replicate_for_data_parallel``. Bound methods are used because Python copies them as it should: deepcopy binds
the copy's method to the copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

BINDING = "_inlay"
_REPLICATE = "_replicate_for_data_parallel"


@dataclass(eq=False)
class Change:
    """An attribute of what a module shares with others, its configuration, that is another while it is patched."""

    owner: Any
    name: str
    old: Any
    new: Any

    def make(self) -> None:
        setattr(self.owner, self.name, self.new)

    @property
    def stands(self) -> bool:
        """Whether nobody else has set it since."""
        return getattr(self.owner, self.name, None) == self.new

    def undo(self) -> None:
        if self.stands:
            setattr(self.owner, self.name, self.old)


@dataclass(frozen=True)
class Plan:
    """How one module is to be patched.

    Attributes:
        op: name of the op, as in ``patch(ops=...)``.
        forward: ``forward(module, *args, **kwargs)``. Its ``__name__`` must be "forward", see :class:`Binding`.
        spec: what ``forward`` needs to know. Immutable: modules and copies of models share it.
        change: what else patching changes, or None.
    """

    op: str
    forward: Callable[..., Any]
    spec: Any
    change: Change | None = None


@dataclass(eq=False)
class Binding:
    """The plan a module is patched with, and its counters.

    A deep copy of a patched model is patched, with counters of its own. A pickled one is not, so that the file loads
    where Inlay is not installed: a binding pickles as None, or as what undoes its change and gives None, and a bound
    method pickles as ``getattr(module, name)``, which the half-built module answers with its class's own ``forward``.
    """

    plan: Plan
    path: str
    strict: bool
    had_instance_forward: bool
    change: Change | None
    calls: Counter[torch.device] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def count_call(self, device: torch.device) -> None:
        if not torch.compiler.is_compiling():  # a changing counter would make compiled code recompile
            self.calls[device] += 1

    def count_fallback(self, reason: str) -> None:
        if self.strict:
            raise RuntimeError(f"inlay: {self.plan.op} of {self.path or 'the root module'} fell back: {reason}")
        if not torch.compiler.is_compiling():
            self.fallbacks[reason] += 1

    def __deepcopy__(self, memo: dict) -> Binding:
        change = deepcopy(self.change, memo)
        return Binding(self.plan, self.path, self.strict, self.had_instance_forward, change)

    def __reduce__(self) -> tuple:
        if self.change is None or not self.change.stands:
            return type(None), ()
        return setattr, (self.change.owner, self.change.name, self.change.old)


def binding_of(module: nn.Module) -> Binding | None:
    return getattr(module, BINDING, None)


def foreign_forward(module: nn.Module) -> str | None:
    """Says what replaced the module's own forward, or None if it is its class's own."""
    holder, name = next(_slots(module))
    current = vars(holder).get(name)
    if current is None or current == MethodType(type(module).forward, module):
        return None
    function = getattr(current, "__func__", current)
    return f"its forward was replaced by {getattr(function, '__module__', type(function).__module__)}"


def bind(module: nn.Module, plan: Plan, path: str, strict: bool) -> None:
    """Puts ``plan.forward`` where the class's own forward is. Call only when :func:`foreign_forward` is None."""
    holder, name = next(_slots(module))
    binding = Binding(plan, path, strict, name in vars(holder), plan.change)
    vars(holder)[name] = MethodType(plan.forward, module)
    vars(module).update({_REPLICATE: MethodType(_replicate_for_data_parallel, module), BINDING: binding})
    if plan.change is not None:
        plan.change.make()


def unbind(module: nn.Module) -> None:
    """Restores the module's own forward, wherever hooks installed or removed since have moved it.

    Hooks of other packages stay. Should something else still hold our method, that method finds no binding any more
    and calls the class's own forward.
    """
    binding = vars(module).pop(BINDING)
    vars(module).pop(_REPLICATE, None)
    for holder, name in _slots(module):
        if getattr(vars(holder).get(name), "__func__", None) is not binding.plan.forward:
            continue
        if holder is module and name == "forward" and not binding.had_instance_forward:
            del vars(module)["forward"]
        else:
            vars(holder)[name] = MethodType(type(module).forward, module)
    if binding.change is not None:
        binding.change.undo()


def _slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a module's own forward can be, innermost first: within accelerate's or diffusers' hooks, on the module."""
    if "_old_forward" in vars(module):
        yield module, "_old_forward"
    hooks = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", None)
    if hooks:
        yield hooks[0], "forward" if hooks[0].original_forward is None else "original_forward"
    yield module, "forward"


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """A replica shares the original's ``__dict__`` entries; its forward must be bound to the replica."""
    replica = type(self)._replicate_for_data_parallel(self)
    for holder, name in _slots(replica):
        method = vars(holder).get(name)
        if holder is replica and getattr(method, "__self__", None) is self:
            vars(replica)[name] = MethodType(method.__func__, replica)
    return replica


_replicate_for_data_parallel.__name__ = _REPLICATE
