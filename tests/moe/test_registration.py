"""Are the raw ops registered as torch wants them, and do the public functions compile, export and stay in one graph?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from tests.moe.cases import LEAVES, MODELS, Case, gradients, needs_kernels
from tests.support.compare import assert_same_bits
from tests.support.registration import check_exported, check_fake_form, check_functional_grad, check_op, needs_compiler

BF16, F32 = torch.bfloat16, torch.float32
SOFTMAX, SIGMOID, CHOSEN = range(3)
SILU, GPT_OSS = 0, 5


def _router_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of `moe_router`."""
    for dtype in (F32, BF16):
        logits = torch.randn(7, 12, device=device).to(dtype)
        bias = torch.randn(12, device=device)
        forced = torch.rand(7, 12, device=device).topk(3)[1].int()
        mask = torch.rand(7, device=device) < 0.5
        yield logits, None, None, None, 3, SOFTMAX, False, 1, 1, 1.0, F32, False
        yield logits, bias, None, mask, 3, SIGMOID, True, 4, 2, 2.5, dtype, True
        yield logits, None, forced, None, 3, CHOSEN, False, 1, 1, 1.0, BF16, True
    yield logits[:0], None, None, None, 2, SOFTMAX, True, 1, 1, 1.0, F32, True


def _router_backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, _, _, mask, k, scoring, renormalize, _, _, scaling, dtype, stats in _router_cases(device):
        indices = torch.rand(logits.shape, device=device).topk(k)[1]
        counts = torch.bincount(indices.flatten(), minlength=12)
        dweights = torch.randn(*indices.shape, device=device).to(dtype)
        dmean, dlse = (torch.randn(n, device=device) for n in logits.shape[::-1])
        rest = logits, indices, counts, mask, k, scoring, renormalize, scaling
        yield dweights, dmean if stats else None, dlse if stats else None, *rest
        yield None, None, dlse, *rest


def _experts(device: str) -> Iterator[tuple[Any, ...]]:
    """x, indices, weights, ends, projections, biases, shared, its gate, and the options."""
    for case in (Case(tokens=9), Case(tokens=9, biases=True, shared=True, weights_dtype=F32), Case(tokens=0)):
        for dtype in (F32, BF16):
            t = case.inputs(dtype, device)
            gate = t.get("shared_gate")
            yield (
                t["x"], t["indices"], t["weights"], None, t["gate_up_proj"], t["down_proj"], t.get("gate_up_bias"),
                t.get("down_bias"), t.get("shared"), None if gate is None else gate.flatten(), SILU, True, False, False,
                torch.inf,
            )  # fmt: skip
    t = MODELS[2].inputs(BF16, device)
    yield (
        t["x"], t["indices"].int(), t["weights"], None, t["gate_up_proj"], t["down_proj"], t["gate_up_bias"],
        t["down_bias"], None, None, GPT_OSS, True, True, True, 7.0,
    )  # fmt: skip
    t = Case(tokens=9, options={"gated": False}).inputs(F32, device)
    ends = torch.tensor([2, 2, 5, 6, 7, 9], device=device)
    options = SILU, False, False, False, torch.inf
    for weights in (None, t["weights"][:, 0].contiguous()):
        yield t["x"], None, weights, ends, t["gate_up_proj"], t["down_proj"], None, None, None, None, *options


def _experts_forward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for arguments in _experts(device):
        yield *arguments, True
        yield *arguments, False


def _experts_backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for arguments in _experts(device):
        x, indices, weights, _, *rest = arguments
        _, h, rows, ends = torch.ops.inlay.moe_experts_fwd(*arguments, True)
        slots = 1 if indices is None else indices.shape[1]
        inputs = (x, weights, *rest[:6])
        needed = [tensor is not None for tensor in inputs]
        yield torch.randn_like(x), x, h, rows, ends, weights, *rest[:6], slots, *rest[6:], *needed
        yield torch.randn_like(x), x, None, rows, ends, weights, *rest[:6], slots, *rest[6:], True, *[False] * 7


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {
    "moe_router": _router_cases,
    "moe_router_bwd": _router_backward_cases,
    "moe_experts": _experts,
    "moe_experts_fwd": _experts_forward_cases,
    "moe_experts_bwd": _experts_backward_cases,
}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    needs_kernels(device)
    check_op(op, OPCHECK_CASES[op](device))


def block(x, router, gate_up_proj, down_proj):
    """A router and its experts, with an auxiliary loss."""
    logits = x @ router
    weights, indices, stats = inlay.moe_router(logits, 2, renormalize=True, weights_dtype=x.dtype, stats=True)
    y = inlay.moe_experts(x, indices, weights, gate_up_proj, down_proj)
    return y, inlay.load_balancing_loss(stats, 2) + inlay.router_z_loss(stats)


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_block_compiles_in_one_graph_and_once_for_all_sizes(device):
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (37, 9, 200):
        t = Case(tokens=tokens).inputs(F32, device)
        leaves = [
            t["x"].requires_grad_(), torch.randn(40, 6, device=device).requires_grad_(),
            t["gate_up_proj"].requires_grad_(), t["down_proj"].requires_grad_(),
        ]  # fmt: skip
        results = []
        for function in (compiled, block):
            y, loss = function(*leaves)
            results.append((y, loss, *torch.autograd.grad(y.square().sum() + loss, leaves)))
        for actual, expected in zip(*results, strict=True):
            if device == "cpu":
                assert_same_bits(actual, expected, "compiled")
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@needs_compiler
def test_compiles_with_inductor(device):
    t = Case().inputs(BF16, device)
    leaves = [t["x"], torch.randn(40, 6, device=device).bfloat16(), t["gate_up_proj"], t["down_proj"]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    compiled = torch.compile(block, fullgraph=True)
    for function in (compiled, compiled):
        (y, loss), (wanted_y, wanted_loss) = function(*leaves), block(*leaves)
        torch.testing.assert_close(y, wanted_y, rtol=0.05, atol=0.05)
        torch.testing.assert_close(loss, wanted_loss, rtol=0.02, atol=0.02)


class Layer(torch.nn.Module):
    def forward(self, x, indices, weights, gate_up_proj, down_proj):
        return inlay.moe_experts(x, indices, weights, gate_up_proj, down_proj)


def test_export(device):
    needs_kernels(device)
    example, other = (tuple(Case(tokens=tokens).inputs(BF16, device).values()) for tokens in (30, 50))
    tokens = torch.export.Dim("tokens", min=2)
    check_exported(Layer(), "moe_experts", example, other, ({0: tokens},) * 3 + (None, None))


@pytest.mark.parametrize("case", [Case(biases=True, shared=True), MODELS[2]], ids=str)
def test_fake_tensors_have_the_real_form(case):
    check_fake_form(lambda given: (case.run(inlay, given),), case.inputs(BF16))


def test_meta_tensors():
    tensors = {name: t.to("meta") for name, t in Case(biases=True).inputs(BF16).items()}
    assert Case().run(inlay, tensors).shape == (37, 40)
    weights, indices, stats = inlay.moe_router(torch.empty(5, 8, device="meta"), 2, stats=True)
    assert (weights.shape, indices.dtype, stats.counts.shape, stats.entropy.shape) == ((5, 2), torch.int64, (8,), (5,))


def test_functional_grad():
    tensors = Case().inputs(F32)

    check_functional_grad(lambda x: Case().run(inlay, {**tensors, "x": x}).sin().sum(), tensors["x"])


def test_autocast_changes_nothing():
    """The ops take the dtypes they are given; autocast only changes what other modules feed them."""
    case = Case()
    tensors = case.inputs(F32)
    dy = torch.randn_like(tensors["x"])
    expected = gradients(case, inlay, tensors, dy)
    with torch.autocast("cpu", BF16):
        for name, grad in gradients(case, inlay, tensors, dy).items():
            assert_same_bits(grad, expected[name], f"d{name}")
    assert set(expected) <= set(LEAVES)
