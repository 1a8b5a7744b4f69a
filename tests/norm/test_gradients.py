"""Are gradients as accurate as autograd's through eager code, and computed only where wanted?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.norm.cases import BASIC, CASES, F32, ROWS, WIDTHS, Case, X, check_gradients, gradients
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import each_dtype, random_like

ADD = Case("add_rms_norm", residual=X, options={"eps": 1e-6})


@each_dtype()
@pytest.mark.parametrize("shape", [(5, 3, 256), (7, 127)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    tensors = case.inputs(shape, dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, dtype, device):
    tensors = case.inputs((3, width), dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("width", [128, 1000])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_row_counts(case, rows, width, device):
    tensors = case.inputs((rows, width), torch.bfloat16, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    """Against finite differences, in float64, both outputs' gradients at once."""
    tensors = case.inputs((2, 3, 5), torch.float64, "cpu")
    names = list(tensors)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors.values())
    assert torch.autograd.gradcheck(lambda *values: case.run(inlay, dict(zip(names, values, strict=True))), leaves)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y", "residual_out"])
@pytest.mark.parametrize(
    "case",
    [
        ADD,
        Case("add_rms_norm", residual=F32, bias=X),
        Case("add_rms_norm", residual=X, options={"residual_dtype": F32}),
    ],
    ids=str,
)
def test_one_of_two_outputs_used(case, used, device):
    tensors = case.inputs((6, 192), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    douts = tuple(dout if use else None for dout, use in zip(douts, used, strict=True))
    if used[0]:
        return check_gradients(case, tensors, douts)
    actual, eager = (gradients(case, namespace, tensors, douts) for namespace in (inlay, reference))
    assert actual["weight"] is eager["weight"] is None
    for name in ("x", "residual"):
        assert_same_bits(actual[name], eager[name], f"d{name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_have_the_dtypes_of_their_tensors(case, device):
    tensors = case.inputs((4, 96), torch.float16, device)
    grads = gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
    assert {name: grad.dtype for name, grad in grads.items()} == {name: t.dtype for name, t in tensors.items()}


def test_x_that_is_its_own_residual(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    y, residual_out = inlay.add_rms_norm(x, x)
    dy, dresidual = random_like((y, residual_out))
    torch.autograd.backward((y, residual_out), (dy, dresidual))
    leaf = x.detach().double().requires_grad_()
    h = leaf + leaf
    exact = reference.rms_norm(h, eps=torch.finfo(F32).eps)
    torch.autograd.backward((exact, h), (dy.double(), dresidual.double()))
    assert_within_budget(x.grad, leaf.grad.float(), leaf.grad, "dx")


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    case = Case("rms_norm", bias=X)
    tensors = case.inputs((6, 128), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    full = gradients(case, inlay, tensors, douts)
    leaves = {name: tensor.detach().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    torch.autograd.backward(case.run(inlay, leaves), douts)
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert_same_bits(leaves[name].grad, full[name], f"d{name}")


def test_no_dweight_is_computed_for_a_frozen_weight(device, monkeypatch):
    """The backward op is told so: its dweight is empty."""
    results = []
    backward = inlay.ops.norm._norm_bwd
    monkeypatch.setattr(inlay.ops.norm, "_norm_bwd", lambda *a: results.append(backward(*a)) or results[-1])
    x = torch.randn(4, 64, device=device, requires_grad=True)
    for function in (inlay.rms_norm, lambda x, w: inlay.add_rms_norm(x, x, w)[0]):
        function(x, torch.ones(64, device=device)).sum().backward()
    assert [result[3].numel() for result in results] == [0, 0]


def test_zero_rows_give_zero_weight_gradients(device):
    weight, bias = (torch.ones(40, device=device, requires_grad=True) for _ in range(2))
    inlay.layer_norm(torch.empty(0, 40, device=device), weight, bias).sum().backward()
    for vector in (weight, bias):
        assert_same_bits(vector.grad, torch.zeros(40, device=device), "gradient")


def test_nothing_is_recorded_without_gradients(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    with torch.no_grad():
        assert not inlay.rms_norm(x).requires_grad
    with torch.inference_mode():
        assert inlay.rms_norm(x).is_inference()
    assert not inlay.rms_norm(x.detach()).requires_grad


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_second_derivative_is_refused(case, device):
    tensors = {name: t.requires_grad_() for name, t in case.inputs((3, 32), torch.float32, device).items()}
    output = case.run(inlay, tensors)[0]
    (dx,) = torch.autograd.grad(output.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class _Cut(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_no_gradient_of_any_output(case, device):
    tensors = {name: t.requires_grad_() for name, t in case.inputs((3, 32), torch.float32, device).items()}
    loss = sum(_Cut.apply(output).sum() for output in case.run(inlay, tensors))
    assert torch.autograd.grad(loss, list(tensors.values()), allow_unused=True) == (None,) * len(tensors)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    def block(x, residual, weight):
        y, residual = inlay.add_rms_norm(x, residual, weight)
        return inlay.gated_rms_norm(y, residual, weight)

    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in [(4, 96), (4, 96), (96,)]]
    plain = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=use_reentrant)
    checkpointed.square().sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert_same_bits(leaf.grad, grad, "gradient")


def test_autocast_changes_nothing(device):
    """The ops take the dtypes they are given; autocast only changes what other modules feed them."""
    linear = torch.nn.Linear(64, 96, device=device)
    weight = torch.randn(96, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        hidden = linear(torch.randn(8, 64, device=device))
        y = inlay.rms_norm(hidden, weight)
        y.float().square().sum().backward()
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert weight.grad.dtype == F32
    assert_same_bits(y, inlay.rms_norm(hidden, weight), "y")


def test_functional_grad(device):
    x = torch.randn(4, 64, device=device)
    actual = torch.func.grad(lambda x: inlay.rms_norm(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    inlay.rms_norm(leaf).sin().sum().backward()
    assert_same_bits(actual, leaf.grad, "dx")
