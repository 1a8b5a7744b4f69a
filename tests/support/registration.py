"""What the test_registration.py of every family asks, whatever its ops compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


def check_op(op: str, cases: Iterable[tuple[Any, ...]]) -> None:
    """Schema against behaviour, autograd registration, fake against real, and tracing with dynamic shapes."""
    for arguments in cases:
        torch.library.opcheck(getattr(torch.ops.inlay, op).default, arguments)


def check_enums(native_function: str, *enums: type[IntEnum]) -> None:
    """Their members are those that the native side names, with the same numbers."""
    native = pytest.importorskip("inlay._native", reason="built without pybind11")
    assert getattr(native, native_function)() == {member.name: int(member) for enum in enums for member in enum}


def check_compiled(
    compiled: Callable[..., tuple[Tensor, ...]],
    run: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    leaves: Sequence[str],
    what: str,
) -> None:
    """Outputs and gradients of ``compiled`` have the bits of those of ``run``."""
    given = {name: tensor.detach().requires_grad_(name in leaves) for name, tensor in tensors.items()}
    outputs, expected = compiled(**given), run(**given)
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted, what)
    douts = random_like(outputs)
    wanted_leaves = [given[name] for name in leaves]
    grads, wanted_grads = (torch.autograd.grad(results, wanted_leaves, douts) for results in (outputs, expected))
    for name, grad, wanted in zip(leaves, grads, wanted_grads, strict=True):
        assert_same_bits(grad, wanted, f"d{name} of {what}")


def check_inductor(
    block: Callable[..., Tensor], leaves: Sequence[Tensor], others: Sequence[Tensor] = (), **tolerances: float
) -> None:
    """``block(*leaves, *others)``, whose operations beside ours Inductor fuses, and its gradients."""
    expected = block(*leaves, *others)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    actual = torch.compile(block, fullgraph=True)(*leaves, *others)
    torch.testing.assert_close(actual, expected)
    for grad, wanted in zip(torch.autograd.grad(actual.sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, **tolerances)


def check_exported(
    module: torch.nn.Module, op: str, example: tuple[Tensor, ...], other: tuple[Tensor, ...], dynamic_shapes: Any
) -> None:
    """What is exported with the ``example`` calls our op, and gives the module's bits for inputs of ``other`` sizes."""
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes)
        assert any(f"inlay.{op}" in str(node.target) for node in program.graph.nodes)
        actual, wanted = program.module()(*other), module(*other)
    for output, expected in zip(_as_tuple(actual), _as_tuple(wanted), strict=True):
        assert_same_bits(output, expected, "exported")


def check_fake_form(run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], tensors: dict[str, Tensor]) -> None:
    """Fake outputs have the shapes, dtypes, strides and devices of real ones."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = run({name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
    for fake, real in zip(fakes, run(tensors), strict=True):
        assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
            real.shape, real.dtype, real.stride(), real.device,
        )  # fmt: skip


def check_functional_grad(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """torch.func's gradient has the bits of autograd's."""
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert_same_bits(torch.func.grad(loss)(x), leaf.grad, "torch.func.grad")


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
