"""Are gradients as accurate as autograd's through eager code, and computed only where wanted?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.conv.cases import (
    BASIC,
    CASES,
    CHANNELS,
    LAYOUTS,
    LENGTHS,
    TIMES,
    Case,
    boundaries,
    check_gradients,
    gradients,
)
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype, random_like

FULL = BASIC[0]


@each_dtype()
@pytest.mark.parametrize("shape", [(2, 70, 64), (3, 33, 37)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    tensors = case.inputs(shape, dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@each_dtype()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", range(2, 9))
def test_every_width(width, layout, device, dtype):
    case = Case(width=width, layout=layout, bias=True, initial_state=True, final_state=True)
    tensors = case.inputs((2, 136, 72), dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_times(case, time, device):
    tensors = case.inputs((2, time, 48), torch.bfloat16, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_channels(case, channels, device):
    tensors = case.inputs((2, 21, channels), torch.bfloat16, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@each_dtype()
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_packed_sequences(case, device, dtype):
    tensors = case.inputs((1, sum(LENGTHS), 40), dtype, device, LENGTHS)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("lengths", [None, [0, 1, 2, 6, 0]], ids=["one", "packed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case, lengths):
    """Against finite differences, in float64, both outputs' gradients at once."""
    tensors = case.inputs((2, 6, 3) if lengths is None else (1, 9, 3), torch.float64, "cpu", lengths)
    cu_seqlens = tensors.pop("cu_seqlens", None)
    names = list(tensors)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        return case.run(inlay, given if cu_seqlens is None else {**given, "cu_seqlens": cu_seqlens})

    assert torch.autograd.gradcheck(function, tuple(tensor.requires_grad_() for tensor in tensors.values()))


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y", "final_state"])
@pytest.mark.parametrize("time", [2, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_of_two_outputs_used(layout, time, used, device):
    case = Case(bias=True, initial_state=True, final_state=True, layout=layout)
    tensors = case.inputs((2, time, 24), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    douts = tuple(dout if use else None for dout, use in zip(douts, used, strict=True))
    if used[0]:
        return check_gradients(case, tensors, douts)
    actual, eager = (gradients(case, namespace, tensors, douts) for namespace in (inlay, reference))
    for name in ("x", "initial_state"):
        assert_same_bits(actual[name], eager[name], f"d{name}")
    assert not actual["weight"].any()
    assert not actual["bias"].any()


def test_gradients_have_the_dtypes_and_shapes_of_their_tensors(device):
    case = Case(bias=True, initial_state=True, parameters=torch.float32)
    tensors = case.inputs((2, 20, 24), torch.float16, device)
    tensors["weight"] = tensors["weight"].unsqueeze(1)
    grads = gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
    for name, tensor in tensors.items():
        assert (grads[name].dtype, grads[name].shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "initial_state"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    tensors = FULL.inputs((2, 70, 40), torch.float32, device)
    douts = random_like(FULL.run(inlay, tensors))
    full = gradients(FULL, inlay, tensors, douts)
    leaves = {name: tensor.detach().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    torch.autograd.backward(FULL.run(inlay, leaves), douts)
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert_same_bits(leaves[name].grad, full[name], f"d{name}")


def test_no_gradient_is_computed_for_frozen_parameters(device, monkeypatch):
    """The backward op is told so: what nobody wants is empty."""
    results = []
    backward = inlay.ops.conv._conv_bwd
    monkeypatch.setattr(inlay.ops.conv, "_conv_bwd", lambda *a: results.append(backward(*a)) or results[-1])
    tensors = FULL.inputs((2, 9, 16), torch.float32, device)
    y, _ = FULL.run(inlay, {**tensors, "x": tensors["x"].requires_grad_()})
    y.sum().backward()
    assert [result.numel() for result in results[0]] == [2 * 9 * 16, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tokens_give_zero_parameter_gradients_and_pass_the_state_on(layout, device):
    case = Case(bias=True, initial_state=True, final_state=True, layout=layout)
    tensors = case.inputs((2, 0, 24), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    grads = gradients(case, inlay, tensors, douts)
    assert not grads["weight"].any()
    assert not grads["bias"].any()
    assert_same_bits(grads["initial_state"], douts[1], "dinitial_state")


def test_nothing_is_recorded_without_gradients(device):
    x, weight = torch.randn(2, 9, 16, device=device, requires_grad=True), torch.randn(16, 4, device=device)
    with torch.no_grad():
        assert not inlay.causal_conv1d(x, weight).requires_grad
    with torch.inference_mode():
        assert inlay.causal_conv1d(x, weight).is_inference()
    assert not inlay.causal_conv1d(x.detach(), weight).requires_grad


def test_integer_sequence_boundaries_need_no_gradient(device):
    x = torch.randn(1, 9, 16, device=device, requires_grad=True)
    cu_seqlens = boundaries([4, 5], device, torch.int64)
    inlay.causal_conv1d(x, torch.randn(16, 4, device=device), cu_seqlens=cu_seqlens).sum().backward()
    assert x.grad is not None


def test_a_second_derivative_is_refused(device):
    tensors = {name: t.requires_grad_() for name, t in FULL.inputs((2, 9, 16), torch.float32, device).items()}
    y, _ = FULL.run(inlay, tensors)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    def block(x, weight, bias):
        return inlay.causal_conv1d(x, weight, bias, activation="silu")

    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in [(2, 40, 24), (24, 4), (24,)]]
    plain = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert_same_bits(leaf.grad, grad, "gradient")


def test_autocast_changes_nothing(device):
    """The op takes the dtypes it is given; autocast only changes what other modules feed it."""
    linear = torch.nn.Linear(24, 40, device=device)
    weight = torch.randn(40, 4, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        hidden = linear(torch.randn(2, 9, 24, device=device))
        y = inlay.causal_conv1d(hidden, weight, activation="silu")
        y.float().square().sum().backward()
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert_same_bits(y, inlay.causal_conv1d(hidden, weight, activation="silu"), "y")


def test_functional_grad(device):
    x, weight = torch.randn(2, 9, 16, device=device), torch.randn(16, 4, device=device)
    actual = torch.func.grad(lambda x: inlay.causal_conv1d(x, weight).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    inlay.causal_conv1d(leaf, weight).sin().sum().backward()
    assert_same_bits(actual, leaf.grad, "dx")
