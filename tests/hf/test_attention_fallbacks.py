"""Attention that the op does not compute: transformers' own runs, its result is returned, and the report says why."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf import attention, masks
from inlay.ops import _attention_kernels
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens
from tests.hf.test_attention_layer import ONLY, layers

transformers: Any = pytest.importorskip("transformers")
modeling_utils = pytest.importorskip("transformers.modeling_utils")

HEADS, QUERIES, WIDTH = 4, 6, 16


class Subclass(torch.Tensor):
    pass


def inputs(width: int = WIDTH, keys: int = QUERIES, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def heads(count: int, length: int) -> Tensor:
        return torch.randn(2, count, length, width, generator=generator)

    q, k, v = heads(HEADS, QUERIES), heads(2, keys), heads(2, keys)
    return {"query": q, "key": k, "value": v, "attention_mask": None, "scaling": 0.3, "dropout": 0.0, **options}


def module(family: str = "llama") -> Any:
    return layers(language_model(family))[0].eval()


def ranges(begin: int = 0) -> Tensor:
    """Causal, with padding."""
    mask = torch.ones(2, QUERIES, dtype=torch.bool)
    mask[0, :begin] = False
    made = masks.inlay_mask(2, QUERIES, QUERIES, attention_mask=mask)
    assert isinstance(made, Tensor)
    return made


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "head width": ("heads are 12 wide, not a multiple of 8 up to 512", {"width": 12}),
    "head width, masked": (
        "heads are 12 wide, not a multiple of 8 up to 512", {"width": 12, "attention_mask": ranges(2)},
    ),
    "subclass": ("query is a Subclass", {"query": inputs()["query"].as_subclass(Subclass)}),
    "batches that broadcast": (
        "query, key and value have other batch sizes", {"query": inputs()["query"][:1], "attention_mask": None},
    ),
    "more queries than keys": ("causal attention with fewer keys than queries", {"keys": 4}),
    "packed rows": (
        "cu_seq_lens_q is given for more than one batch row", {"cu_seq_lens_q": torch.tensor([0, 6, 12])},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "options"), CASES.values(), ids=CASES.keys())
def test_reasons(reason: str, options: dict[str, Any]) -> None:
    layer, arguments = module(), inputs(**options)
    actual, weights = attention.attention_forward(layer, **arguments)
    mask = arguments["attention_mask"]
    arguments["attention_mask"] = None if mask is None else masks.visible(mask, QUERIES)
    expected, _ = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](layer, **arguments)
    assert torch.equal(actual, expected)
    assert weights is None
    (entry,) = [entry for entry in inlay.report(layer).entries if entry.op == "attention"]
    assert (entry.calls, entry.fallbacks) == (0, {reason: 1})


def test_attention_weights_are_eager_codes() -> None:
    """Asked for by an argument, or by the model's own recording."""
    model = language_model("llama", num_hidden_layers=2)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    eager, patched = deepcopy(model), deepcopy(model)
    for each, name in ((eager, "eager"), (model, "inlay")):
        each.set_attn_implementation(name)
    inlay.patch(patched)
    expected = eager(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(expected) == 2
    for each in (model, patched):
        actual = each(ids, attention_mask=mask, output_attentions=True).attentions
        for ours, theirs in zip(actual, expected, strict=True):
            kept = mask[:, None, :, None]
            assert_same_values(ours * kept, theirs * kept, "weights")
        assert inlay.report(each).fallbacks == {"attention weights are asked for": 2}
        each(ids, attention_mask=mask)
        assert inlay.report(each).fallbacks == {"attention weights are asked for": 2}


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_sdpa_would_ignore_goes_to_eager_code(family: str, masked: bool) -> None:
    """Softcap and sinks, with heads that are too odd for the op."""
    model = language_model(family, head_dim=12, sliding_window=4)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 1 - int(masked)
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation("inlay")
    expected, actual = (each(ids, attention_mask=mask).logits * mask[..., None] for each in (eager, model))
    assert_same_values(actual, expected, "logits")
    assert inlay.report(model).fallbacks == {"heads are 12 wide, not a multiple of 8 up to 512": 2}


def test_an_argument_of_the_models_own_eager_code() -> None:
    """Which the op does not know, and must not ignore."""
    layer, arguments = module(), inputs()

    def eager_attention_forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float,
        dropout: float = 0.0, head_mask: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert head_mask is not None
        assert attention_mask.shape[-2:] == (QUERIES, QUERIES)
        return query.transpose(1, 2) * head_mask, query

    layer.__class__ = type("Other", (type(layer),), {"__module__": "their_model"})
    fake = SimpleNamespace(eager_attention_forward=eager_attention_forward)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setitem(__import__("sys").modules, "their_model", fake)
        actual, weights = attention.attention_forward(layer, **arguments, head_mask=torch.full((), 2.0))
        attention.attention_forward(layer, **arguments)
    assert torch.equal(actual, 2 * arguments["query"].transpose(1, 2))
    assert weights is arguments["query"]
    counters = attention.counters_of(layer)
    assert counters is not None
    assert counters.fallbacks == {"its eager attention takes head_mask": 1}
    assert counters.calls.total() == 1


def test_a_model_without_eager_code() -> None:
    """Where sdpa would ignore the sinks, the op's reference computes, which takes heads of any width."""
    layer = nn.Module()
    sinks = torch.randn(HEADS)
    arguments = inputs(width=12, attention_mask=ranges(2))
    actual, _ = attention.attention_forward(layer, **arguments, s_aux=sinks, softcap=2.0)
    scores = arguments["query"] @ arguments["key"].repeat_interleave(2, 1).mT * arguments["scaling"]
    hidden = ~masks.visible(arguments["attention_mask"], QUERIES)
    scores = (2.0 * torch.tanh(scores / 2.0)).masked_fill(hidden, -torch.inf)
    weights = torch.cat([scores, sinks[:, None, None].expand(2, HEADS, QUERIES, 1)], -1).softmax(-1)[..., :-1]
    expected = (weights @ arguments["value"].repeat_interleave(2, 1)).transpose(1, 2)
    assert_same_values(actual, expected, "result")
    counters = attention.counters_of(layer)
    assert counters is not None
    assert counters.calls.total() == 0


def test_no_kernel_means_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the eager reference, whose scores are all in memory."""
    layer, arguments = module(), inputs(attention_mask=ranges(2))
    expected, _ = attention.attention_forward(layer, **arguments)
    monkeypatch.setattr(_attention_kernels, "has_kernel", lambda *_: False)
    assert_same_values(attention.attention_forward(layer, **arguments)[0][:, 2:], expected[:, 2:], "result")
    counters = attention.counters_of(layer)
    assert counters is not None
    assert counters.fallbacks == {"no kernel for float32 heads 16 wide": 1}


def test_a_transform_of_torch_func() -> None:
    layer, arguments = module(), inputs()
    tensors = tuple(arguments.pop(name) for name in ("query", "key", "value"))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attention_forward(layer, q[None], k[None], v[None], **arguments)[0][0]

    expected = attention.attention_forward(layer, *tensors, **arguments)[0]
    assert_same_values(torch.vmap(run)(*tensors), expected, "result")
    counters = attention.counters_of(layer)
    assert counters is not None
    assert set(counters.fallbacks) & {"inside a torch.func transform", "query is a Tensor"}


def test_a_paged_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"inlay": cache must be None, got a paged one'):
        attention.attention_forward(module(), **inputs(), cache=object())


# --- patched layers ---


def _layer_arguments(layer: Any, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, QUERIES, layer.head_dim // 2, generator=generator)
    angles = torch.cat([angles, angles], -1)
    x = torch.randn(2, QUERIES, layer.q_proj.in_features, generator=generator)
    return {
        "hidden_states": x, "position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None, **options,
    }  # fmt: skip


LAYER_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "subclass": ("x is a Subclass", {"hidden_states": torch.randn(2, QUERIES, 64).as_subclass(Subclass)}),
    "narrow angles": (
        "the position embeddings are 8 wide for heads 16 wide",
        {"position_embeddings": (torch.randn(1, QUERIES, 8), torch.randn(1, QUERIES, 8))},
    ),
    "wider angles": (
        "no op rounds as it does for float32 rotated by float64",
        {"position_embeddings": (torch.randn(1, QUERIES, 16).double(), torch.randn(1, QUERIES, 16).double())},
    ),
    "angles of one token": (
        "the position embeddings are [1, 1, 16] for [2, 6] tokens",
        {"position_embeddings": (torch.randn(1, 1, 16), torch.randn(1, 1, 16))},
    ),
}


@pytest.mark.parametrize(("reason", "options"), LAYER_CASES.values(), ids=LAYER_CASES.keys())
@torch.no_grad()
def test_layers_own_code(reason: str, options: dict[str, Any]) -> None:
    layer = module()
    arguments = _layer_arguments(layer, **options)
    expected: Any = None
    try:
        expected = layer(**arguments)[0]
    except RuntimeError as error:
        expected = error
    inlay.patch(layer, ONLY)
    if isinstance(expected, RuntimeError):
        with pytest.raises(RuntimeError):
            layer(**arguments)
    else:
        assert_same_values(layer(**arguments)[0], expected, "output")
    assert inlay.report(layer).fallbacks == {reason: 1}
    inlay.patch(layer, ONLY, strict=True)
    with pytest.raises(RuntimeError, match="attention_layer of the root module fell back"):
        layer(**arguments)


@torch.no_grad()
def test_a_gate_after_attention_that_fell_back() -> None:
    """The gate is then applied as the layer's own code does."""
    model = language_model("qwen3_5", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    ids = tokens(model)
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = eager(ids, output_attentions=True)
    inlay.patch(model, ONLY)
    actual = model(ids, output_attentions=True)
    assert_same_values(actual.logits, expected.logits, "logits")
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert_same_values(ours, theirs, "weights")
    assert inlay.report(model).fallbacks == {"attention weights are asked for": 2}


@torch.no_grad()
def test_flash_attention_set_after_patching_is_the_layers_own_business() -> None:
    """Its masks have two dimensions, and mean something else."""
    layer = module()
    inlay.patch(layer, ONLY)
    seen: list[Any] = []

    def flash(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        seen.append(module)
        return query.transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setitem(modeling_utils.AttentionInterface._global_mapping, "flash_attention_2", flash)
        layer.config._attn_implementation_internal = "flash_attention_2"
        layer(**_layer_arguments(layer, attention_mask=torch.ones(2, QUERIES, dtype=torch.bool)))
    assert seen == [layer]
    assert inlay.report(layer).fallbacks == {"its attention implementation is flash_attention_2": 1}


def test_the_report_shows_modules_that_are_not_patched() -> None:
    model = language_model("llama")
    model.set_attn_implementation("inlay")
    model(tokens(model))
    report = inlay.report(model)
    entries = [entry for entry in report.entries if entry.op == "attention"]
    assert [(entry.path, entry.backend, entry.calls) for entry in entries] == [
        (f"model.layers.{index}.self_attn", "cpu", 1) for index in range(2)
    ]
    assert "LlamaAttention  attention" in str(report)
    assert not [e for e in inlay.report(deepcopy(model)).entries if e.op == "attention"]
