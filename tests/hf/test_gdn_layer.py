"""Whole Gated DeltaNet layers: caches, padding, gradients and autocast, patched against unpatched.

Logits, gradients and tokens of the models they are in: test_language_models.py. Packed sequences: test_gdn_packing.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from tests.hf.compare import assert_same_values, gradients, relative_error
from tests.hf.models import language_model, tokens

transformers = pytest.importorskip("transformers")
FAMILIES = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]
families = pytest.mark.parametrize("family", FAMILIES)


def gdn_layer(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """The first GDN layer of a model, with weights large enough that every step of it shows in the result."""
    layer = language_model(family, device, dtype, **overrides).model.layers[0].linear_attn
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.25)
            if name == "conv1d.weight":
                parameter.normal_(0, 0.7)
    return layer


def hidden(layer: nn.Module, batch: int, length: int) -> Tensor:
    weight = layer.out_proj.weight
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, length, weight.shape[0], generator=generator).to(weight)


def new_cache(layer_idx: int = 0) -> Any:
    from transformers.cache_utils import Cache, LinearAttentionLayer

    return Cache(layers=[LinearAttentionLayer() for _ in range(layer_idx + 1)])


def assert_close(actual: Tensor, expected: Tensor, what: str, computed_in: torch.dtype) -> None:
    """In 16 bits within one unit in the last place, in relative L2: transformers 5.16 rounds the normalised q and k."""
    if computed_in == torch.float32:
        return assert_same_values(actual, expected, what)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= torch.finfo(computed_in).eps, f"{what}: {error:.2e}"


def calls(report: inlay.hf.report.Report) -> list[int]:
    return [entry.calls for entry in report.patched if entry.op == "gdn_layer"]


@families
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_prefill_in_pieces_then_decoding(family: str, kind: str, device: str, dtype: torch.dtype) -> None:
    """The first piece is shorter than the convolution; the third is a sequence, the others steps in place."""
    model = language_model(family, device, dtype)
    ids = tokens(model, length=36)
    pieces = ids.split([3, 5, 24, 1, 2, 1], dim=1)
    results = []
    for patched in (False, True):
        if patched:
            inlay.patch(model, strict=True)
        cache = (
            transformers.DynamicCache(config=model.config)
            if kind == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=40)
        )
        logits, addresses = [], set()
        for piece in pieces:
            logits.append(model(piece, past_key_values=cache).logits)
            states = cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
            addresses.add(tuple(state.data_ptr() for state in states))
        assert len(addresses) == 1, "the cache's tensors moved"
        results.append((torch.cat(logits, 1), *states))
    for actual, expected, what in zip(*reversed(results), ("logits", "conv state", "recurrent state"), strict=True):
        assert_close(actual, expected, what, dtype)
    assert calls(inlay.report(model)) == [len(pieces)] * 3


@families
@torch.no_grad()
def test_pieces_agree_with_the_whole(family: str, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 100)
    inlay.patch(layer, strict=True)
    whole, cache = layer(x), new_cache()
    pieces = [layer(piece, cache_params=cache) for piece in x.split([70, 1, 16, 13], dim=1)]
    assert_same_values(torch.cat(pieces, 1), whole, "pieces")


@families
@torch.no_grad()
def test_a_cache_goes_on_after_patching_and_unpatching(family: str, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 12)
    expected, cache = layer(x), new_cache()
    results = []
    for index, piece in enumerate(x.split(3, dim=1)):
        (inlay.patch if index % 2 else inlay.unpatch)(layer)
        results.append(layer(piece, cache_params=cache))
    assert_same_values(torch.cat(results, 1), expected, "pieces, patched and unpatched in turn")


@families
@torch.no_grad()
def test_a_cache_that_was_reset_or_reordered(family: str, device: str) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 9)
    inlay.patch(layer, strict=True)
    cache = new_cache()
    first = layer(x, cache_params=cache)
    cache.reset()
    assert torch.equal(layer(x, cache_params=cache), first)
    swapped = torch.tensor([1, 0], device=device)
    cache.reorder_cache(swapped)
    straight = new_cache()
    layer(x[swapped], cache_params=straight)
    assert_same_values(layer(x, cache_params=cache), layer(x, cache_params=straight), "after reordering")


@families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(family: str, side: str, device: str, dtype: torch.dtype) -> None:
    """As the layer's own code; and on the left, as the same sequence without padding."""
    layer = gdn_layer(family, device, dtype)
    x = hidden(layer, 3, 40)
    mask = torch.ones(3, 40, dtype=torch.bool, device=device)
    padding = slice(0, 7) if side == "left" else slice(33, 40)
    mask[0, padding] = mask[2, padding] = False
    theirs, ours = new_cache(), new_cache()
    expected = layer(x, cache_params=theirs, attention_mask=mask)
    inlay.patch(layer, strict=True)
    actual = layer(x, cache_params=ours, attention_mask=mask)
    assert_close(actual, expected, "output", dtype)
    for state in ("conv_states", "recurrent_states"):
        assert_close(getattr(ours.layers[0], state)[0], getattr(theirs.layers[0], state)[0], state, dtype)
    if side == "left" and dtype == torch.float32:
        assert_same_values(actual[:1, 7:], layer(x[:1, 7:]), "without padding")


@families
def test_gradients_through_a_cache(family: str, device: str) -> None:
    """A sequence in two pieces has the gradients of the whole; the layer's own code cannot do that at all."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 30)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    inlay.patch(layer, strict=True)
    cache = new_cache()
    pieces = [layer(piece, cache_params=cache) for piece in x.split([20, 10], dim=1)]
    actual = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), list(layer.parameters()))
    for ours, theirs, (name, _) in zip(actual, expected, layer.named_parameters(), strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4, name


@families
def test_checkpointed_training_with_padding(family: str, device: str) -> None:
    model = language_model(family, device).train()
    ids = tokens(model, length=20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(model, ids, attention_mask=mask, use_cache=False)
    inlay.patch(model, strict=True)
    actual = gradients(model, ids, attention_mask=mask, use_cache=False)
    errors = relative_error(actual, expected)
    # The norm takes out the size of the rule's result, so that the gates' gradients are what is left of large terms.
    floors = {name: 5e-3 if name.endswith(("A_log", "dt_bias")) else 1e-3 for name in errors if "linear_attn" in name}
    assert not {name: errors[name] for name, floor in floors.items() if errors[name] > floor}
    assert calls(inlay.report(model)) == [2] * 3  # each ran once more in the backward


@families
def test_autocast_training(family: str, device: str) -> None:
    """float32 weights under bfloat16 autocast: no further from float32 than the layer's own code is."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 40)

    def results(module: nn.Module, enabled: bool) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            y = module(x)
            return [y, *torch.autograd.grad(y.float().square().sum(), list(module.parameters()))]

    exact, eager = results(deepcopy(layer).float(), False), results(layer, True)
    inlay.patch(layer, strict=True, ops=["gdn_layer"])
    patched = results(layer, True)
    assert patched[0].dtype == eager[0].dtype
    factor = 2 if device == "cpu" else 3  # there the rule's products are of bfloat16 values, which eager code's are not
    for ours, theirs, truth in zip(patched, eager, exact, strict=True):
        error, eager_error = (ours.float() - truth).norm(), (theirs.float() - truth).norm()
        assert error <= factor * eager_error + 1e-2 * truth.norm()


@families
def test_the_norm_is_a_module_of_its_own(family: str, device: str) -> None:
    """It runs its own patch, or its own code; and its hooks see it."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 1, 8)
    expected, seen = layer(x), []
    layer.norm.register_forward_hook(lambda *_: seen.append(1))
    inlay.patch(layer, ops=["gdn_layer"], strict=True)
    assert_same_values(layer(x), expected, "with the norm's own code")
    assert [entry.reason for entry in inlay.report(layer).unpatched] == ["not patched (op gated_rms_norm)"]
    inlay.patch(layer, strict=True)
    assert_same_values(layer(x), expected, "with a patched norm")
    assert {entry.op: entry.calls for entry in inlay.report(layer).patched} == {"gdn_layer": 2, "gated_rms_norm": 1}
    assert len(seen) == 2


@families
def test_unpatching_restores_every_bit(family: str, device: str, dtype: torch.dtype) -> None:
    layer = gdn_layer(family, device, dtype)
    x = hidden(layer, 2, 20)
    expected = layer(x)
    inlay.patch(layer, strict=True)
    layer(x)
    inlay.unpatch(layer)
    assert "forward" not in vars(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.cuda
@families
@torch.no_grad()
def test_decoding_in_a_cuda_graph(family: str) -> None:
    """The cache keeps its addresses, and nothing waits for the device."""
    layer = gdn_layer(family, "cuda", torch.bfloat16)
    x = hidden(layer, 2, 12)
    inlay.patch(layer, strict=True)
    eager, cache = new_cache(), new_cache()
    expected = [layer(piece, cache_params=eager) for piece in (x[:, :8], *x[:, 8:].split(1, 1))][1:]
    layer(x[:, :8], cache_params=cache)
    before = [state.clone() for state in (cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0])]
    token = x[:, 8:9].clone()
    layer(token, cache_params=cache)  # a warm-up, undone before the replays
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(token, cache_params=cache)
    for state, value in zip((cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]), before, strict=True):
        state.copy_(value)
    for index, want in enumerate(expected):
        token.copy_(x[:, 8 + index : 9 + index])
        graph.replay()
        assert torch.equal(y, want)
