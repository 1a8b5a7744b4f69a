"""Which modules are taken for Gated DeltaNet layers, and which calls of these are left to their own code."""

from __future__ import annotations

import functools
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf import gdn_recognise
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens
from tests.hf.test_gdn_layer import FAMILIES, families, gdn_layer, hidden, new_cache

transformers = pytest.importorskip("transformers")


def reason_why_not(layer: nn.Module) -> str:
    report = inlay.patch(layer, ops=["gdn_layer"])
    assert not report.patched
    return next(entry.reason for entry in report.unpatched if entry.path == "")


def subclassed(layer: nn.Module, forward: Any) -> nn.Module:
    layer.__class__ = type("Other", (type(layer),), {"forward": forward})
    return layer


def test_a_subclass_with_the_same_forward_is_patched() -> None:
    layer = gdn_layer("qwen3_5")
    layer.__class__ = type("Other", (type(layer),), {})
    assert [entry.op for entry in inlay.patch(layer, ops=["gdn_layer"]).patched] == ["gdn_layer"]


@families
def test_a_subclass_that_computes_something_else_is_left_alone(family: str) -> None:
    layer = gdn_layer(family)
    original = type(layer).forward

    def forward(
        self: nn.Module, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        return original(self, hidden_states, cache_params, attention_mask, **kwargs) * 1.001

    assert reason_why_not(subclassed(layer, forward)) == "it computes something else than Inlay's Gated DeltaNet layer"


def test_a_decorator_that_changes_the_result_is_seen() -> None:
    layer = gdn_layer("qwen3_5")
    original = type(layer).forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, *args, **kwargs) * 1.001

    assert reason_why_not(subclassed(layer, forward)) == "it computes something else than Inlay's Gated DeltaNet layer"


def test_a_forward_that_fails_is_left_alone() -> None:
    def forward(
        self: nn.Module, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        raise KeyError("rope")

    layer = subclassed(gdn_layer("qwen3_5"), forward)
    assert reason_why_not(layer) == "its forward could not be tried out: KeyError: 'rope'"


def _other_arguments(layer: nn.Module) -> None:
    subclassed(layer, lambda self, hidden_states, cache_params=None, cache_position=None: hidden_states)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_arguments, "its forward takes other arguments than hidden_states, cache_params, attention_mask and"),
        (lambda layer: setattr(layer, "activation", "gelu"), "its activation is gelu, not silu"),
        (lambda layer: setattr(layer, "head_k_dim", 20), "its heads are 20 wide, not a multiple of 8 up to 256"),
        (lambda layer: setattr(layer, "num_v_heads", 5), "its 5 value heads are not a multiple of its 2 key heads"),
        (lambda layer: delattr(layer, "value_dim"), "it has no value_dim"),
        (lambda layer: layer.register_parameter("D", nn.Parameter(torch.ones(4))), "its tensors are not A_log and"),
        (lambda layer: setattr(layer, "conv1d", nn.Identity()), "its conv1d is a Identity"),
        (lambda layer: setattr(layer.conv1d, "kernel_size", (9,)), "its convolution is 9 wide, not 2 to 8"),
        (lambda layer: setattr(layer.conv1d, "groups", 1), "its convolution is not depthwise over q, k and v"),
        (lambda layer: setattr(layer, "extra", nn.Identity()), "its parts are A_log"),
    ],
)
def test_structure(change: Any, reason: str) -> None:
    layer = gdn_layer("qwen3_5")
    change(layer)
    if reason == "its parts are A_log":
        reason = "its parts are conv1d, extra, in_proj_a"
    assert reason_why_not(layer).startswith(reason)


def test_layers_of_other_models_are_left_alone() -> None:
    """OLMo-Hybrid's layer has a name like these and other parts."""
    config = transformers.OlmoHybridConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        report = inlay.patch(transformers.OlmoHybridForCausalLM(config))
    assert not [entry for entry in report.patched if entry.op == "gdn_layer"]
    (reason,) = [entry.reason for entry in report.unpatched if entry.cls == "OlmoHybridGatedDeltaNet"]
    assert reason.startswith("its parts are ")


def test_no_random_number_is_drawn_and_no_weight_is_read() -> None:
    gdn_recognise._known.clear()
    layer = language_model("qwen3_5").model.layers[0].linear_attn.to("meta")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert [entry.op for entry in inlay.patch(layer, ops=["gdn_layer"]).patched] == ["gdn_layer"]
    assert torch.equal(torch.get_rng_state(), before)


def as_module(function: Any) -> nn.Module:
    """What the package kernels makes of a function."""

    class Function(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    return Function()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", [lambda function: function, as_module], ids=["function", "module"])
def test_recognised_where_other_packages_have_replaced_its_functions(
    family: str, wrapper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where flash-linear-attention is installed, whose kernels do not run where layers are tried out."""
    layer = gdn_layer(family)
    module = __import__(type(layer).__module__, fromlist=["_"])
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
        function = getattr(module, name)

        @functools.wraps(function)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(module, name, wrapper(kernel))
    gdn_recognise._known.clear()
    assert [entry.op for entry in inlay.patch(layer, ops=["gdn_layer"]).patched] == ["gdn_layer"]


# --- calls ---


def fell_back(layer: nn.Module, *args: Any, **kwargs: Any) -> str:
    """Runs a patched copy, compares it with the original bit for bit, and gives the one reason why it fell back."""
    patched = deepcopy(layer)
    inlay.patch(patched, ops=["gdn_layer"])
    with torch.no_grad():
        actual, expected = patched(*args, **kwargs), layer(*args, **kwargs)
    assert torch.equal(actual, expected)
    report = inlay.report(patched)
    assert report.calls == 0
    ((reason, count),) = report.fallbacks.items()
    assert count == 1
    return reason


@families
def test_a_cache_that_records_the_past(family: str, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 6)
    results = []
    for patched in (False, True):
        if patched:
            inlay.patch(layer, ops=["gdn_layer"])
        cache = new_cache()
        with torch.no_grad():
            y = [layer(x[:, :4], cache_params=cache)]
            cache.layers[0].activate_past_recording()
            y += [layer(x[:, 4:5], cache_params=cache), layer(x[:, 5:], cache_params=cache)]
        results.append((torch.cat(y, 1), cache.layers[0].conv_states[0]))
    for actual, expected in zip(*reversed(results), strict=True):
        assert_same_values(actual, expected, "recorded")
    assert results[1][1].shape[-1] > 4, "nothing was recorded"
    report = inlay.report(layer)
    assert report.calls == 1
    assert report.fallbacks == {"the cache records past states": 2}


def test_float64() -> None:
    layer = gdn_layer("qwen3_5").double()
    assert fell_back(layer, hidden(layer, 1, 5)) == "no op rounds as it does for float64"


def test_tensor_subclass() -> None:
    class Subclass(Tensor):
        pass

    layer = gdn_layer("qwen3_5")
    assert fell_back(layer, hidden(layer, 1, 5).as_subclass(Subclass)) == "x is a Subclass"


def test_strict_names_the_layer() -> None:
    model = language_model("qwen3_5")
    inlay.patch(model, strict=True, ops=["gdn_layer"])
    cache = transformers.DynamicCache(config=model.config)
    cache.layers[1].activate_past_recording()
    with pytest.raises(RuntimeError, match=r"gdn_layer of model\.layers\.1\.linear_attn fell back: the cache records"):
        model(tokens(model), past_key_values=cache)


def test_a_cache_without_a_place_for_the_layer_raises_as_the_layer_does() -> None:
    layer = gdn_layer("qwen3_5")
    layer.layer_idx = 3
    inlay.patch(layer)
    with pytest.raises((IndexError, ValueError)):
        layer(hidden(layer, 1, 5), cache_params=new_cache())
    assert inlay.report(layer).fallbacks == {"the cache has no states for this layer": 1}


def test_offloaded_convolution() -> None:
    """accelerate's hook on conv1d fires although the module is never called, once for each call of the layer."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer = gdn_layer("qwen3_5")
    x = hidden(layer, 1, 5)
    expected, events = layer(x), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            events.append("in")
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            events.append("out")
            return output

    hooks.add_hook_to_module(layer.conv1d, Hook())
    inlay.patch(layer, strict=True)
    assert_same_values(layer(x), expected, "with a hook")
    assert events == ["in", "out"]


def test_a_replaced_forward_is_left_alone() -> None:
    layer = gdn_layer("qwen3_5")
    layer.forward = MethodType(lambda self, hidden_states: hidden_states, layer)
    assert reason_why_not(layer).startswith("its forward was replaced by tests.hf")
