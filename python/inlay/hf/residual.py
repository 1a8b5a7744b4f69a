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

import __future__

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from inlay.hf import norms
from inlay.hf.binding import Plan, binding_of
from inlay.hf.recognise import NormSpec, Setting, recognise
from inlay.ops.norm import add_rms_norm

OPS = ("add_rms_norm",)


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a layer that adds a residual and then calls one of its RMSNorms; why not; None for other modules."""
    specs = {name: recognise(child) for name, child in module.named_children()}
    specs = {name: spec for name, spec in specs.items() if isinstance(spec, NormSpec) and spec.op == "rms_norm"}
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
    if type(norm) is not spec.cls:
        return f"it is a {type(norm).__name__} now"
    own = vars(norm).get("forward")
    if own is not None and getattr(own, "__func__", None) not in (norms.forward, spec.cls.forward):
        return "its forward is wrapped"
    if _has_hooks(norm):
        return "it has hooks"
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


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


@functools.cache
def _forward_for(original: Callable, names: frozenset[str]) -> Callable | str | None:
    """The instance forward for layers whose class's forward is ``original``."""
    rewritten = _rewrite(original, names)
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
            derived[current] = _rewrite(current, names)
        function = derived.get(current)
        return (function if callable(function) else current)(self, *args, **kwargs)

    return forward


def _rewrite(function: Callable, names: frozenset[str]) -> Callable | str | None:
    """``function`` with its decorators and every residual add before one of the norms fused; None if it has none."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return _rewrite_plain(function, names)
    inner = _rewrite(wrapped, names)
    if not callable(inner):
        return inner
    # A decorator's wrapper reaches what it wraps through its closure: the same wrapper around another function is the
    # same code with another cell.
    cells = getattr(function, "__closure__", None) or ()
    closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    if closure == cells:
        return "its forward has a decorator that cannot be put around another function"
    return _like(function, function.__code__, closure, __wrapped__=inner)


def _rewrite_plain(function: Callable, names: frozenset[str]) -> Callable | str | None:
    if not isinstance(function, FunctionType):
        return f"its forward is a {type(function).__name__}, not a Python function"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        return f"the source of its forward cannot be read: {error}"
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != function.__name__:
        return "the source of its forward is not a function definition"
    definition.decorator_list = []
    layer = definition.args.args[0].arg
    fused = [name for body in list(_bodies(definition)) for name in _fuse(body, layer, names)]
    if fused:
        return _compile(function, definition, fused)
    sums = {_sum_target(node) for node in ast.walk(definition)} - {None}
    if any(_norm_called(node, layer, total) in names for node in ast.walk(definition) for total in sums):
        return "no residual add of its forward is directly followed by an RMSNorm"
    return None


def _bodies(definition: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """Every list of statements in the function, nested ones included."""
    for node in ast.walk(definition):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield value


def _fuse(body: list[ast.stmt], layer: str, names: frozenset[str]) -> Iterator[str]:
    """Rewrites each ``h = a + b; [r = h;] y = layer.norm(h)`` in place and yields the norms' names."""
    for index, statement in enumerate(body):
        total = _sum_target(statement)
        if total is None:
            continue
        at = index + 1
        if at < len(body) and _is_alias(body[at], total):
            at += 1
        name = _norm_called(body[at], layer, total) if at < len(body) else None
        if name not in names:
            continue
        addition, normed = statement.value, body[at]
        call = f"{total}, _inlay_normed = _inlay_add_norm({layer}, {name!r}, 0, 0)"
        statement = ast.parse(call).body[0]
        statement.value.args[2:] = [addition.left, addition.right]
        body[index] = statement
        normed.value = ast.Name("_inlay_normed", ast.Load())
        yield name


def _sum_target(node: ast.AST) -> str | None:
    """h, for ``h = a + b``."""
    match node:
        case ast.Assign(targets=[ast.Name(id=total)], value=ast.BinOp(op=ast.Add())):
            return total
    return None


def _is_alias(node: ast.AST, total: str) -> bool:
    """``r = h``."""
    match node:
        case ast.Assign(targets=[ast.Name()], value=ast.Name(id=name)):
            return name == total
    return False


def _norm_called(node: ast.AST, layer: str, total: str) -> str | None:
    """norm, for ``y = layer.norm(h)``."""
    match node:
        case ast.Assign(
            targets=[ast.Name()],
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[ast.Name(id=argument)], keywords=[]
            ),
        ) if owner == layer and argument == total:
            return name
    return None


_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


def _compile(function: FunctionType, definition: ast.FunctionDef, fused: list[str]) -> FunctionType:
    """The rewritten definition as a function that shares the original's globals, closure, defaults and attributes."""
    *_, owner, _ = ("", *function.__qualname__.split("."))
    # The class around it makes the compiler mangle names and resolve super() as it did for the original.
    free = ", ".join(name for name in function.__code__.co_freevars if name != "__class__")
    body = textwrap.indent(ast.unparse(ast.fix_missing_locations(definition)), " " * 8)
    source = f"def scope(_inlay_add_norm, {free}):\n    class {owner or 'scope'}:\n{body}\n"
    filename = f"<inlay: {function.__module__}.{function.__qualname__}, {', '.join(fused)}>"
    # Tracebacks and inspect.getsource show the rewritten text.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = function.__code__.co_flags & _FUTURE_FLAGS
    code = _code_named(compile(source, filename, "exec", flags, dont_inherit=True), function.__name__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells["_inlay_add_norm"] = CellType(add_norm)
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def _code_named(code: CodeType, name: str) -> CodeType:
    scope = next(const for const in code.co_consts if isinstance(const, CodeType))
    owner = next(const for const in scope.co_consts if isinstance(const, CodeType))
    return next(const for const in owner.co_consts if isinstance(const, CodeType) and const.co_name == name)


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...], **attributes: Any) -> FunctionType:
    """``function`` with other code and closure."""
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    vars(copy).update(attributes)
    return copy
