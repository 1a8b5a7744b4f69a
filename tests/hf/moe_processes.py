"""What two processes do in test_moe_processes.py: train mixtures of experts together, with and without Inlay.

The oracle is a model without Inlay that takes the same steps by itself, on the batches of both.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.hf import experts
from tests.hf.models import tokens
from tests.hf.moe_models import moe_model

OPS = ("moe_router", "moe_experts", "moe_block")
STEPS, _BATCH, _LENGTH, _RATE = 3, 4, 19, 0.2


@dataclass
class Outcome:
    """Of training: distances from the oracle, and what Inlay did."""

    losses: list[float] = field(default_factory=list)
    """Of each step."""
    gradient: float = 0.0
    """Of the first step: relative L2, of the parameter that fares worst."""
    change: float = 0.0
    """The same of what all steps have made of each parameter."""
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    sentinels: int = 0
    """How many slots of experts on other ranks the op was given."""
    local_experts: int = 0


def fsdp2_missing(rank: int) -> str | None:
    """Why this torch cannot shard a linear layer over processes on the CPU, or None."""
    try:
        from torch.distributed.fsdp import fully_shard

        layer = fully_shard(nn.Linear(4, 4))
        layer(torch.ones(2, 4)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def data_parallel(rank: int, family: str, wrapper: str, way: str) -> Outcome:
    """``wrapper``: "ddp", "fsdp2" of layers, or "fsdp2 of experts" by themselves and layers."""
    plain: Any = moe_model(family).train()
    model: Any = deepcopy(plain)
    if way == "patched":
        inlay.patch(model, OPS)
    elif way == "registered":
        model.set_experts_implementation("inlay")
    wrapped = _wrapped(model, wrapper)
    if way == "patched afterwards":
        inlay.patch(model, OPS)
    return _train(wrapped, model, plain, rank, shared_batch=False)


def expert_parallel(rank: int, folder: str, settings: dict[str, Any], way: str) -> Outcome:
    """``settings`` of transformers' ``DistributedConfig``; the ranks of a tensor-parallel group share their batch."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    def load(**options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model.train()

    name = "inlay" if way != "unpatched" else "grouped_mm"
    model = load(distributed_config=DistributedConfig(**settings), experts_implementation=name)
    if way == "patched":
        inlay.patch(model, OPS)
    return _train(model, model, load(), rank, shared_batch=settings.get("tp_size", 1) > 1)


def distributed_settings(rank: int) -> list[str]:
    """What this transformers' ``DistributedConfig`` can be told; nothing if it has none."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return []
    return [each.name for each in fields(DistributedConfig)]


def _wrapped(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        if wrapper == "fsdp2 of experts":
            fully_shard(next(m for m in layer.modules() if type(m).__name__.endswith("Experts")))
        fully_shard(layer)
    return fully_shard(model)


def _train(wrapped: Any, model: Any, plain: Any, rank: int, shared_batch: bool) -> Outcome:
    outcome = Outcome()
    # Not foreach: it takes no tensors and DTensors together.
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=_RATE, foreach=False) for m in (model, plain))
    before = [p.detach().clone() for p in plain.parameters()]
    batches = tokens(model, STEPS * _BATCH, _LENGTH).view(STEPS, _BATCH, _LENGTH)
    with _Slots(outcome):
        for step, batch in enumerate(batches):
            part = batch if shared_batch else batch[rank * _BATCH // 2 : (rank + 1) * _BATCH // 2]
            expected = plain(batch, labels=batch).loss
            loss = wrapped(input_ids=part, labels=part).loss
            expected.backward()
            loss.backward()
            outcome.losses.append(abs(_mean(loss, shared_batch) - expected.item()))
            if step == 0:
                outcome.gradient = _distance(*([p.grad for p in m.parameters()] for m in (model, plain)))
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    outcome.change = _distance(
        *([_whole(p.detach()) - old for p, old in zip(m.parameters(), before, strict=True)] for m in (model, plain))
    )
    outcome.local_experts = next(m.num_experts for m in model.modules() if type(m).__name__.endswith("Experts"))
    report = inlay.report(model)
    for entry in report.entries:
        outcome.calls[entry.op] += entry.calls
    outcome.fallbacks.update(report.fallbacks)
    return outcome


def _mean(loss: Tensor, shared_batch: bool) -> float:
    """Over the ranks, whose batches are of one size."""
    loss = loss.detach().clone()
    if not shared_batch:
        torch.distributed.all_reduce(loss)
        loss /= 2
    return loss.item()


def _distance(actual: list[Any], expected: list[Any]) -> float:
    distances = [(_whole(one) - other).norm() / other.norm() for one, other in zip(actual, expected, strict=True)]
    return torch.stack(distances).max().item()


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class _Slots:
    """Counts the slots of other ranks' experts that Inlay's function is given."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __enter__(self) -> None:
        self.compute = experts.compute

        def compute(module: Any, x: Tensor, indices: Tensor, *others: Any) -> Tensor:
            self.outcome.sentinels += int((indices == module.num_experts).sum())
            return self.compute(module, x, indices, *others)

        experts.compute = compute

    def __exit__(self, *_: object) -> None:
        experts.compute = self.compute
