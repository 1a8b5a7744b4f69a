"""Which modules are taken for attention layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf import attention_recognise
from inlay.hf.attention_recognise import AttentionSpec, recognise
from tests.hf.models import language_model
from tests.hf.test_attention_layer import layers
from tests.hf.test_attention_registry import families

transformers: Any = pytest.importorskip("transformers")


def layer(family: str = "qwen3", **overrides: Any) -> Any:
    return layers(language_model(family, **overrides))[0]


def reason_why_not(module: nn.Module) -> str:
    report = inlay.patch(module, ops=["attention_layer"])
    assert not [entry for entry in report.patched if entry.path == ""]
    assert module.config._attn_implementation != "inlay"
    return next(entry.reason for entry in report.unpatched if entry.path == "")


def subclassed(module: nn.Module, forward: Any) -> nn.Module:
    module.__class__ = type("Other", (type(module),), {"forward": forward})
    return module


def changed(module: nn.Module, **names: Any) -> nn.Module:
    """The module, with a forward that finds other globals than its class's."""
    original = type(module).forward
    inner = getattr(original, "__wrapped__", original)
    forward = type(inner)(
        inner.__code__, {**inner.__globals__, **names}, "forward", inner.__defaults__, inner.__closure__
    )
    return subclassed(module, functools.wraps(inner)(forward) if inner is not original else forward)


EXPECTED = {
    "llama": AttentionSpec(False, frozenset()),
    "qwen3_next": AttentionSpec(True, frozenset()),
    "qwen3_5": AttentionSpec(True, frozenset()),
    "gemma2": AttentionSpec(False, frozenset({"softcap"})),
    "gpt_oss": AttentionSpec(False, frozenset({"s_aux"})),
}


@families
def test_what_is_found(family: str) -> None:
    module = layers(language_model(family))[-1]
    spec = recognise(module)
    assert isinstance(spec, AttentionSpec)
    expected = EXPECTED.get(family.removesuffix("_moe"), AttentionSpec(False, frozenset()))
    assert (spec.gated, spec.keywords) == (expected.gated, expected.keywords)
    rotation = spec.wide or spec.narrow
    assert rotation is not None
    assert rotation.pairs == (family == "gpt_oss")
    assert not rotation.interleaved
    assert rotation.rounding.keys() == {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    # A rotation of a part of the channels is one by narrower angles.
    assert (spec.narrow is not None) == (family.startswith(("qwen3_next", "qwen3_5", "gpt_oss")))
    assert (spec.norms is not None) == ("q_norm" in module._modules)


def test_a_subclass_with_the_same_forward_is_patched() -> None:
    module = layer()
    module.__class__ = type("Other", (type(module),), {})
    assert "attention_layer" in {entry.op for entry in inlay.patch(module).patched}


def test_a_forward_around_the_forward_is_left_alone() -> None:
    module = layer()
    original = type(module).forward

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        output, weights = original(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return output * 1.001, weights

    reason = reason_why_not(subclassed(module, forward))
    assert reason == "its forward does not itself call an attention function of transformers"


def _scaled_output(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * 1.001, k


def _rotated_by_more(rotate: Any) -> Any:
    return lambda q, k, cos, sin, *rest: rotate(q, k, sin, cos, *rest)


def test_another_rotation_is_left_alone() -> None:
    module = layer("llama")
    for other in (_scaled_output, _rotated_by_more(transformers.models.llama.modeling_llama.apply_rotary_pos_emb)):
        reason = reason_why_not(changed(layer("llama"), apply_rotary_pos_emb=other))
        assert reason == "it does not rotate queries and keys as Inlay's op does"
    assert isinstance(recognise(module), AttentionSpec)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_another_eager_attention_is_left_alone(family: str) -> None:
    """A sink with a value, say, or a bias."""
    module = layer(family)
    inner = getattr(type(module).forward, "__wrapped__", type(module).forward)
    eager = inner.__globals__["eager_attention_forward"]

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        y, weights = eager(module, *args, **kwargs)
        return y + 0.01, weights

    reason = reason_why_not(changed(module, eager_attention_forward=attend))
    assert reason == "it computes something else than Inlay's attention layer"


def _dropout(module: Any) -> None:
    original = type(module).forward

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        self.attention_dropout, kept = 0.5, self.attention_dropout
        try:
            return original(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        finally:
            self.attention_dropout = kept

    subclassed(module, forward)


def _other_arguments(module: Any) -> None:
    def forward(self: Any, hidden_states: Any, position_ids: Any = None) -> Any:
        return hidden_states, None

    subclassed(module, forward)


def _failing(module: Any) -> None:
    def forward(
        self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        raise KeyError("rope")

    subclassed(module, forward)


def _buffer(module: Any) -> None:
    module.register_buffer("slopes", torch.ones(4))


def _wide_norm(module: Any) -> None:
    module.q_norm.weight = nn.Parameter(torch.ones(64))


REASONS = {
    _other_arguments: "its forward takes other arguments than a decoder's attention layer",
    _failing: "its forward could not be tried out: KeyError: 'rope'",
    _dropout: "its forward does not itself call an attention function of transformers",
    _buffer: "it has tensors of its own: slopes",
    _wide_norm: "its q_norm is not a norm of heads",
}


@pytest.mark.parametrize(("change", "reason"), REASONS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_left_alone(change: Any, reason: str) -> None:
    module = layer()
    change(module)
    assert reason_why_not(module) == reason


def test_heads_of_a_width_that_has_no_op() -> None:
    assert reason_why_not(layer("llama", head_dim=12)) == "its heads are 12 wide, not a multiple of 8 up to 512"


def test_modules_that_do_not_look_like_one_are_not_mentioned() -> None:
    model = language_model("llama")
    assert recognise(model.model.layers[0]) is None
    assert recognise(model.model.layers[0].mlp) is None
    assert recognise(nn.MultiheadAttention(16, 2)) is None


def test_an_experiment_is_made_once_and_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_recognise, "_known", {})
    made: list[nn.Module] = []
    original = attention_recognise._by_experiment

    def counting(module: Any) -> Any:
        made.append(module)
        return original(module)

    monkeypatch.setattr(attention_recognise, "_by_experiment", counting)
    model = language_model("llama")
    before = torch.random.get_rng_state()
    inlay.patch(model)
    inlay.report(model)
    assert len(made) == 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_on_the_meta_device_and_with_another_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read; nothing depends on torch's defaults."""
    monkeypatch.setattr(attention_recognise, "_known", {})
    config = language_model("gemma2").config
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
            report = inlay.patch(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(entry.op == "attention_layer" for entry in report.patched) == 2
