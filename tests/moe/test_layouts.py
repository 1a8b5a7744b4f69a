"""Are strided tensors read where they are, and never written to?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.moe.cases import LEAVES, MODELS, Case, gradients
from tests.support.compare import assert_same_bits

F32 = torch.float32


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """The same values between others, rows further apart, at an odd offset."""
    room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
    room[..., 3:-2] = tensor
    return room[..., 3:-2]


@pytest.mark.parametrize("case", [Case(biases=True, shared=True), MODELS[2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices(case, dtype, device):
    tensors = case.inputs(dtype, device)
    dy = torch.randn_like(tensors["x"])
    expected, grads = case.run(inlay, tensors), gradients(case, inlay, tensors, dy)
    strided = {name: _wider(t) if t.is_floating_point() else t for name, t in tensors.items()}
    strided["indices"] = torch.stack([tensors["indices"]] * 2, -1)[..., 0]
    # On CUDA other kernels may serve rows that no bulk copy can read.
    same = assert_same_bits if device == "cpu" or dtype == F32 else _assert_close_in_bfloat16
    same(case.run(inlay, strided), expected, "y")
    leaves = {name: strided[name].detach().requires_grad_() for name in grads}
    y = case.run(inlay, {**strided, **leaves})
    for (name, wanted), grad in zip(
        grads.items(), torch.autograd.grad(y, list(leaves.values()), _wider(dy)), strict=True
    ):
        same(grad, wanted, f"d{name}")


def _assert_close_in_bfloat16(actual, expected, what):
    """To a few roundings, of sums as large as the tensor's largest."""
    largest = float(expected.abs().max())
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * largest, f"{what}: {error} of {largest}"


def test_columns(device):
    """x and the gradient with strides that no kernel reads: they are copied."""
    case = Case()
    tensors = case.inputs(F32, device)
    expected, dy = case.run(inlay, tensors), torch.randn_like(tensors["x"])
    grads = gradients(case, inlay, tensors, dy)
    tensors["x"] = tensors["x"].t().contiguous().t()
    assert_same_bits(case.run(inlay, tensors), expected, "y")
    for name, grad in gradients(case, inlay, tensors, dy.t().contiguous().t()).items():
        assert_same_bits(grad, grads[name], f"d{name}")


def test_the_gradient_of_a_sum(device):
    """Autograd hands over one number, spread out by strides of 0."""
    case = Case()
    tensors = case.inputs(F32, device)
    tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(case.run(inlay, tensors).sum(), tensors["x"])
    wanted = gradients(case, inlay, tensors, torch.ones_like(tensors["x"]))["x"]
    assert_same_bits(dx, wanted, "dx")


def test_some_experts_of_many(device):
    """As expert parallelism slices them: views of one tensor, an offset into it, and no copy."""
    case = Case(experts=12)
    tensors = case.inputs(F32, device)
    local = {name: t[4:9] if name.endswith("proj") else t for name, t in tensors.items()}
    inside = (tensors["indices"] >= 4) & (tensors["indices"] < 9)
    local["indices"] = torch.where(inside, tensors["indices"] - 4, 5)
    other = {**tensors, "weights": torch.where(inside, tensors["weights"], 0.0)}
    assert_same_bits(Case().run(inlay, local), case.run(inlay, other), "y")


def test_nothing_is_written_to(device):
    case = Case(biases=True, shared=True)
    tensors = case.inputs(F32, device)
    before = {name: t.clone() for name, t in tensors.items()}
    gradients(case, inlay, tensors, torch.randn_like(tensors["x"]))
    for name, t in tensors.items():
        assert_same_bits(t.detach(), before[name], name)
    assert set(LEAVES) <= set(tensors)
