"""Is each gradient as accurate as autograd's through eager code, and computed only where wanted?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import (
    BASIC,
    LEAVES,
    MODELS,
    PAIRS,
    SINGLES,
    Case,
    check_gradients,
    gradients,
    random_like,
)
from tests.attention.test_values import HEAD_DIMS, LENGTHS
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import HALVES, poison_free_memory


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [*SINGLES, *MODELS], ids=str)
def test_features(case, dtype, device):
    tensors = case.inputs(dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_of_features(case, dtype, device):
    tensors = case.inputs(dtype, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, device):
    case = Case(dim=dim, value_dim=dim, features=("causal",), batch=1, heads=2, key_heads=1)
    tensors = case.inputs(torch.bfloat16, device)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("features", [("causal",), ("window",)], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, features, device):
    for queries, keys in ((length, length), (length, 130), (50, length)):
        case = Case(queries=queries, keys=keys, features=features, batch=1, heads=2, key_heads=1)
        tensors = case.inputs(torch.bfloat16, device)
        check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


BIASES = [
    (2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 70, 90), (4, 70, 90), (70, 90), (2, 1, 1, 90), (1, 4, 70, 1), (90,), (1, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_biases_of_every_shape(shape, dtype, device):
    """What is broadcast in the forward is added up in the backward."""
    case = Case(features=("causal", "softcap"))
    tensors = {**case.inputs(dtype, device), "bias": torch.randn(shape, device=device).to(dtype)}
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=9, keys=11, dim=8, value_dim=16, features=("causal", "sinks", "gate", "softcap")),
        Case(queries=7, keys=5, dim=8, value_dim=8, features=("mask", "bias", "dropout")),
        Case(queries=14, keys=16, dim=8, value_dim=8, batch=1, features=("packed", "window", "gate")),
    ],
    ids=str,
)
def test_gradcheck(case):
    """Against finite differences, in float64, through y and lse."""
    tensors = case.inputs(torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if name in LEAVES}

    def function(*values):
        y, lse = case.run(inlay, {**tensors, **dict(zip(leaves, values, strict=True))})
        return y, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y", "lse"])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_one_of_two_outputs_used(case, used, device):
    tensors = case.inputs(torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, tuple(d if use else None for d, use in zip(douts, used, strict=True)))


def test_context_parallel_merge(device):
    """Keys in two parts, put together by their lse, as ring attention does: values and gradients of the whole."""
    case = Case(features=("gate",), keys=100)
    tensors = case.inputs(torch.float32, device)
    del tensors["gate"]
    whole = Case(keys=100)
    dy = torch.randn(2, 70, 4, 32, device=device)

    def merged(q, k, v):
        parts = [inlay.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(60), slice(60, 100))]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        return sum(y * torch.exp(own - lse).transpose(1, 2)[..., None] for y, own in parts)

    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    y = merged(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    exact = {name: t.double() for name, t in tensors.items()}
    expected = gradients(whole, inlay if device == "cpu" else inlay.reference, exact, (dy.double(), None))
    eager = gradients(whole, inlay.reference, tensors, (dy, None))
    assert_within_budget(y.detach(), *(whole.run(inlay.reference, t)[0] for t in (tensors, exact)), "y", terms=1.0)
    for (name, wanted), grad in zip(expected.items(), grads, strict=True):
        assert_within_budget(grad, eager[name], wanted, f"d{name}", terms=wanted.abs().max().item())


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_frozen_inputs_get_no_gradient(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    full = gradients(case, inlay, tensors, douts)
    for frozen in full:
        leaves = {name: tensors[name].detach().requires_grad_(name != frozen) for name in full}
        torch.autograd.backward(case.run(inlay, {**tensors, **leaves}), douts)
        assert leaves[frozen].grad is None
        for name in leaves.keys() - {frozen}:
            assert_same_bits(leaves[name].grad, full[name], f"d{name} without d{frozen}")


def test_sinks_and_bias_in_float32(device):
    """Beside 16-bit activations, as gpt-oss keeps sinks under mixed precision; their gradients are float32 too."""
    case = Case(features=("causal", "sinks", "bias"))
    tensors = case.inputs(torch.bfloat16, device)
    for name in ("sinks", "bias"):
        tensors[name] = torch.randn(tensors[name].shape, device=device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, douts)
    grads = gradients(case, inlay, tensors, douts)
    assert {name: grad.dtype for name, grad in grads.items()} == {name: t.dtype for name, t in tensors.items()}


def test_nothing_is_recorded_without_gradients(device):
    tensors = Case().inputs(torch.float32, device)
    tensors["v"].requires_grad_()
    with torch.no_grad():
        assert not inlay.attention(**tensors).requires_grad
    tensors["v"] = tensors["v"].detach()
    assert not inlay.attention(**tensors).requires_grad


def test_a_second_derivative_is_refused():
    tensors = {name: t.requires_grad_() for name, t in Case(queries=20).inputs(torch.float32).items()}
    (dv,) = torch.autograd.grad(inlay.attention(**tensors).square().sum(), tensors["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    """Dropout draws the same number when the block runs again."""
    tensors = {name: t.requires_grad_() for name, t in Case().inputs(torch.float32, device).items()}

    def block(*values):
        return inlay.attention(*values, causal=True, dropout_p=0.3).square().sum()

    torch.manual_seed(3)
    plain = torch.autograd.grad(block(*tensors.values()), list(tensors.values()))
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(block, *tensors.values(), use_reentrant=use_reentrant).backward()
    for (name, leaf), grad in zip(tensors.items(), plain, strict=True):
        assert_same_bits(leaf.grad, grad, f"d{name}")


def test_autocast_changes_nothing(device):
    """The op takes the dtypes it is given; autocast only changes what other modules feed it."""
    case = Case(features=("causal",))
    tensors = case.inputs(torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    expected = gradients(case, inlay, tensors, douts)
    with torch.autocast(device, torch.bfloat16):
        grads = gradients(case, inlay, tensors, douts)
    for name, grad in grads.items():
        assert_same_bits(grad, expected[name], f"d{name}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs(torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    clean = gradients(case, inlay, tensors, douts)
    for _ in range(5):
        poison_free_memory(device, (*(t.numel() * 4 for t in tensors.values()), 2**17, 2**18, 2**19))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, clean[name], f"d{name}")
