"""Are gradients right, as accurate as eager code's, and given to those who asked?"""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

import inlay
from tests.rope.cases import BASIC, CASES, SHAPES, WEIGHTS, WIDTHS, Case, check_gradients, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype, random_like

FULL = Case()


@each_dtype()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    tensors = case.inputs(shape, dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@each_dtype()
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, device, dtype):
    tensors = case.inputs((2, 7, 3, 2, width), dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("heads", [(1, 1), (2, 16), (7, 1), (16, 2), (17, 5), (33, 8), (64, 8), (3, 0), (0, 3)])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_heads(case, heads, device):
    for width in (64, 256):
        tensors = case.inputs((2, 3, *heads, width), torch.bfloat16, device)
        check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_many_tokens(case, device):
    """Several groups of tokens, and more work than blocks run at once."""
    tensors = case.inputs((2, 1500, 4, 2, 64), torch.bfloat16, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    """Against finite differences, in float64, both outputs' gradients at once."""
    tensors = case.inputs((2, 3, 2, 1, 8), torch.float64, "cpu")
    names = [name for name in tensors if name not in ("cos", "sin")]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.run(inlay, {**tensors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(tensors[name].requires_grad_() for name in names))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_one_of_two_outputs_used(case, used, device):
    tensors = case.inputs((2, 5, 3, 2, 64), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    both = gradients(case, inlay, tensors, douts)
    one = gradients(case, inlay, tensors, tuple(dout if i == used else None for i, dout in enumerate(douts)))
    for name in one:
        if name.startswith("qk"[used]):
            assert_same_bits(one[name], both[name], f"d{name}")
        else:
            assert not one[name].any()


def test_gradients_have_the_dtypes_and_shapes_of_their_tensors(device):
    case = Case(parameters=torch.float32)
    tensors = case.inputs((2, 5, 3, 2, 64), torch.float16, device)
    grads = gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
    for name, grad in grads.items():
        assert (grad.dtype, grad.shape) == (tensors[name].dtype, tensors[name].shape)


@pytest.mark.parametrize("frozen", ["q", "k", *WEIGHTS])
def test_frozen_inputs_get_no_gradient(frozen, device):
    tensors = FULL.inputs((2, 7, 3, 2, 64), torch.float32, device)
    douts = random_like(FULL.run(inlay, tensors))
    full = gradients(FULL, inlay, tensors, douts)
    leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin", frozen)) for n, t in tensors.items()}
    torch.autograd.backward(FULL.run(inlay, leaves), douts)
    assert leaves[frozen].grad is None
    for name in full.keys() - {frozen}:
        assert_same_bits(leaves[name].grad, full[name], f"d{name}")


def test_no_gradient_is_computed_for_frozen_weights(device, monkeypatch):
    """The backward op is told so: what nobody wants is empty."""
    results = []
    backward = inlay.ops.rope._rope_bwd
    monkeypatch.setattr(inlay.ops.rope, "_rope_bwd", lambda *a: results.append(backward(*a)) or results[-1])
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    tensors["q"].requires_grad_()
    FULL.run(inlay, tensors)[0].sum().backward()
    tensors["k_weight"].requires_grad_()
    FULL.run(inlay, tensors)[1].sum().backward()
    sizes = [2 * 5 * 3 * 64, 2 * 5 * 2 * 64]
    assert [[result.numel() for result in call] for call in results] == [[*sizes, 0, 0], [*sizes, 0, 64]]


@pytest.mark.parametrize("width", [64, 100])
def test_no_tokens_give_zero_weight_gradients(width, device):
    for shape in [(2, 0, 3, 2, width), (0, 4, 3, 2, width), (2, 4, 0, 0, width)]:
        tensors = FULL.inputs(shape, torch.float32, device)
        grads = gradients(FULL, inlay, tensors, random_like(FULL.run(inlay, tensors)))
        for name in WEIGHTS:
            assert grads[name].shape == (width,)
            assert not grads[name].any()


def test_nothing_is_recorded_without_gradients(device):
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    assert not FULL.run(inlay, tensors)[0].requires_grad
    tensors["q"].requires_grad_()
    with torch.no_grad():
        assert not FULL.run(inlay, tensors)[0].requires_grad
    with torch.inference_mode():
        assert FULL.run(inlay, tensors)[0].is_inference()


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_angles_that_require_gradients_are_refused(name, device):
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"qk_norm_rope: {name} must be without gradient"):
        FULL.run(inlay, tensors)
    with torch.no_grad():
        FULL.run(inlay, tensors)


def test_a_second_derivative_is_refused(device):
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    tensors["q"].requires_grad_()
    q, _ = FULL.run(inlay, tensors)
    (dq,) = torch.autograd.grad(q.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    cos, sin = tensors.pop("cos"), tensors.pop("sin")

    def block(q, k, q_weight, k_weight):
        q, k = inlay.qk_norm_rope(q, k, cos, sin, q_weight, k_weight)
        return torch.cat([q, k], dim=2)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    plain = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert_same_bits(leaf.grad, grad, "gradient")


def test_autocast_changes_nothing(device):
    """The op takes the dtypes it is given; autocast only changes what other modules feed it."""
    case = Case(parameters=torch.float32)
    tensors = case.inputs((2, 5, 3, 2, 64), torch.bfloat16, device)
    tensors["q_weight"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        q, k = case.run(inlay, tensors)
        q.float().square().sum().backward()
    assert q.dtype == k.dtype == torch.bfloat16
    assert tensors["q_weight"].grad.dtype == torch.float32
    assert_same_bits(q, case.run(inlay, tensors)[0], "q")


def test_functional_grad(device):
    tensors = FULL.inputs((2, 5, 3, 2, 64), torch.float32, device)
    actual = torch.func.grad(lambda q: FULL.run(inlay, {**tensors, "q": q})[0].sin().sum())(tensors["q"])
    leaf = tensors["q"].clone().requires_grad_()
    FULL.run(inlay, {**tensors, "q": leaf})[0].sin().sum().backward()
    assert_same_bits(actual, leaf.grad, "dq")
