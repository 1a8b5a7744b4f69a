"""Every op has everything an op must have: kernels, a fake, a reference, an opcheck case, a benchmark."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import inlay
from inlay import _load, reference
from tests.system import ops
from tests.system.environment import PACKAGE

OPS = ops.registered()
# A file of inlay.ops each, or a folder of them.
FAMILIES = sorted({path.stem for path in (PACKAGE / "ops").glob("[!_]*")})


def sources(family: str) -> list[Path]:
    folder = PACKAGE / "ops" / family
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def family_of(op: str) -> str:
    """The family of ``inlay.ops`` that registers the op's fake."""
    for family in FAMILIES:
        if any(f'register_fake("inlay::{op}")' in path.read_text() for path in sources(family)):
            return family
    pytest.fail(f"no file of python/inlay/ops registers a fake for inlay::{op}")


def public_functions(family: str) -> list[str]:
    own = f"inlay.ops.{family}"
    modules = {name: getattr(getattr(inlay, name), "__module__", "") for name in inlay.__all__}
    return [name for name, module in modules.items() if module == own or module.startswith(f"{own}.")]


def test_there_are_ops() -> None:
    assert "norm" in OPS
    assert "norm" in FAMILIES


@pytest.mark.parametrize("op", OPS)
def test_kernels_and_fake(op: str) -> None:
    name = f"inlay::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    on_cuda = _load.cuda_library().loaded
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == on_cuda
    fake = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
    assert fake is not None, f"{name} has no register_fake in python/inlay/ops"


@pytest.mark.parametrize("op", OPS)
def test_opcheck_case(op: str) -> None:
    cases: ModuleType = importlib.import_module(f"tests.{family_of(op)}.test_registration")
    assert op in cases.OPCHECK_CASES, f"tests/{family_of(op)}/test_registration.py has no OPCHECK_CASES for {op}"
    assert list(cases.OPCHECK_CASES[op]("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_public_functions_have_references(family: str) -> None:
    """The same name, in the family's own reference file, with the same arguments, defaults and types."""
    functions = public_functions(family)
    assert functions, f"inlay exports no function of inlay.ops.{family}"
    for name in functions:
        public = getattr(inlay, name)
        oracle = getattr(reference, name)
        assert oracle.__module__ == f"inlay.reference.{family}"
        assert inspect.signature(public) == inspect.signature(oracle), name
        assert public.__doc__, f"inlay.{name} has no docstring"


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_imports_nothing_from_ops(family: str) -> None:
    text = (PACKAGE / "reference" / f"{family}.py").read_text()
    assert not re.search(r"^\s*(from|import) inlay\.(ops|_load)", text, re.MULTILINE)


@pytest.mark.parametrize("family", FAMILIES)
def test_benchmarks(family: str) -> None:
    """`benchmarks/run.py <family>` knows the family, and measures each of its public functions."""
    registry: ModuleType = importlib.import_module("benchmarks.registry")
    assert set(public_functions(family)) <= set(registry.FAMILIES[family].functions)
