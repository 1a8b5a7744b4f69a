"""Routers of the model families, and how their results are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay import reference
from tests.support.compare import assert_within_budget

# What a gradient can come from.
DIFFERENTIABLE = ("weights", "mean_probabilities", "logsumexp")


@dataclass(frozen=True)
class RouterCase:
    tokens: int = 70
    experts: int = 16
    k: int = 4
    with_bias: bool = False
    masked: bool = False
    forced: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if value != getattr(RouterCase(), name)}
        own |= own.pop("options", {})
        return "-".join(f"{name}_{value}" for name, value in own.items()) or "plain"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Distinct within a row also in 16 bits, and in their differences: who is chosen must not hang on rounding.
        order = torch.rand(self.tokens, self.experts, device=device).argsort(-1)
        tensors = {"logits": ((order - self.experts / 2) * (6 / self.experts)).to(dtype)}
        if self.with_bias:
            tensors["bias"] = torch.randn(self.experts, device=device, dtype=wide)
        if self.masked:
            tensors["mask"] = torch.rand(self.tokens, device=device) < 0.6
        if self.forced:
            tensors["forced_indices"] = torch.rand(self.tokens, self.experts, device=device).topk(self.k)[1]
        return tensors

    def run(self, namespace: ModuleType, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if name != "logits"}
        weights, indices, stats = namespace.moe_router(tensors["logits"], self.k, stats=True, **rest, **self.options)
        return {"weights": weights, "indices": indices, **stats._asdict()}


DEEPSEEK = {"scoring": "sigmoid", "renormalize": True, "scaling": 2.5}
CASES = [
    RouterCase(k=2, experts=8, options={"renormalize": True}),  # Mixtral
    RouterCase(options={"renormalize": True}),  # Qwen3-MoE
    RouterCase(),  # OLMoE, Qwen2-MoE
    RouterCase(options={"softmax_after_topk": True}),  # gpt-oss
    RouterCase(options=DEEPSEEK, with_bias=True),  # GLM-4-MoE
    RouterCase(options={**DEEPSEEK, "groups": (4, 2)}, with_bias=True),  # DeepSeek-V3
    RouterCase(k=1, options={"scoring": "sigmoid"}),  # Llama 4
    RouterCase(with_bias=True, options={"softmax_after_topk": True, "scaling": 0.5}),
    RouterCase(masked=True, options={"renormalize": True}),
    RouterCase(masked=True, options=DEEPSEEK),
    RouterCase(forced=True, options={"renormalize": True}),
    RouterCase(forced=True, with_bias=True, options=DEEPSEEK),
    RouterCase(forced=True, options={"softmax_after_topk": True}),
    RouterCase(experts=1, k=1),
    RouterCase(experts=37, k=10, options={"renormalize": True}),
    RouterCase(experts=1024, k=32, tokens=9),
    RouterCase(experts=8, k=8, options={"renormalize": True}),
    RouterCase(experts=256, k=8, tokens=20, with_bias=True, options={**DEEPSEEK, "groups": (8, 4)}),
    RouterCase(experts=300, k=9, tokens=20, with_bias=True, forced=True, masked=True),
    RouterCase(experts=512, k=10, tokens=20, options={"renormalize": True}),  # Qwen3-Next
    RouterCase(tokens=0),
    RouterCase(tokens=1),
    RouterCase(tokens=5000, experts=24),
]


def check(case: RouterCase, tensors: dict[str, Tensor]) -> None:
    """Values, statistics and gradients."""
    logits = tensors["logits"]
    results = {}
    douts: dict[str, Tensor] = {}
    for name, namespace, to in (
        ("exact", reference, lambda t: t.double()),
        ("eager", reference, lambda t: t),
        ("actual", inlay, lambda t: t),
    ):
        own = {key: to(t) if t.is_floating_point() else t for key, t in tensors.items()}
        own["logits"] = own["logits"].detach().requires_grad_()
        outputs = case.run(namespace, own)
        if not douts:
            douts = {key: torch.randn(outputs[key].shape, device=logits.device).double() for key in DIFFERENTIABLE}
        gradient = torch.autograd.grad(
            [outputs[key] for key in DIFFERENTIABLE],
            own["logits"],
            [to(dout.to(outputs[key].dtype)) for key, dout in douts.items()],
        )[0]
        results[name] = {key: t.detach() for key, t in outputs.items()} | {"dlogits": gradient}
    exact, eager, actual = results["exact"], results["eager"], results["actual"]
    assert torch.equal(actual["indices"], exact["indices"])
    assert torch.equal(actual["counts"], exact["counts"])
    for name in exact.keys() - {"indices", "counts"}:
        # Scores are of size 1, and what is taken from them, or from one, may cancel.
        assert_within_budget(actual[name], eager[name], exact[name], name, terms=4.0)
