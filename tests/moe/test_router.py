"""Does the router choose, weigh and count as the models do, and are its gradients right?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.moe.router_cases import CASES, DEEPSEEK, DIFFERENTIABLE, RouterCase, check
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype


@each_dtype()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_families(case, device, dtype):
    if case.experts > 100 and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("so many experts have no distinct logits in 16 bits")
    check(case, case.inputs(dtype, device))


@pytest.mark.parametrize("case", [case for case in CASES if 0 < case.tokens < 1000 and case.experts < 1024], ids=str)
def test_gradcheck(case):
    """Against finite differences, in float64, through weights, mean probabilities and logsumexp."""
    case = RouterCase(**{**vars(case), "tokens": 6})
    tensors = case.inputs(torch.float64)

    def function(logits):
        outputs = case.run(inlay, {**tensors, "logits": logits})
        return tuple(outputs[name] for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(function, tensors["logits"].requires_grad_(), fast_mode=True)


def test_weights_dtypes(device):
    """One rounding, at the end."""
    logits = torch.randn(50, 16, device=device)
    wide, _ = inlay.moe_router(logits, 4, renormalize=True)
    for dtype in (torch.bfloat16, torch.float16):
        weights, _ = inlay.moe_router(logits, 4, renormalize=True, weights_dtype=dtype)
        assert_same_bits(weights, wide.to(dtype), "weights")
    assert inlay.moe_router(logits.bfloat16(), 4)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{}, {"softmax_after_topk": True}, DEEPSEEK, {**DEEPSEEK, "groups": (4, 2)}], ids=str
)
def test_ties_go_to_the_lower_index(options, device):
    logits = torch.randint(0, 3, (200, 16), device=device).float()
    _, indices = inlay.moe_router(logits, 5, **options)
    assert torch.equal(indices, reference.moe_router(logits, 5, **options)[1])
    same = torch.zeros(3, 16, device=device)
    assert torch.equal(inlay.moe_router(same, 5, **options)[1], torch.arange(5, device=device).expand(3, 5))


def test_as_topk_chooses_without_ties(device):
    logits = torch.randn(300, 128, device=device)
    assert torch.equal(inlay.moe_router(logits, 8)[1], logits.topk(8)[1])


def test_strided_logits(device):
    wide = torch.randn(40, 2, 24, device=device)
    for logits in (wide[:, 0], wide[::2, 1], wide[:, 0, 3:19], torch.randn(16, 40, device=device).mT):
        weights, indices, stats = inlay.moe_router(logits, 3, stats=True)
        wanted = inlay.moe_router(logits.contiguous(), 3, stats=True)
        for actual, expected in zip((weights, indices, *stats), (*wanted[:2], *wanted[2]), strict=True):
            if device == "cpu" or not actual.is_floating_point():
                assert_same_bits(actual, expected, "strided")
            else:  # torch's own sums depend on strides there
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"softmax_after_topk": True}, DEEPSEEK], ids=str)
def test_non_finite_logits(value, options, device):
    """Indices are experts all the same, NaN comes out where the maths says so, and other tokens know nothing of it."""
    logits = torch.randn(20, 16, device=device)
    logits[3, 5] = value
    logits[7] = value
    weights, indices = inlay.moe_router(logits, 4, **options)
    assert ((indices >= 0) & (indices < 16)).all()
    assert all(len(set(row)) == 4 for row in indices.tolist())
    expected, _ = reference.moe_router(logits, 4, **options, forced_indices=indices)
    assert torch.equal(weights.isnan(), expected.isnan())
    if value != value:
        stats, wanted = (ns.moe_router(logits, 4, stats=True, **options)[2] for ns in (inlay, reference))
        for name in ("logsumexp", "entropy", "margin", "max_logit"):
            assert torch.equal(getattr(stats, name).isnan(), getattr(wanted, name).isnan()), name
    others = [i for i in range(20) if i not in (3, 7)]
    assert weights[others].isfinite().all()


def test_masked_tokens_are_routed_but_not_counted(device):
    case = RouterCase(masked=True)
    tensors = case.inputs(torch.float32, device)
    masked = case.run(inlay, tensors)
    alone = case.run(inlay, {"logits": tensors["logits"][tensors["mask"]]})
    plain = RouterCase().run(inlay, {"logits": tensors["logits"]})
    assert torch.equal(masked["counts"], alone["counts"])
    torch.testing.assert_close(masked["mean_probabilities"], alone["mean_probabilities"])
    for name in ("weights", "indices", "logsumexp", "entropy", "margin", "max_logit"):
        assert_same_bits(masked[name], plain[name], name)


def test_nothing_counted(device):
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    _, _, stats = inlay.moe_router(logits, 2, mask=torch.zeros(5, dtype=torch.bool, device=device), stats=True)
    assert (stats.counts == 0).all()
    assert (stats.mean_probabilities == 0).all()
    (gradient,) = torch.autograd.grad(stats.mean_probabilities.sum(), logits)
    assert (gradient == 0).all()


def test_without_statistics_the_same_weights(device):
    logits = torch.randn(60, 16, device=device)
    weights, indices = inlay.moe_router(logits, 4, renormalize=True)
    with_stats = inlay.moe_router(logits, 4, renormalize=True, stats=True)
    assert_same_bits(weights, with_stats[0], "weights")
    assert_same_bits(indices, with_stats[1], "indices")


def test_a_bias_only_chooses(device):
    logits = torch.randn(30, 16, device=device)
    bias = torch.zeros(16, device=device)
    bias[11] = 10
    weights, indices = inlay.moe_router(logits, 2, scoring="sigmoid", bias=bias)
    assert (indices[:, 0] == 11).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices))


def test_scores_that_are_all_zero(device):
    """Sigmoids add up to nothing: so do probabilities and their entropy."""
    logits = torch.full((3, 8), -200.0, device=device)
    weights, _, stats = inlay.moe_router(logits, 2, scoring="sigmoid", renormalize=True, stats=True)
    for name, tensor in {"weights": weights, "mean": stats.mean_probabilities, "entropy": stats.entropy}.items():
        assert (tensor == 0).all(), name


@pytest.mark.parametrize("options", [{}, DEEPSEEK], ids=str)
def test_statistics_have_the_same_bits_in_every_run(options, device):
    logits = torch.randn(5000, 96, device=device, requires_grad=True)
    mask = torch.rand(5000, device=device) < 0.7
    first = None
    for _ in range(10):
        weights, indices, stats = inlay.moe_router(logits, 6, mask=mask, stats=True, **options)
        loss = weights.square().sum() + stats.mean_probabilities.square().sum() + stats.logsumexp.sum()
        results = (weights, indices, *stats, torch.autograd.grad(loss, logits)[0])
        first = results if first is None else first
        for result, wanted in zip(results, first, strict=True):
            assert torch.equal(result, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{"renormalize": True}, {"softmax_after_topk": True}, DEEPSEEK], ids=str)
def test_forced_indices_that_the_device_cannot_report(options):
    """Those of no expert weigh nothing and are not counted, and other tokens know nothing of it. The CPU raises."""
    logits = torch.randn(50, 16, device="cuda", requires_grad=True)
    forced = torch.randint(16, (50, 4), device="cuda")
    forced[::5, 1] = torch.tensor([16, -1, 2**40, -(2**40), 99] * 2, device="cuda")
    outside = (forced < 0) | (forced >= 16)
    weights, indices, stats = inlay.moe_router(logits, 4, forced_indices=forced, stats=True, **options)
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert torch.equal(indices, forced)
    assert (weights[outside] == 0).all()
    assert weights.isfinite().all()
    assert gradient.isfinite().all()
    assert stats.counts.sum() == (~outside).sum()
    whole = ~outside.any(-1)
    expected, _ = inlay.moe_router(logits[whole], 4, forced_indices=forced[whole], **options)
    assert_same_bits(weights[whole], expected, "weights")
