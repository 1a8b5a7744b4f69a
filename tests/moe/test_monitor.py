"""Do measures tell balance from collapse, and does the monitor gather what a model's routers did?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay


def measures(logits: torch.Tensor, k: int = 2) -> dict[str, float]:
    stats = inlay.moe_router(logits, k, stats=True)[2]
    return {name: value.item() for name, value in inlay.router_stats(stats).items()}


def test_balance_and_specialisation(device):
    """Each token is sure of its experts, and all experts are used alike."""
    logits = torch.zeros(64, 8, device=device)
    for token in range(64):
        logits[token, [token % 8, (token + 1) % 8]] = 20
    result = measures(logits)
    assert result["max_vio"] == pytest.approx(0, abs=1e-5)
    assert result["min_load"] == pytest.approx(1)
    assert result["cv"] == pytest.approx(0, abs=1e-5)
    assert result["dead"] == 0
    assert result["effective_experts"] == pytest.approx(8, rel=1e-4)
    assert result["entropy"] == pytest.approx(1 / 3, rel=1e-3)  # of two among eight
    assert result["entropy_of_mean"] == pytest.approx(1, rel=1e-4)
    assert result["gap"] == pytest.approx(2 / 3, rel=1e-3)
    assert result["margin"] == pytest.approx(0.5, rel=1e-3)
    assert result["max_logit"] == 20


def test_collapse(device):
    logits = torch.zeros(64, 8, device=device)
    logits[:, :2] = 20
    result = measures(logits)
    assert result["max_vio"] == pytest.approx(3)
    assert result["dead"] == pytest.approx(6 / 8)
    assert result["effective_experts"] == pytest.approx(2, rel=1e-4)
    assert result["gap"] == pytest.approx(0, abs=1e-5)
    assert result["entropy"] == pytest.approx(1 / 3, rel=1e-3)


def test_a_router_that_says_nothing(device):
    result = measures(torch.zeros(64, 8, device=device))
    assert result["entropy"] == pytest.approx(1, rel=1e-5)
    assert result["entropy_of_mean"] == pytest.approx(1, rel=1e-5)
    assert result["margin"] == 0
    assert result["z"] == pytest.approx(torch.tensor(8.0).log().item() ** 2, rel=1e-5)


class TinyRouter(nn.Module):
    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        logits = x @ self.weight.T
        weights, indices = logits.softmax(-1).topk(self.top_k)
        return logits, weights, indices


def _model() -> nn.Module:
    return nn.ModuleDict({"first": TinyRouter(), "second": TinyRouter()})


def test_the_monitor_describes_its_window():
    model = _model()
    monitor = inlay.RouterMonitor(model)
    batches = [torch.randn(30, 4), torch.randn(50, 4)]
    for x in batches:
        model["first"](x)
    assert monitor.counts().keys() == {"first"}
    scalars = monitor.scalars()
    whole = measures(torch.cat(batches) @ model["first"].weight.T.detach())
    for name, value in whole.items():
        assert scalars[f"router/first/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert scalars[f"router/mean/{name}"] == scalars[f"router/first/{name}"]
    assert monitor.scalars() == {}  # a new window
    model["second"](batches[0])
    assert {name.split("/")[1] for name in monitor.scalars()} == {"second", "mean"}
    monitor.remove()
    model["first"](batches[0])
    assert monitor.scalars() == {}


def test_evaluation_and_repeated_passes_do_not_count():
    model = _model()
    monitor = inlay.RouterMonitor(model)
    model.eval()
    model["first"](torch.randn(3, 4))
    assert monitor.scalars() == {}
    model.train()
    x = torch.randn(3, 4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda v: model["first"](v)[1], x, use_reentrant=False)
    y.sum().backward()
    assert monitor.counts()["first"].sum() == 6
    watching = inlay.RouterMonitor(model.eval(), evaluating=True)
    model["first"](torch.randn(3, 4))
    assert watching.counts()["first"].sum() == 6


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="RouterMonitor: model must have routers"):
        inlay.RouterMonitor(nn.Linear(2, 2))


def test_a_trainer_logs_its_scalars():
    transformers = pytest.importorskip("transformers")
    model = _model()
    monitor = inlay.RouterMonitor(model)
    callback = monitor.callback()
    assert isinstance(callback, transformers.TrainerCallback)
    model["first"](torch.randn(9, 4))
    logs = {"loss": 1.0}
    callback.on_log(None, None, None, logs=logs)
    assert logs["loss"] == 1.0
    assert "router/first/max_vio" in logs
