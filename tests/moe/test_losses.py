"""Do losses give transformers' values, and pull routers the right way?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay

mixtral: Any = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")


def _logits(layers: int = 3, tokens: int = 48, experts: int = 8, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.randn(tokens, experts, device=device).requires_grad_() for _ in range(layers)]


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_is_transformers(masked, device):
    layers = _logits(device=device)
    mask = torch.ones(4, 12, dtype=torch.long, device=device)
    if masked:
        mask[0, 5:] = 0
        mask[3, :9] = 0
    expected = mixtral.load_balancing_loss_func(tuple(layers), 8, 2, mask if masked else None)
    actual = inlay.load_balancing_loss(layers, 2, attention_mask=mask if masked else None)
    torch.testing.assert_close(actual, expected)
    pairs = zip(torch.autograd.grad(actual, layers), torch.autograd.grad(expected, layers), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want)


def test_load_balancing_of_statistics(device):
    """What moe_router has counted anyway."""
    layers = _logits(device=device)
    stats = [inlay.moe_router(logits, 2, stats=True)[2] for logits in layers]
    torch.testing.assert_close(inlay.load_balancing_loss(stats, 2), inlay.load_balancing_loss(layers, 2))
    single = inlay.load_balancing_loss(stats[0], 2)
    torch.testing.assert_close(single, inlay.load_balancing_loss(layers[0], 2))


def test_opposite_imbalances_do_not_hide_each_other_per_layer(device):
    first = torch.zeros(64, 4, device=device)
    first[:, :2] = 5
    layers = [first, first.flip(-1)]
    assert inlay.load_balancing_loss(layers, 2).item() == pytest.approx(2.0, rel=1e-5)
    assert inlay.load_balancing_loss(layers, 2, per_layer=True) > 3.9


def test_descent_on_the_loss_balances(device):
    logits = (torch.randn(256, 8, device=device) * 0.1 + torch.arange(8, device=device) * 0.5).requires_grad_()
    before = inlay.moe_router(logits.detach(), 2, stats=True)[2].counts
    for _ in range(200):
        (gradient,) = torch.autograd.grad(inlay.load_balancing_loss(logits, 2), logits)
        logits = (logits - 50 * gradient).detach().requires_grad_()
    after = inlay.moe_router(logits.detach(), 2, stats=True)[2].counts
    assert before.max() == 256
    assert after.max() < 128


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked, device):
    layers = _logits(device=device)
    mask = torch.rand(4, 12, device=device) < 0.5 if masked else None
    actual = inlay.router_z_loss(layers, attention_mask=mask)
    squares = torch.stack([torch.logsumexp(logits, -1).square() for logits in layers])
    expected = squares.mean() if mask is None else squares[:, mask.flatten()].mean()
    torch.testing.assert_close(actual, expected)
    stats = [inlay.moe_router(logits, 2, stats=True)[2] for logits in layers]
    from_stats = inlay.router_z_loss(stats, attention_mask=mask)
    torch.testing.assert_close(from_stats, expected)
    pairs = zip(torch.autograd.grad(from_stats, layers), torch.autograd.grad(expected, layers), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_balance(scoring, masked, device):
    """Against the formula, sequence by sequence."""
    logits = torch.randn(3, 20, 8, device=device).requires_grad_()
    indices = logits.topk(2)[1]
    mask = torch.rand(3, 20, device=device) < 0.7 if masked else torch.ones(3, 20, dtype=torch.bool, device=device)
    expected = torch.zeros((), device=device)
    for row in range(3):
        z, chosen = logits[row][mask[row]], indices[row][mask[row]]
        scores = z.softmax(-1) if scoring == "softmax" else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
        f = torch.bincount(chosen.flatten(), minlength=8) * 8 / (2 * len(z))
        expected = expected + (f * scores.mean(0)).sum() / 3
    actual = inlay.sequence_balance_loss(logits, indices, scoring=scoring, attention_mask=mask if masked else None)
    torch.testing.assert_close(actual, expected)
    (got,), (want,) = torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, want)


def test_the_bias_rule_balances(device):
    """A router that prefers some experts, with nothing but the bias: loads even out, weights stay unbiased."""
    logits = torch.randn(512, 8, device=device) + 0.4 * torch.arange(8, device=device)
    bias = torch.zeros(8, device=device)
    for _ in range(2000):
        _, _, stats = inlay.moe_router(logits, 2, scoring="sigmoid", bias=bias, stats=True)
        inlay.update_router_bias(bias, stats.counts, rate=1e-3)
    load = stats.counts / stats.counts.sum() * 8
    assert load.max() < 1.1
    assert load.min() > 0.9
    before = inlay.moe_router(logits, 2, scoring="sigmoid", stats=True)[2].counts
    assert (before / before.sum() * 8).max() > 2


def test_errors():
    stats = inlay.moe_router(torch.randn(4, 8), 2, stats=True)[2]
    with pytest.raises(ValueError, match="load_balancing_loss: routers must be of at least one layer, got none"):
        inlay.load_balancing_loss([], 2)
    with pytest.raises(ValueError, match="router_z_loss: routers must be of at least one layer"):
        inlay.router_z_loss([])
    with pytest.raises(ValueError, match="attention_mask must be of 4 tokens, got 5"):
        inlay.load_balancing_loss(torch.randn(4, 8), 2, attention_mask=torch.ones(5))
    with pytest.raises(ValueError, match="attention_mask must be None with statistics"):
        inlay.load_balancing_loss(stats, 2, attention_mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, S, K\]"):
        inlay.sequence_balance_loss(torch.randn(2, 4, 8), torch.zeros(2, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="scoring must be one of"):
        inlay.sequence_balance_loss(torch.randn(2, 4, 8), torch.zeros(2, 4, 2, dtype=torch.int64), scoring="tanh")
    with pytest.raises(ValueError, match=r"counts must have bias's shape \[8\], got \[7\]"):
        inlay.update_router_bias(torch.zeros(8), torch.zeros(7))
