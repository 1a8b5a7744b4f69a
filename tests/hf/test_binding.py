"""What patching leaves on a model, what it does not touch, and how it is undone."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import inlay
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens

transformers = pytest.importorskip("transformers")


def _visible(model: nn.Module) -> dict[str, tuple]:
    """Everything about a model that other packages look at."""
    return {
        path: (type(module), frozenset(vars(module)), tuple(module._parameters), tuple(module._modules))
        for path, module in model.named_modules()
    }


@pytest.fixture(params=["qwen3", "qwen3_5"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return language_model(request.param)


def test_unpatch_restores_every_module(model: nn.Module) -> None:
    before = _visible(model)
    ids = tokens(model)
    expected = model(ids).logits
    inlay.patch(model)
    assert _visible(model) != before
    inlay.unpatch(model)
    assert _visible(model) == before
    assert torch.equal(model(ids).logits, expected)
    inlay.unpatch(model)
    assert _visible(model) == before


def test_patch_keeps_classes_parameters_and_state_dict(model: nn.Module) -> None:
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = list(model.state_dict())
    split = model._no_split_modules
    inlay.patch(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == state
    assert model._no_split_modules == split


def test_patching_twice_changes_nothing(model: nn.Module) -> None:
    first = inlay.patch(model)
    methods = {path: vars(module).get("forward") for path, module in model.named_modules()}
    second = inlay.patch(model)
    assert str(first) == str(second)
    assert all(vars(module).get("forward") is methods[path] for path, module in model.named_modules())


def test_patched_context_restores_what_it_found(model: nn.Module) -> None:
    before = _visible(model)
    with inlay.patched(model) as report:
        assert report.patched
    assert _visible(model) == before
    inlay.patch(model, ops=["rms_norm"])
    with inlay.patched(model):
        assert {entry.op for entry in inlay.report(model).patched} > {"rms_norm"}
    assert {entry.op for entry in inlay.report(model).patched} == {"rms_norm"}


def test_patched_context_restores_after_an_error(model: nn.Module) -> None:
    before = _visible(model)
    with pytest.raises(KeyError), inlay.patched(model):
        raise KeyError
    assert _visible(model) == before


def test_ops_select(model: nn.Module) -> None:
    report = inlay.patch(model, ops=["add_rms_norm"])
    assert {entry.op for entry in report.patched} == {"add_rms_norm"}
    assert {entry.reason for entry in report.unpatched} <= {
        "not patched (op rms_norm)",
        "not patched (op gated_rms_norm)",
        "not patched (op gdn_layer)",
        "not patched (op attention_layer)",
    }
    model(tokens(model))
    assert all(entry.calls for entry in inlay.report(model).patched)


def test_unknown_op_names_the_known_ones(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"ops must be names out of rms_norm, .*moe_block, got 'rmsnorm'"):
        inlay.patch(model, ops=["rmsnorm"])


@pytest.mark.parametrize("function", [inlay.patch, inlay.unpatch, inlay.report])
def test_rejects_what_is_no_model(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a diffusers pipeline, got int"):
        function(3)


def test_deepcopy_is_patched_and_independent(model: nn.Module) -> None:
    ids = tokens(model)
    inlay.patch(model)
    expected = model(ids).logits
    copy = deepcopy(model)
    assert inlay.report(copy).calls == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copy(ids).logits, expected)
    assert inlay.report(copy).calls > 0
    inlay.unpatch(model)
    assert inlay.report(copy).patched
    inlay.unpatch(copy)
    assert not inlay.report(copy).patched
    assert not any("forward" in vars(module) for module in copy.modules())


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_pickled_model_loads_unpatched_and_without_inlay(model: nn.Module, save: str) -> None:
    ids = tokens(model)
    expected = model(ids).logits
    inlay.patch(model)
    if save == "pickle":
        data = pickle.dumps(model)
        assert b"inlay." not in data  # no class or function of the package is needed to read it
        loaded = pickle.loads(data)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(ids).logits, expected)
    assert not inlay.report(loaded).patched
    inlay.patch(loaded)
    assert_same_values(loaded(ids).logits, expected, "logits")
    assert inlay.report(loaded).calls > 0
    inlay.unpatch(loaded)
    assert torch.equal(loaded(ids).logits, expected)


def test_state_dict_and_save_pretrained(model: nn.Module, tmp_path: Path) -> None:
    ids = tokens(model)
    inlay.patch(model)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not inlay.report(loaded).patched
    inlay.patch(loaded)
    assert torch.equal(loaded(ids).logits, expected)
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    inlay.patch(fresh)
    assert torch.equal(fresh(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_after_patching(model: nn.Module, dtype: torch.dtype) -> None:
    unpatched = deepcopy(model).to(dtype)
    inlay.patch(model)
    model.to(dtype)
    ids = tokens(model)
    assert_same_values(model(ids).logits, unpatched(ids).logits, "logits")
    report = inlay.report(model)
    if dtype == torch.float64:
        # The original computes these norms in float32 whatever it is given, which no op imitates.
        assert {entry.op for entry in report.patched if entry.calls} == {"attention_layer"}
        assert all("no op rounds as it does for float64" in reason for reason in report.fallbacks)
    else:
        assert not report.fallbacks


def test_strict_raises_instead_of_falling_back(model: nn.Module) -> None:
    inlay.patch(model, strict=True)
    model.double()
    with pytest.raises(RuntimeError, match=r"rms_norm of .*input_layernorm.* fell back: no op rounds .* float64"):
        model(tokens(model))
    inlay.patch(model, strict=False)
    model(tokens(model))


def test_data_parallel_replicas_use_their_own_weights(model: nn.Module) -> None:
    inlay.patch(model)
    norm = model.model.norm
    replica = norm._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert norm.forward.__self__ is norm
    replica.weight = torch.zeros_like(norm.weight) - (1 if "5" in type(model).__name__ else 0)
    x = torch.randn(3, norm.weight.shape[0])
    assert not replica(x).any()
    assert norm(x).any()


def test_patched_models_are_freed() -> None:
    model = language_model("qwen3")
    inlay.patch(model)
    model(tokens(model))
    layer = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None
