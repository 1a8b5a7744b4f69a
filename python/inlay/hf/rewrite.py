"""Compiles an edited copy of a method from its own source, keeping its decorators, closure, globals and defaults."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

# Edits a definition in place. Returns a word on what was done, for the file name; or, if there is nothing to do, the
# reason why, or None.
Edit = Callable[[ast.FunctionDef], "Edited | str | None"]


class Edited(str):
    """What an edit did."""


def rewrite(function: Callable, edit: Edit, helpers: dict[str, Callable]) -> Callable | str | None:
    """``function`` as edited; or why it cannot be; or None if the edit found nothing to do and no reason to say so.

    Args:
        function: a method, possibly decorated.
        edit: is given the method's definition, without its decorators.
        helpers: functions that the edited source may call by these names.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return _rewrite_definition(function, edit, helpers)
    inner = rewrite(wrapped, edit, helpers)
    return _rewrapped(function, wrapped, inner) if callable(inner) else inner


def with_eager_functions(function: Callable, replaced: dict[str, Any] | None = None) -> Callable | str:
    """``function``, calling undecorated versions of the decorated functions that it calls; or why that cannot be made.

    transformers puts wrappers around functions that call another package's kernels where that package is installed.

    Args:
        function: a method, possibly decorated.
        replaced: globals that it is to find instead of its own.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        inner = with_eager_functions(wrapped, replaced)
        return _rewrapped(function, wrapped, inner) if callable(inner) else inner
    if not isinstance(function, FunctionType):
        return f"its forward is a {type(function).__name__}, not a Python function"
    names = {*function.__code__.co_names} & function.__globals__.keys()
    eager = {name: _eager(value) for name in names if callable(value := function.__globals__[name])}
    return _like(
        function, function.__code__, function.__closure__, {**function.__globals__, **eager, **(replaced or {})}
    )


def _eager(function: Callable) -> Callable:
    """What decorators stand around. The package kernels makes a function a module with it in its forward's closure."""
    if isinstance(function, nn.Module):
        contents = [cell.cell_contents for cell in getattr(type(function).forward, "__closure__", None) or ()]
        inner = [content for content in contents if isinstance(content, FunctionType)]
        function = inner[0] if len(inner) == 1 else function
    return inspect.unwrap(function)


def _rewrapped(function: Callable, wrapped: Callable, inner: Callable) -> Callable | str:
    """The decorator that made ``function`` from ``wrapped``, around ``inner`` instead."""
    # A decorator's wrapper reaches what it wraps through its closure, so the same wrapper around another function is
    # the same code with another cell. Wrappers that ask who they are still find the original (transformers'
    # checkpointing does, to see whether it is the outermost).
    cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
    closure = tuple(CellType(inner) if _holds(cell, wrapped) else cell for cell in cells)
    if not isinstance(function, FunctionType) or closure == cells:
        return "its forward has a decorator that cannot be put around another function"
    return _like(function, function.__code__, closure, __wrapped__=inner)


def _rewrite_definition(function: Callable, edit: Edit, helpers: dict[str, Callable]) -> Callable | str | None:
    if not isinstance(function, FunctionType):
        return f"its forward is a {type(function).__name__}, not a Python function"
    try:
        source = inspect.getsource(function)
        definition, unedited = _definition(source), _definition(source)
    except (OSError, TypeError, SyntaxError) as error:
        return f"the source of its forward cannot be read: {error}"
    done = edit(definition)
    if not isinstance(done, Edited):
        return done
    if _words(_compile(function, unedited, helpers, "unedited")) != _words(function.__code__):
        return "the source of its forward is not the code that runs"
    code = _compile(function, definition, helpers, done)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(helper) for name, helper in helpers.items()}
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def _definition(source: str) -> ast.FunctionDef:
    """The definition without its decorators. Not dedented first: that would change strings of several lines."""
    module = ast.parse("if True:\n" + source if source[0].isspace() else source)
    definition = next(node for node in ast.walk(module) if isinstance(node, ast.stmt) and not isinstance(node, ast.If))
    if not isinstance(definition, ast.FunctionDef):
        raise SyntaxError("not a function definition")
    definition.decorator_list = []
    return definition


_FUTURES = [getattr(__future__, name).compiler_flag for name in __future__.all_feature_names]


def _compile(function: FunctionType, definition: ast.FunctionDef, helpers: dict[str, Callable], what: str) -> CodeType:
    """The definition's code, compiled in a scope like the original's."""
    # Free variables and helpers are arguments of a function around it. The class in between makes the compiler mangle
    # private names and resolve super() as it did for the original.
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    owner = function.__qualname__.split(".")[-2:][0]
    scope = ast.parse(
        f"def scope({', '.join([*free, *helpers])}):\n class {owner if owner.isidentifier() else '_'}: pass"
    )
    next(node for node in ast.walk(scope) if isinstance(node, ast.ClassDef)).body = [definition]
    source = ast.unparse(scope)
    filename = f"<inlay: {function.__module__}.{function.__qualname__}, {what}>"
    # For tracebacks and inspect.getsource.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = sum(flag for flag in _FUTURES if function.__code__.co_flags & flag)
    code = compile(source, filename, "exec", flags, dont_inherit=True)
    for _ in ("scope", "class", "method"):
        code = [const for const in code.co_consts if isinstance(const, CodeType)][-1]
    return code


def _words(code: CodeType) -> tuple:
    """What tells one version of a function from another: names and constants.

    Not the bytecode: the compiler treats names that the module imports differently, and here it does not see those.
    """
    return code.co_names, code.co_varnames, [const for const in code.co_consts if not isinstance(const, CodeType)]


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _like(
    function: FunctionType,
    code: CodeType,
    closure: tuple[CellType, ...] | None,
    module_globals: dict[str, Any] | None = None,
    **attributes: Any,
) -> FunctionType:
    """``function`` with other code, closure and globals."""
    module_globals = function.__globals__ if module_globals is None else module_globals
    copy = FunctionType(code, module_globals, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del vars(copy)["__wrapped__"]
    vars(copy).update(attributes)
    return copy
