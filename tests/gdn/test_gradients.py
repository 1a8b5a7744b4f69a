"""Is each gradient as accurate as autograd's through eager code, and computed only where wanted?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.gdn.cases import (
    BASIC,
    GATES,
    HARD,
    LENGTHS,
    SHAPES,
    Case,
    check_gradients,
    gradients,
    kernel_dtype,
)
from tests.support.compare import assert_same_bits
from tests.support.devices import HALVES, poison_free_memory, random_like

DTYPES = [torch.float32, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, dtype, device):
    tensors = case.inputs(dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HARD, ids=str)
def test_gates_keys_and_betas(case, dtype, device):
    tensors = case.inputs(dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("gates", ["weak", "strong"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens, gates, device):
    case = Case(tokens=tokens, gates=gates, batch=1)
    tensors = case.inputs(torch.float32, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.slow
@pytest.mark.parametrize("gates", GATES)
def test_long_sequences(gates, device):
    case = Case(tokens=8192, gates=gates, batch=1, key_heads=1, value_heads=1)
    tensors = case.inputs(torch.float32, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=67, batch=1, key_heads=1, key_dim=8, value_dim=8),
        Case(tokens=5, key_heads=1, key_dim=8, value_dim=16, options={"l2norm_qk": True}),
        Case(tokens=3, key_heads=1, key_dim=8, value_dim=8, gates="mixed", beta=1.9, with_state=False),
    ],
    ids=str,
)
def test_gradcheck(case, mode):
    """Against finite differences, in float64, through both outputs."""
    tensors = {name: tensor.requires_grad_() for name, tensor in case.inputs(torch.float64).items()}
    names = list(tensors)

    def function(*values):
        return case.run(inlay, dict(zip(names, values, strict=True)), mode=mode)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=case.tokens > 5)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["o", "final_state"])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_one_of_two_outputs_used(case, used, device):
    tensors = case.inputs(kernel_dtype(device), device)
    douts = random_like(case.run(inlay, tensors))
    douts = tuple(dout if use else None for dout, use in zip(douts, used, strict=True))
    if used[0]:
        return check_gradients(case, tensors, douts)
    tensors["q"].zero_()  # has no say in the final state; eager code then gives it no gradient at all
    actual = gradients(case, inlay, tensors, douts)
    assert_same_bits(actual["q"], torch.zeros_like(tensors["q"]), "dq")
    zeros = torch.zeros_like(case.run(inlay, tensors)[0])
    check_gradients(case, tensors, (zeros, douts[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(beta=0.005),
        Case(beta=0.005, gates="zero"),
        Case(gates="strong"),
        Case(beta=0.005, value_heads=4, options={"l2norm_qk": True}),
    ],
    ids=str,
)
def test_gradients_through_a_norm(case, dtype, device):
    """Of a norm's input, to which its length makes no difference, the gradient is orthogonal to it, token by token.

    Where little is written, a gate changes little but o's lengths, for it scales nearly all that later tokens are
    answered with. Its own gradient is then what is left when each token's term, <do, do's derivative by the gate>, has
    cancelled: a hundredth of what any other do of this size leads to, which is what rounding errors are in proportion
    to. They come from each term by itself, and know nothing of the direction in which the exact terms add up to
    nothing. (Strong gates do the same to q, k and beta, which scale the one token that is left.)
    """
    tensors = case.inputs(dtype, device)
    o = case.run(inlay, tensors)[0].double()
    anything = torch.randn_like(o)
    orthogonal = anything - o * ((anything * o).sum(-1, keepdim=True) / o.square().sum(-1, keepdim=True))
    check_gradients(case, tensors, (orthogonal.to(dtype), None), like=(anything, None))


@pytest.mark.parametrize("strength", [-1e3, -torch.inf])
def test_gates_that_forget_everything(strength, device):
    case = Case(tokens=100, batch=1)
    tensors = case.inputs(torch.float32, device)
    tensors["g"][:, 40] = strength
    tensors["g"][:, 70:75] = strength
    douts = random_like(case.run(inlay, tensors))
    grads = gradients(case, inlay, tensors, douts)
    assert all(grad.isfinite().all() for grad in grads.values())
    forgotten = grads["g"][:, [40, *range(70, 75)]]
    assert_same_bits(forgotten, torch.zeros_like(forgotten), "dg where nothing is left to decay")
    if strength == -1e3:
        check_gradients(case, tensors, douts)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_have_the_dtypes_of_their_tensors(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    tensors["initial_state"] = tensors["initial_state"].bfloat16()
    for beta_dtype in (torch.bfloat16, torch.float32):
        tensors["beta"] = tensors["beta"].to(beta_dtype)
        grads = gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
        assert {name: grad.dtype for name, grad in grads.items()} == {name: t.dtype for name, t in tensors.items()}


@pytest.mark.parametrize("frozen", ["q", "g", "initial_state"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    case = Case(tokens=70)
    tensors = case.inputs(kernel_dtype(device), device)
    douts = random_like(case.run(inlay, tensors))
    full = gradients(case, inlay, tensors, douts)
    leaves = {name: tensor.detach().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    torch.autograd.backward(case.run(inlay, leaves), douts)
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert_same_bits(leaves[name].grad, full[name], f"d{name}")


def test_no_tokens(device):
    case = Case(tokens=0)
    tensors = case.inputs(kernel_dtype(device), device)
    douts = random_like(case.run(inlay, tensors))
    grads = gradients(case, inlay, tensors, douts)
    assert_same_bits(grads["initial_state"], douts[1], "dinitial_state")
    assert grads["q"].shape == tensors["q"].shape


def test_nothing_is_recorded_without_gradients(device):
    tensors = Case().inputs(torch.float32, device)
    tensors["v"].requires_grad_()
    with torch.no_grad():
        assert not inlay.gated_delta_rule(**tensors).requires_grad
    tensors["v"] = tensors["v"].detach()
    assert not inlay.gated_delta_rule(**tensors).requires_grad


def test_a_second_derivative_is_refused(device):
    case = Case(tokens=20)
    tensors = {name: t.requires_grad_() for name, t in case.inputs(kernel_dtype(device), device).items()}
    o, _ = case.run(inlay, tensors)
    (dv,) = torch.autograd.grad(o.square().sum(), tensors["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    case = Case(tokens=70, with_state=False)
    tensors = {name: t.requires_grad_() for name, t in case.inputs(torch.float32, device).items()}

    def block(*values):
        return inlay.gated_delta_rule(*values).square().sum()

    plain = torch.autograd.grad(block(*tensors.values()), list(tensors.values()))
    torch.utils.checkpoint.checkpoint(block, *tensors.values(), use_reentrant=use_reentrant).backward()
    for (name, leaf), grad in zip(tensors.items(), plain, strict=True):
        assert_same_bits(leaf.grad, grad, f"d{name}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs(torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    clean = gradients(case, inlay, tensors, douts)
    for _ in range(5):
        poison_free_memory(device, (*(t.numel() * 4 for t in tensors.values()), 2**17, 2**18, 2**19))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, clean[name], f"d{name}")
