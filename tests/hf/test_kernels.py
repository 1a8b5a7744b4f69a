"""transformers' kernel hooks: what is registered, and that models compute the same with it."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay import _load
from inlay.hf.kernels import LAYERS
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens
from tests.hf.test_gdn_layer import FAMILIES, families, gdn_layer, hidden, new_cache
from tests.hf.test_gdn_packing import numbers, offsets, separately

transformers = pytest.importorskip("transformers")
hub_kernels = pytest.importorskip("transformers.integrations.hub_kernels")

HOOKS = {  # the names that models call the functions by
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
    "chunk_gated_delta_rule": "torch_chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "torch_recurrent_gated_delta_rule",
}


def module_of(layer: nn.Module) -> ModuleType:
    return inspect.getmodule(type(layer))


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Does what the package kernels does once a model uses kernels: calls go to our layers, with all their keywords."""

    def hook(layer: nn.Module) -> list[str]:
        calls: list[str] = []
        for name, function in HOOKS.items():

            def call(*args: Any, name: str = name, **kwargs: Any) -> Any:
                calls.append(name)
                return LAYERS[name]()(*args, **kwargs)

            monkeypatch.setattr(module_of(layer), function, call)
        return calls

    return hook


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_those_of_the_function(name: str, family: str) -> None:
    """kernels compares kinds and number, and passes arguments by position and by name."""
    function = getattr(module_of(gdn_layer(family)), HOOKS[name])
    if isinstance(function, nn.Module):  # what kernels makes of it
        _, *expected = inspect.signature(type(function).forward).parameters.values()
    else:
        expected = list(inspect.signature(function).parameters.values())
    _, *actual = inspect.signature(LAYERS[name].forward).parameters.values()
    assert [(p.name, p.kind) for p in actual] == [(p.name, p.kind) for p in expected]


@pytest.mark.parametrize("layer", LAYERS.values())
def test_layers_are_stateless(layer: type[nn.Module]) -> None:
    assert layer.__init__ is nn.Module.__init__
    added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert added == {"can_torch_compile"}


@families
def test_generating_with_hooks(family: str, device: str, hooked: Any) -> None:
    model = language_model(family, device)
    ids = tokens(model)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    calls = hooked(model.model.layers[0].linear_attn)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert set(calls) == set(LAYERS)


@families
def test_training_with_hooks(family: str, device: str, hooked: Any) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 70)
    calls, results = [], []
    for hook in (list, lambda: hooked(layer)):
        calls, y = hook(), layer(x)
        results.append([y, *torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y).cumsum(-1))])
    assert set(calls) == {"causal_conv1d_fn", "chunk_gated_delta_rule"}
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@families
def test_a_step_with_gradients(family: str, device: str, hooked: Any) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 12)
    expected = torch.autograd.grad(layer(x)[:, -1].square().sum(), layer.conv1d.weight)[0]
    calls, cache = hooked(layer), new_cache()
    with torch.no_grad():
        layer(x[:, :-1], cache_params=cache)
    before = cache.layers[0].conv_states[0].clone()
    y = layer(x[:, -1:], cache_params=cache)
    assert "causal_conv1d_update" in calls
    assert_same_values(y, layer(x)[:, -1:], "step")
    assert torch.equal(cache.layers[0].conv_states[0][..., :-1], before[..., 1:])
    (actual,) = torch.autograd.grad(y.square().sum(), layer.conv1d.weight)
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert actual.any()


@families
@torch.no_grad()
def test_packed_sequences_with_hooks(family: str, device: str, hooked: Any) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 1, 90)
    lengths = [20, 70]
    hooked(layer)
    packed = layer(x, cu_seq_lens_q=offsets(lengths, device), seq_idx=numbers(lengths, device))
    assert_same_values(packed, separately(layer, x, lengths), "output")


@torch.no_grad()
def test_activations_that_are_not_fused(device: str) -> None:
    x, weight = torch.randn(2, 8, 20, device=device), torch.randn(8, 4, device=device)
    y = LAYERS["causal_conv1d_fn"]()(x, weight, activation="gelu")
    expected = torch.nn.functional.conv1d(x, weight[:, None], padding=3, groups=8)[..., :20]
    torch.testing.assert_close(y, torch.nn.functional.gelu(expected), rtol=1e-4, atol=1e-5)


def test_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    mapping: dict = {"chunk_gated_delta_rule": {"xpu": theirs}}
    monkeypatch.setattr(hub_kernels, "get_kernel_mapping_transformers", lambda: mapping, raising=False)
    assert inlay.register_kernels() == list(LAYERS)
    assert mapping["chunk_gated_delta_rule"].pop("xpu") is theirs
    devices = {"cpu", "cuda"} if _load.cuda_library().loaded else {"cpu"}
    assert {name: set(by_device) for name, by_device in mapping.items()} == dict.fromkeys(LAYERS, devices)
    for name, layer in LAYERS.items():
        assert mapping[name]["cpu"].load() is layer


def test_without_the_kernels_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hub_kernels, "get_kernel_mapping_transformers", raising=False)
    with pytest.raises(ImportError, match="register_kernels: transformers has kernel hooks only with the package"):
        inlay.register_kernels()


def test_a_model_that_uses_kernels() -> None:
    if not hasattr(hub_kernels, "get_kernel_mapping_transformers"):
        pytest.skip("no package kernels in a version that this transformers takes")
    model = language_model("qwen3_5")
    ids = tokens(model)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    inlay.register_kernels()
    model.set_use_kernels(True)
    functions = model.model.layers[0].linear_attn._kernel_funcs.values()
    assert {function.forward.__func__.__module__ for function in functions} == {"inlay.hf.kernels"}
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
