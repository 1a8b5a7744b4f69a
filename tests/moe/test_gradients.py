"""Is each gradient as accurate as autograd's through eager code, and computed only where wanted?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.moe.cases import (
    LEAVES,
    MODELS,
    OPTIONS,
    ROUTINGS,
    SHAPES,
    TOKENS,
    Case,
    check_gradients,
    gradients,
    with_options,
)
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import HALVES, poison_free_memory

BASIC = [Case(biases=True, shared=True), MODELS[2], Case(routing="sentinels"), MODELS[3]]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [*MODELS, *OPTIONS], ids=str)
def test_models_and_options(case, dtype, device):
    tensors = case.inputs(dtype, device)
    check_gradients(case, tensors, torch.randn_like(tensors["x"]))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, device):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.inputs(dtype, device)
        check_gradients(case, tensors, torch.randn_like(tensors["x"]))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, device):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(routing=routing, tokens=90, biases=True)
        tensors = case.inputs(dtype, device)
        check_gradients(case, tensors, torch.randn_like(tensors["x"]))


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens, device):
    case = Case(tokens=tokens, biases=True)
    tensors = case.inputs(torch.bfloat16, device)
    check_gradients(case, tensors, torch.randn_like(tensors["x"]))


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=5, hidden=4, intermediate=3, experts=4, biases=True, shared=True),
        Case(tokens=5, hidden=4, intermediate=3, experts=4, biases=True, options={**MODELS[2].options}),
        *(Case(tokens=5, hidden=4, intermediate=3, options={"activation": a}) for a in ("gelu", "gelu_tanh", "relu2")),
        Case(tokens=5, hidden=4, intermediate=3, options={"gated": False, "activation": "relu2"}),
        Case(tokens=5, hidden=4, intermediate=3, routing="sentinels"),
    ],
    ids=str,
)
def test_gradcheck(case):
    """Against finite differences, in float64."""
    tensors = case.inputs(torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if name in LEAVES}

    def function(*values):
        return case.run(inlay, {**tensors, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("routing", ["half_unused", "nobody"])
def test_untouched_experts_get_zeros(routing, device):
    case = Case(routing=routing, biases=True)
    tensors = case.inputs(torch.bfloat16, device)
    poison_free_memory(device, tuple(t.numel() * 2 for t in tensors.values()))
    grads = gradients(case, inlay, tensors, torch.randn_like(tensors["x"]))
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (grads[name][:3] == 0).all(), name
        assert routing == "nobody" or (grads[name][3:] != 0).any(), name
    if routing == "nobody":
        assert (grads["x"] == 0).all()
        assert (grads["weights"] == 0).all()


def test_sentinels_give_nothing(device):
    """Neither results nor gradients, whatever their weights are."""
    case = Case(routing="sentinels", tokens=60)
    tensors = case.inputs(torch.float32, device)
    dy = torch.randn_like(tensors["x"])
    none = tensors["indices"] == case.experts
    grads, y = gradients(case, inlay, tensors, dy), case.run(inlay, tensors)
    assert (grads["weights"][none] == 0).all()
    tensors["weights"] = torch.where(none, torch.nan, tensors["weights"])
    assert_same_bits(case.run(inlay, tensors), y, "y")
    for name, grad in gradients(case, inlay, tensors, dy).items():
        assert_same_bits(grad, grads[name], f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_recomputation_changes_no_bit(case, dtype, device):
    tensors = case.inputs(dtype, device)
    dy = torch.randn_like(tensors["x"])
    kept = gradients(case, inlay, tensors, dy)
    for name, grad in gradients(case, inlay, tensors, dy, recompute=True).items():
        assert_same_bits(grad, kept[name], f"d{name}")


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept(recompute, device):
    """x, 2 I a row, and 4 bytes a row beside parameters and inputs; without 2 I where that is computed again."""
    case = Case(tokens=64, weights_dtype=torch.float32, options={"recompute": recompute})
    tensors = case.inputs(torch.bfloat16, device)
    inputs = {t.data_ptr() for t in tensors.values()}
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(inlay, leaves)
    own = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in inputs)
    rows = case.tokens * case.slots
    h = 0 if recompute else rows * 2 * case.intermediate * 2
    assert own == h + 4 * rows + 4 * case.experts


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_frozen_inputs_get_no_gradient(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    dy = torch.randn_like(tensors["x"])
    full = gradients(case, inlay, tensors, dy)
    for kept in full:  # each alone, and all but it
        for wanted in ({kept}, full.keys() - {kept}):
            leaves = {name: tensors[name].detach().requires_grad_(name in wanted) for name in full}
            case.run(inlay, {**tensors, **leaves}).backward(dy)
            for name, leaf in leaves.items():
                if name in wanted:
                    assert_same_bits(leaf.grad, full[name], f"d{name} of {sorted(wanted)}")
                else:
                    assert leaf.grad is None


def test_frozen_experts_keep_no_x(device):
    """As under LoRA: a gradient for x alone needs what was before the activation, and x not."""
    case = Case(tokens=64)
    tensors = case.inputs(torch.bfloat16, device)
    tensors["x"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        case.run(inlay, tensors)
    assert tensors["x"].data_ptr() not in kept
    assert tensors["down_proj"].data_ptr() in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_permuted(dtype, device):
    case = Case(biases=True)
    tensors = case.inputs(dtype, device)
    ends = torch.tensor([5, 5, 12, 20, 30, 33], device=device)
    names = ("x", "gate_up_proj", "down_proj", "weights", "gate_up_bias", "down_bias")
    dy = torch.randn_like(tensors["x"])
    tensors["weights"] = tensors["weights"][:, 0].clone()

    def grads(namespace, to):
        leaves = {name: to(tensors[name]).detach().requires_grad_() for name in names}
        options = {name: leaves[name] for name in names[3:]}
        y = namespace.moe_experts_permuted(
            leaves["x"], ends, leaves["gate_up_proj"], leaves["down_proj"], **options
        )  # fmt: skip
        return torch.autograd.grad(y, list(leaves.values()), to(dy))

    results = (grads(inlay, lambda t: t), grads(reference, lambda t: t), grads(reference, lambda t: t.double()))
    for name, actual, eager, exact in zip(names, *results, strict=True):
        assert_within_budget(actual, eager, exact, f"d{name}", terms=exact.abs().max().item())
    assert (results[0][0][33:] == 0).all()
    assert (results[0][3][33:] == 0).all()


def test_float32_weights_and_biases(device):
    """Beside 16-bit activations; their gradients are float32 too."""
    case = Case(biases=True, shared=True, weights_dtype=torch.float32)
    tensors = case.inputs(torch.bfloat16, device)
    for name in ("gate_up_bias", "down_bias", "shared_gate"):
        tensors[name] = tensors[name].float()
    dy = torch.randn_like(tensors["x"])
    check_gradients(case, tensors, dy)
    grads = gradients(case, inlay, tensors, dy)
    assert {name: grad.dtype for name, grad in grads.items()} == {name: tensors[name].dtype for name in grads}


def test_nothing_is_recorded_without_gradients(device):
    tensors = Case().inputs(torch.float32, device)
    tensors["x"].requires_grad_()
    with torch.no_grad():
        assert not Case().run(inlay, tensors).requires_grad
    tensors["x"] = tensors["x"].detach()
    assert not Case().run(inlay, tensors).requires_grad


def test_a_second_derivative_is_refused():
    tensors = Case().inputs(torch.float32)
    tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(Case().run(inlay, tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    case = Case()
    tensors = case.inputs(torch.float32, device)
    leaves = {name: tensors[name].requires_grad_() for name in LEAVES if name in tensors}

    def block(*values):
        return case.run(inlay, {**tensors, **dict(zip(leaves, values, strict=True))}).square().sum()

    plain = torch.autograd.grad(block(*leaves.values()), list(leaves.values()))
    torch.utils.checkpoint.checkpoint(block, *leaves.values(), use_reentrant=use_reentrant).backward()
    for (name, leaf), grad in zip(leaves.items(), plain, strict=True):
        assert_same_bits(leaf.grad, grad, f"d{name}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs(torch.float32, device)
    dy = torch.randn_like(tensors["x"])
    clean = gradients(case, inlay, tensors, dy)
    for _ in range(5):
        poison_free_memory(device, (*(t.numel() * 4 for t in tensors.values()), 2**14, 2**15, 2**17))
        for name, grad in gradients(case, inlay, tensors, dy).items():
            assert_same_bits(grad, clean[name], f"d{name}")


def test_the_layout_of_gradients(device):
    """Dense, in the layout of what they are gradients of, also where that is a view."""
    case = with_options(Case(), transposed=True)
    tensors = case.inputs(torch.float32, device)
    for name, grad in gradients(case, inlay, tensors, torch.randn_like(tensors["x"])).items():
        assert grad.shape == tensors[name].shape
        assert grad.is_contiguous(), name
