"""The residual add fused with its norm by rewriting a layer's own source."""

from __future__ import annotations

import inspect
import linecache
import traceback
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from tests.hf.compare import assert_same_values


class Norm(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).type_as(x)


def doubled(function: Any) -> Any:
    @wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * function(self, *args, **kwargs)

    return wrapper


def opaque(function: Any) -> Any:
    holder = SimpleNamespace(function=function)

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return holder.function(*args, **kwargs)

    return wrapper


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Norm(), Norm()
        self.attention, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)


class Plain(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.attention(self.first(hidden_states))
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.second(hidden_states)
        return residual + self.mlp(hidden_states)


class OtherOrderOtherNames(Layer):
    def forward(this, x: Tensor, scale: float = 0.5, *, shift: float = 0.25) -> Tensor:
        total = this.attention(this.first(x)) * scale + x
        normed = this.second(total)
        return total + this.mlp(normed) + shift


class TwiceAndNested(Layer):
    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if again:
            for _ in range(2):
                x = x + self.attention(x)
                y = self.first(x)
        x = x + y
        r = x
        x = self.second(x)
        return r + x


class Decorated(Layer):
    @doubled
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + y


class Inherited(Decorated):
    """super(), a private name and a global: all resolve in the rewritten function as in the original."""

    __factor = 3

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(x)
        y = self.second(x)
        return y * self.__factor + torch.zeros_like(x)


def _closure(factor: float) -> type[nn.Module]:
    class InClosure(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = x + factor * x
            y = self.second(h)
            return h - y

    return InClosure


FUSED = [Plain, OtherOrderOtherNames, TwiceAndNested, Decorated, Inherited, _closure(0.5), _closure(0.75)]


@pytest.mark.parametrize("cls", FUSED, ids=lambda cls: cls.__name__)
def test_computes_the_same(cls: type[nn.Module], device: str, dtype: torch.dtype) -> None:
    layer = cls().to(device, dtype)
    x = torch.randn(2, 5, 32, device=device, dtype=dtype, requires_grad=True)
    expected = layer(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, torch.ones_like(expected))
    inlay.patch(layer, strict=True)
    actual = layer(x)
    assert_same_values(actual, expected, cls.__name__)
    (gradient,) = torch.autograd.grad(actual, x, torch.ones_like(expected))
    assert_same_values(gradient, expected_gradient, "gradient")
    calls = {entry.op: entry.calls for entry in inlay.report(layer).patched if entry.path == ""}
    assert calls == {"add_rms_norm": 3 if cls is TwiceAndNested else 1}


def test_keyword_defaults_and_signature_stay() -> None:
    layer = OtherOrderOtherNames()
    x = torch.randn(2, 32)
    expected, signature = layer(x, 0.1, shift=2.0), inspect.signature(layer.forward)
    inlay.patch(layer, strict=True)
    assert_same_values(layer(x, 0.1, shift=2.0), expected, "sum")
    assert inspect.signature(layer.forward) == signature


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(x)
        y = self.second(x)
        return x + y


class SomethingBetween(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        x = x.clamp(-1, 1)
        y = self.second(x)
        x = y + x
        return x


class NoAdd(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x)))


class OpaqueDecorator(Layer):
    @opaque
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + y


def _without_source() -> type[nn.Module]:
    namespace: dict[str, Any] = {}
    exec("def forward(self, x):\n    x = x + self.first(x)\n    y = self.second(x)\n    return x + y\n", namespace)
    return type("WithoutSource", (Layer,), {"forward": namespace["forward"]})


def _with_other_source() -> type[nn.Module]:
    """As after an edit of the file of a class that is in use."""
    namespace: dict[str, Any] = {}
    running = "def forward(self, x):\n    x = x + self.first(x)\n    y = self.second(x)\n    return x + y\n"
    exec(compile(running, "<edited>", "exec"), namespace)
    edited = running.replace("self.first(x)", "self.mlp(x)").splitlines(keepends=True)
    linecache.cache["<edited>"] = (0, None, edited, "<edited>")
    namespace["forward"].__module__ = __name__
    return type("OtherSource", (Layer,), {"forward": namespace["forward"]})


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (InPlace, None),
        (NoAdd, None),
        (SomethingBetween, "no residual add of its forward is directly followed by an RMSNorm"),
        (OpaqueDecorator, "a decorator that cannot be put around another function"),
        (_without_source(), "source of its forward cannot be read"),
        (_with_other_source(), "source of its forward is not the code that runs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_leaves_other_layers_alone(cls: type[nn.Module], reason: str | None) -> None:
    layer = cls()
    x = torch.randn(2, 32)
    expected = layer(x.clone())
    report = inlay.patch(layer)
    own = [entry for entry in report.entries if entry.path == ""]
    assert len(own) == (reason is not None)
    assert all(reason in entry.reason for entry in own)
    assert "forward" not in vars(layer)
    assert_same_values(layer(x.clone()), expected, "layer")


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_norm_with_hooks_is_called_as_a_module(kind: str) -> None:
    layer = Plain()
    x = torch.randn(2, 32)
    expected = layer(x)
    inlay.patch(layer)
    calls = []
    handle = getattr(layer.second, f"register_{kind}")(lambda *arguments: calls.append(arguments) or None)
    actual = layer(x)
    actual.sum().backward()
    assert len(calls) == 1
    assert_same_values(actual, expected, "layer")
    assert inlay.report(layer).fallbacks == {"second: it has hooks": 1}
    handle.remove()
    layer(x)
    assert inlay.report(layer).fallbacks == {"second: it has hooks": 1}


def test_replaced_norm_is_called() -> None:
    layer = Plain()
    inlay.patch(layer)
    layer.second = nn.Identity()
    reference = Plain()
    reference.load_state_dict(layer.state_dict(), strict=False)
    reference.second = nn.Identity()
    x = torch.randn(2, 32)
    assert_same_values(layer(x), reference(x), "layer")
    assert inlay.report(layer).fallbacks == {"second: it is a Identity now": 1}


@pytest.mark.parametrize(
    ("residual", "reason"),
    [
        (torch.zeros(1, 32), "differ in dtype, shape or device"),
        (torch.zeros(4, 32, dtype=torch.float64), "differ in dtype, shape or device"),
        (torch.zeros(32, 4).t(), "not contiguous"),
        (1.5, "adds a float and a Tensor"),
    ],
    ids=["broadcast", "promoted", "strided", "scalar"],
)
def test_sums_no_op_computes(residual: Any, reason: str) -> None:
    class Sum(Layer):
        def forward(self, a: Any, b: Tensor) -> tuple[Tensor, Tensor]:
            h = a + b
            y = self.second(h)
            return h, y

    layer = Sum()
    x = torch.randn(4, 32)
    expected = layer(residual, x)
    inlay.patch(layer)
    for actual, want in zip(layer(residual, x), expected, strict=True):
        assert_same_values(actual, want, "sum and norm")
    assert any(reason in key for key in inlay.report(layer).fallbacks)


def test_class_derived_after_patching_keeps_its_forward() -> None:
    """FSDP2 swaps a layer's class for a derived one; transformers then wraps its forward once more."""
    layer = Plain()
    x = torch.randn(2, 32)
    inlay.patch(layer)
    expected = layer(x)
    layer.__class__ = type("FSDPPlain", (Plain,), {"forward": doubled(Plain.forward)})
    assert_same_values(layer(x), 2 * expected, "layer")
    assert {entry.calls for entry in inlay.report(layer).patched if entry.op == "add_rms_norm"} == {2}
    layer.__class__ = type("Unreadable", (Plain,), {"forward": opaque(Plain.forward)})
    assert_same_values(layer(x), expected, "layer")
    inlay.unpatch(layer)
    assert "forward" not in vars(layer)


def test_source_and_tracebacks_show_the_rewritten_code() -> None:
    class Failing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            y = self.second(x)
            raise RuntimeError(str(y.shape))

    layer = Failing()
    inlay.patch(layer)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(2, 32))
    text = "".join(traceback.format_exception(caught.value))
    assert "raise RuntimeError(str(y.shape))" in text
    frame = caught.traceback[-1].frame.code.raw
    assert "_inlay_add_norm(self, 'second', x, self.attention(x))" in inspect.getsource(frame)
