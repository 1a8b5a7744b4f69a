"""Decoding in patched Gated DeltaNet layers: one op a layer where it gives what the layer gives, else its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.hf import gdn_layer as computation
from tests.hf.compare import assert_same_values
from tests.hf.models import language_model, tokens
from tests.hf.test_gdn_layer import assert_close, families, gdn_layer, hidden, new_cache

transformers = pytest.importorskip("transformers")
STEPS = ("gdn_layer_step", "gated_delta_step")
Spy = list[str]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Which of the ops for decoding have run."""
    seen: Spy = []

    def spied(name: str) -> Callable[..., Tensor]:
        op = getattr(computation, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return op(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(computation, name, spied(name))
    return seen


def patch(module: nn.Module, ops: Spy, only: list[str] | None = None, strict: bool = True) -> None:
    inlay.patch(module, only, strict)
    ops.clear()  # of the experiment by which a layer is recognised


def decoded(layer: nn.Module, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The output of pieces that go on with a cache, and both states, which keep their addresses."""
    cache, outputs, addresses = new_cache(), [], set()
    for piece in x.split(sizes, dim=1):
        outputs.append(layer(piece, cache_params=cache))
        states = cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
        addresses.add(tuple(state.data_ptr() for state in states))
    assert len(addresses) == 1, "the cache's tensors moved"
    return torch.cat(outputs, 1), *states


def assert_decodes_the_same(layer: nn.Module, dtype: torch.dtype, expected: tuple[Tensor, ...], x: Tensor) -> None:
    actual = decoded(layer, x, SIZES)
    for ours, theirs, what in zip(actual, expected, ("output", "conv state", "recurrent state"), strict=True):
        assert_close(ours, theirs, what, dtype)


SIZES = [5, 1, 1, 2, 16, 17, 1]
IN_STEPS = sum(size <= 16 for size in SIZES[1:])


@families
@pytest.mark.parametrize("heads", [2, 4], ids=["shared keys", "a key head a value head"])
@torch.no_grad()
def test_few_tokens_are_one_op(family: str, heads: int, device: str, dtype: torch.dtype, ops: Spy) -> None:
    layer = gdn_layer(family, device, dtype, linear_num_key_heads=heads)
    x = hidden(layer, 2, sum(SIZES))
    expected = decoded(layer, x, SIZES)
    patch(layer, ops)
    assert_decodes_the_same(layer, dtype, expected, x)
    assert ops == ["gdn_layer_step"] * IN_STEPS
    # As after a fused residual add, the norm's entry counts the calls of its module, and none for those within the op.
    counted = {entry.op: entry.calls for entry in inlay.report(layer).patched}
    assert counted == {"gdn_layer": len(SIZES), "gated_rms_norm": len(SIZES) - IN_STEPS}


@families
@torch.no_grad()
def test_the_norm_need_not_be_patched(family: str, device: str, ops: Spy) -> None:
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, sum(SIZES))
    expected = decoded(layer, x, SIZES)
    patch(layer, ops, only=["gdn_layer"])
    assert_decodes_the_same(layer, torch.float32, expected, x)
    assert set(ops) == {"gdn_layer_step"}


@families
@torch.no_grad()
def test_float32_norm_weights(family: str, device: str, ops: Spy) -> None:
    layer = gdn_layer(family, device, torch.bfloat16)
    layer.norm.float()
    x = hidden(layer, 2, sum(SIZES))
    expected = decoded(layer, x, SIZES)
    patch(layer, ops)
    assert_decodes_the_same(layer, torch.bfloat16, expected, x)
    assert set(ops) == {"gdn_layer_step"}


@contextmanager
def _hook(layer: nn.Module, seen: list[Any]) -> Iterator[None]:
    with layer.norm.register_forward_hook(lambda *_: seen.append(1)):
        yield


@contextmanager
def _pre_hook(layer: nn.Module, seen: list[Any]) -> Iterator[None]:
    with layer.norm.register_forward_pre_hook(lambda *_: seen.append(1)):
        yield


@contextmanager
def _global_hook(layer: nn.Module, seen: list[Any]) -> Iterator[None]:
    def hook(module: nn.Module, *_: Any) -> None:
        if module is layer.norm:
            seen.append(1)

    with nn.modules.module.register_module_forward_hook(hook):
        yield


@contextmanager
def _wrapped(layer: nn.Module, seen: list[Any]) -> Iterator[None]:
    own = layer.norm.forward

    def forward(*args: Any) -> Tensor:
        seen.append(1)
        return own(*args)

    layer.norm.forward = forward
    yield
    layer.norm.forward = own


@contextmanager
def _replaced(layer: nn.Module, seen: list[Any]) -> Iterator[None]:
    own = layer.norm

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = own

        def forward(self, *args: Any) -> Tensor:
            seen.append(1)
            return self.inner(*args)

    layer.norm = Wrapper()
    yield
    layer.norm = own


@pytest.mark.parametrize("watched", [_hook, _pre_hook, _global_hook, _wrapped, _replaced])
@families
@torch.no_grad()
def test_a_norm_that_is_watched_is_called(family: str, watched: Any, device: str, ops: Spy) -> None:
    """Each time; and no longer once nothing watches it."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, sum(SIZES))
    expected, seen = decoded(layer, x, SIZES), []
    patch(layer, ops)
    with watched(layer, seen):
        assert_decodes_the_same(layer, torch.float32, expected, x)
    assert len(seen) == len(SIZES)
    assert ops == ["gated_delta_step"] * IN_STEPS
    ops.clear()
    assert_decodes_the_same(layer, torch.float32, expected, x)
    assert set(ops) == {"gdn_layer_step"}


class _Norm(nn.Module):
    """A gated RMSNorm of another kind."""

    def __init__(self, gate: Callable[[Tensor], Tensor], eps: float | None, bias: bool):
        super().__init__()
        self.gate, self.eps = gate, eps
        self.weight = nn.Parameter(torch.rand(16))
        self.bias = nn.Parameter(torch.rand(16)) if bias else None

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        y = F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.eps)
        return (y if self.bias is None else y + self.bias) * self.gate(gate)


@pytest.mark.parametrize(
    ("norm", "op"),
    [
        (lambda: _Norm(F.silu, 1e-2, False), "gdn_layer_step"),
        (lambda: _Norm(torch.sigmoid, 1e-2, False), "gated_delta_step"),
        (lambda: _Norm(F.silu, 1e-2, True), "gated_delta_step"),
        (lambda: _Norm(F.silu, None, False), "gated_delta_step"),
        (lambda: _Norm(torch.tanh, 1e-2, False), "gated_delta_step"),
    ],
    ids=["silu, another eps", "sigmoid", "bias", "no eps", "unknown"],
)
@torch.no_grad()
def test_other_norms(norm: Any, op: str, device: str, ops: Spy) -> None:
    layer = gdn_layer("qwen3_5", device)
    layer.norm = norm().to(device)
    x = hidden(layer, 2, sum(SIZES))
    expected = decoded(layer, x, SIZES)
    patch(layer, ops, strict=False)
    assert_decodes_the_same(layer, torch.float32, expected, x)
    assert ops == [op] * IN_STEPS


@families
def test_a_gradient_of_the_norm_alone(family: str, device: str, ops: Spy) -> None:
    layer = gdn_layer(family, device).requires_grad_(False)
    layer.norm.weight.requires_grad_()
    x = hidden(layer, 2, 6)
    patch(layer, ops)
    whole = layer(x)
    cache = new_cache()
    y = torch.cat([layer(piece, cache_params=cache) for piece in x.split([4, 1, 1], dim=1)], 1)
    assert_same_values(y, whole, "output")
    expected, actual = (torch.autograd.grad(out.square().sum(), layer.norm.weight)[0] for out in (whole, y))
    assert_same_values(actual, expected, "gradient")
    assert set(ops) == {"gated_delta_step"}


@families
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_greedy_tokens(family: str, kind: str, device: str, dtype: torch.dtype, ops: Spy) -> None:
    model = language_model(family, device, dtype)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": kind, "disable_compile": True}
    ids = tokens(model, length=7)
    expected = model.generate(ids, **options)
    # In 16 bits attention's op rounds elsewhere than sdpa, and a router may then choose other experts.
    patch(model, ops, only=["gdn_layer", "rms_norm", "gated_rms_norm", "add_rms_norm"])
    assert torch.equal(model.generate(ids, **options), expected)
    assert ops == ["gdn_layer_step"] * 11 * 3


@families
@torch.no_grad()
def test_compiled(family: str, device: str) -> None:
    """One graph, with one op for the layer's step; the states are the cache's own."""
    layer = gdn_layer(family, device)
    x = hidden(layer, 2, 9)
    expected = decoded(layer, x, [5, 1, 1, 1, 1])
    inlay.patch(layer, strict=True)
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if "inlay" in str(node.target))
        return graph

    torch.compiler.reset()
    cache = new_cache()
    outputs = [layer(x[:, :5], cache_params=cache)]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    outputs += [compiled(piece, cache_params=cache) for piece in x[:, 5:].split(1, dim=1)]
    actual = torch.cat(outputs, 1), cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]
    for ours, theirs, what in zip(actual, expected, ("output", "conv state", "recurrent state"), strict=True):
        assert_same_values(ours, theirs, what)
    assert ops == ["inlay.gdn_layer_step.default"]
