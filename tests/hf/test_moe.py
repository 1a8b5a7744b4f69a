"""Mixtures of experts: with Inlay's routers, experts and blocks they compute what they do without."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf import experts, moe_block, router
from tests.hf.compare import assert_same_values, gradients, relative_error
from tests.hf.models import tokens
from tests.hf.moe_models import MOE_MODELS, WITH_AUX_LOSS, moe_model

transformers: Any = pytest.importorskip("transformers")
families = pytest.mark.parametrize("family", MOE_MODELS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OPS = ("moe_router", "moe_experts", "moe_block")
WAYS = ("patched", "registered")


def with_inlay(model: nn.Module, way: str) -> Any:
    """A copy that computes its experts by Inlay: patched, routers and blocks too, or by the name in the registry."""
    ours: Any = deepcopy(model)
    if way == "patched":
        inlay.patch(ours, OPS, strict=True)
    else:
        ours.set_experts_implementation("inlay")
    return ours


def assert_served(model: nn.Module) -> None:
    report = inlay.report(model)
    ran = {entry.op for entry in report.entries if entry.calls}
    assert ran & {"moe_experts", "moe_block"}
    assert report.fallbacks == {}


@families
def test_finds_every_module(family: str) -> None:
    model = moe_model(family)
    report = inlay.patch(model, OPS)
    layers = model.config.num_hidden_layers
    wanted = {"moe_router": layers, "moe_experts": layers}
    if MOE_MODELS[family][2]:
        wanted["moe_block"] = layers
    assert Counter(entry.op for entry in report.patched) == wanted
    inlay.unpatch(model)
    assert not inlay.report(model).patched


@families
@dtypes
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits(family: str, dtype: torch.dtype, way: str) -> None:
    """Those of routers too, from the recorder."""
    model = moe_model(family, dtype=dtype)
    ids = tokens(model, length=19)
    ours = with_inlay(model, way)
    options = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    expected, actual = model(ids, **options), ours(ids, **options)
    if dtype == torch.float32:  # in 16 bits a rounding may choose another expert
        assert_same_values(actual.logits, expected.logits, "logits")
    else:
        exact = deepcopy(model).float()(ids).logits.double()
        error, eager = ((x.logits.double() - exact).norm() for x in (actual, expected))
        assert error <= 2 * eager
    for theirs, our in zip(
        getattr(expected, "router_logits", None) or (), getattr(actual, "router_logits", None) or (), strict=True
    ):
        assert our.shape == theirs.shape
        if dtype == torch.float32:
            assert_same_values(our, theirs, "router logits")
    if options:
        assert len(expected.router_logits) == model.config.num_hidden_layers
    assert_served(ours)


@families
@pytest.mark.parametrize("way", WAYS)
def test_gradients(family: str, way: str) -> None:
    """Of every parameter, experts and routers among them, with the auxiliary loss where there is one."""
    model = moe_model(family).train()
    ids = tokens(model, length=19)
    options = {"output_router_logits": True} if family in WITH_AUX_LOSS else {}
    ours = with_inlay(model, way)
    expected = gradients(model, ids, **options)
    errors = relative_error(gradients(ours, ids, **options), expected)
    assert max(errors.values()) < 1e-3, errors
    routers = [name for name in expected if name.endswith((".gate.weight", "router.weight"))]
    assert len(routers) == model.config.num_hidden_layers
    assert all(expected[name].norm() > 0 for name in routers)
    if options:
        pair = [m(ids, labels=ids, **options) for m in (model, ours)]
        torch.testing.assert_close(pair[1].aux_loss, pair[0].aux_loss)
        torch.testing.assert_close(pair[1].loss, pair[0].loss)
    assert_served(ours)


@pytest.mark.parametrize("family", WITH_AUX_LOSS)
def test_the_loss_of_a_models_router_logits(family: str) -> None:
    model = moe_model(family)
    ids = tokens(model, length=19)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    k = model.config.num_experts_per_tok
    actual = inlay.load_balancing_loss(outputs.router_logits, k, attention_mask=mask)
    torch.testing.assert_close(actual, outputs.aux_loss)


@families
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens(family: str, way: str) -> None:
    model = moe_model(family)
    ids = tokens(model, length=5)
    options = {"max_new_tokens": 8, "do_sample": False}
    ours = with_inlay(model, way)
    assert torch.equal(ours.generate(ids, **options), model.generate(ids, **options))
    assert_served(ours)


@families
@pytest.mark.parametrize("way", WAYS)
def test_compiles_in_one_graph(family: str, way: str) -> None:
    """The whole block, the first call being a compiled one."""
    model = moe_model(family)
    path = next(name for name, module in model.named_modules() if name.endswith(("mlp", "block_sparse_moe")))
    block = with_inlay(model, way).get_submodule(path)
    experts._known.clear()
    torch._dynamo.reset()
    x = torch.randn(2, 7, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    torch.testing.assert_close(first(compiled(x)), first(block(x)))
    torch._dynamo.reset()


def test_parameters_stay_themselves() -> None:
    """The optimiser's, FSDP's: no copy, no packing, the same names."""
    model: Any = moe_model("qwen3_5_moe")
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    inlay.patch(model, OPS)
    model(tokens(model)).logits.sum().backward()
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.data_ptr() == before[name][1]
        assert torch.equal(p, before[name][2])


def _experts(family: str = "qwen3_moe", **options: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    model = moe_model(family, **options)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    x = torch.randn(9, 64)
    weights, indices = torch.rand(9, module.num_experts).topk(2)
    return module, x, indices, weights


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sentinels_of_expert_parallelism(family: str) -> None:
    """Slots of experts that other ranks have: as transformers' own function, forward and backward."""
    module, x, indices, weights = _experts(family)
    # transformers 5.16 lets what it has not computed for such slots into the gradients of biases.
    judged = slice(None) if hasattr(module, "_is_expert_parallel") else slice(0, 5 if family == "qwen3_moe" else 3)
    module._is_expert_parallel = True
    none = torch.rand(indices.shape) < 0.4
    indices, weights = indices.masked_fill(none, module.num_experts), weights.masked_fill(none, 0.0)
    results = []
    for name in ("grouped_mm", "inlay"):
        module.config._experts_implementation_internal = name
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0], indices, leaves[1])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)][judged])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_half_of_the_experts_on_each_rank() -> None:
    """What transformers' expert parallelism does, without processes: the ranks' results add up to the whole."""
    module, x, indices, weights = _experts()
    module.config._experts_implementation_internal = "inlay"
    whole, total = module(x, indices, weights), 0.0
    for rank in (0, 1):
        local = deepcopy(module)
        local.num_experts = 2
        local._is_expert_parallel = True
        for name in ("gate_up_proj", "down_proj"):
            setattr(local, name, nn.Parameter(getattr(module, name)[2 * rank : 2 * rank + 2]))
        own = (indices >= 2 * rank) & (indices < 2 * rank + 2)
        total = total + local(x, torch.where(own, indices - 2 * rank, 2), torch.where(own, weights, 0.0))
    torch.testing.assert_close(total, whole)


def test_a_module_that_has_not_been_told_that_it_has_some_experts_only() -> None:
    """Indices are those of all experts then: nothing is computed with the wrong ones."""
    module, x, indices, weights = _experts()
    assert experts.why_not(module, x, indices, weights) is None
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name)[:2]))
    assert experts.why_not(module, x, indices, weights) == "its projections are of 2 experts, not 4"
    module.num_experts = 2
    assert experts.why_not(module, x, indices, weights) is None


def test_other_activations_are_recognised() -> None:
    for name, activation in {
        "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    }.items():  # fmt: skip
        module, x, indices, weights = _experts(hidden_act=name)
        gate = experts._gate_of(module)
        assert gate == experts.Gate(activation, False, None)
        module.config._experts_implementation_internal = "inlay"
        actual = module(x, indices, weights)
        module.config._experts_implementation_internal = "eager"
        torch.testing.assert_close(actual, module(x, indices, weights))
    assert experts._gate_of(_experts("gpt_oss")[0]) == experts.Gate("gpt_oss", True, 7.0)


def test_an_unknown_activation_is_left_to_transformers() -> None:
    module, x, indices, weights = _experts(hidden_act="mish")
    assert "activation" in str(experts.plan(module))
    module.config._experts_implementation_internal = "eager"
    expected = module(x, indices, weights)
    module.config._experts_implementation_internal = "inlay"
    torch.testing.assert_close(module(x, indices, weights), expected)
    counters = experts.counters_of(module)
    assert counters is not None
    assert list(counters.fallbacks) == ["what is between its projections is no activation of the op"]


def test_float16_tokens_for_bfloat16_experts() -> None:
    """As grouped_mm has it: cast to the projections' dtype, and back."""
    module, x, indices, weights = _experts()
    module.bfloat16()
    module.config._experts_implementation_internal = "inlay"
    y = module(x, indices, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16(), indices, weights).float())


def test_experts_with_hooks_are_called() -> None:
    """A block with a shared expert gives way to its own code."""
    model: Any = moe_model("qwen3_5_moe")
    expected = model(tokens(model)).logits
    inlay.patch(model, OPS)
    calls: list[str] = []
    block = next(m for m in model.modules() if type(m).__name__.endswith("SparseMoeBlock"))
    block.experts.register_forward_hook(lambda *_: calls.append("experts"))
    assert_same_values(model(tokens(model)).logits, expected, "logits")
    assert calls == ["experts"]
    assert inlay.report(model).fallbacks == {"its experts have hooks": 1}


def test_autocast() -> None:
    """Routers and blocks run their own code; experts compute in their parameters' dtype, as grouped_mm does."""
    model: Any = moe_model("qwen3_5_moe")
    ids = tokens(model)
    ours = deepcopy(model)
    inlay.patch(ours, OPS)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(ids).logits, model(ids).logits
    exact = model(ids).logits
    assert (actual.float() - exact).norm() <= 2 * (expected.float() - exact).norm()


class OtherRouter(nn.Module):
    """Renormalises to two."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.hidden_dim = 2, 4, 8
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states @ self.weight.T
        weights, indices = logits.softmax(-1).topk(2)
        return logits, 2 * weights / weights.sum(-1, keepdim=True), indices


class OtherBlock(nn.Module):
    """Does not weigh its shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared_expert, self.shared_expert_gate = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        self.experts = _experts()[0]

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat)
        self.shared_expert_gate(flat)
        return (self.experts(flat, indices, weights) + self.shared_expert(flat)).view(hidden_states.shape)


def test_what_computes_something_else_is_left_alone() -> None:
    assert router.plan(OtherRouter()) == "it computes something else than Inlay's router"
    assert moe_block.plan(OtherBlock()) == "it computes something else than experts and a shared one"
    assert router.plan(nn.Linear(2, 2)) is None
    assert experts.plan(nn.Linear(2, 2)) is None
    assert moe_block.plan(nn.Linear(2, 2)) is None


def test_the_monitor_watches_models() -> None:
    model: Any = moe_model("deepseek_v3").train()
    inlay.patch(model, OPS)
    monitor = inlay.RouterMonitor(model)
    ids = tokens(model, length=19)
    model(ids)
    scalars = monitor.scalars()
    assert scalars["router/mean/effective_experts"] > 1
    assert scalars["router/mean/margin"] >= 0
    assert sum("max_vio" in name for name in scalars) == model.config.num_hidden_layers + 1
