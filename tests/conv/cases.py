"""Every way to call causal_conv1d: which tensors, in which dtypes and order in memory, with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay import reference
from tests.support.compare import assert_within_budget
from tests.support.devices import short_name

Tensors = dict[str, Tensor]
CHANNELS_INNERMOST, TOKENS_INNERMOST = "channels", "tokens"
LAYOUTS = (CHANNELS_INNERMOST, TOKENS_INNERMOST)
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Optional tensors that are given and options that are set; ``parameters`` None: weight and bias in x's dtype."""

    width: int = 4
    activation: str | None = "silu"
    bias: bool = False
    initial_state: bool = False
    final_state: bool = False
    layout: str = CHANNELS_INNERMOST
    parameters: torch.dtype | None = None

    def __str__(self) -> str:
        flags = [name for name in ("bias", "initial_state", "final_state") if getattr(self, name)]
        dtype = [f"weight_{short_name(self.parameters)}"] if self.parameters else []
        return "-".join([f"w{self.width}", str(self.activation), self.layout, *flags, *dtype])

    def inputs(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, lengths: Sequence[int] | None = None
    ) -> Tensors:
        """Random tensors; ``lengths`` packs sequences into the only batch row. Float64 x takes float64 everywhere."""
        batch, _, channels = shape
        parameters = dtype if self.parameters is None or dtype == torch.float64 else self.parameters
        count = batch if lengths is None else len(lengths)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device)

        tensors = {
            "x": in_order(normal(*shape).to(dtype), self.layout),
            "weight": (normal(channels, self.width) / self.width**0.5).to(parameters),
        }
        if self.bias:
            tensors["bias"] = normal(channels).to(parameters)
        if self.initial_state:
            tensors["initial_state"] = normal(count, channels, self.width - 1).to(dtype)
        if lengths is not None:
            tensors["cu_seqlens"] = boundaries(lengths, device)
        return tensors

    def run(self, namespace: ModuleType, tensors: Tensors) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"activation": self.activation, "return_final_state": self.final_state}
        outputs = namespace.causal_conv1d(**tensors, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)


CASES = [
    Case(),
    Case(activation=None),
    Case(bias=True),
    Case(width=2, bias=True),
    Case(width=3, initial_state=True),
    Case(width=3, layout=TOKENS_INNERMOST, bias=True, activation=None, final_state=True),
    Case(width=5, initial_state=True, final_state=True),
    Case(width=7, layout=TOKENS_INNERMOST, initial_state=True, final_state=True),
    Case(width=8, bias=True, initial_state=True, final_state=True),
    Case(initial_state=True, final_state=True, bias=True),
    Case(layout=TOKENS_INNERMOST),
    Case(width=2, layout=TOKENS_INNERMOST, initial_state=True),
    Case(layout=TOKENS_INNERMOST, bias=True, initial_state=True, final_state=True),
    Case(parameters=F32, bias=True),
    Case(parameters=BF16, bias=True, layout=TOKENS_INNERMOST),
]
# One of each kernel, for tests over many shapes or layouts.
BASIC = [
    Case(bias=True, initial_state=True, final_state=True),
    Case(bias=True, initial_state=True, final_state=True, layout=TOKENS_INNERMOST),
    Case(width=3, activation=None),
    Case(width=6, layout=TOKENS_INNERMOST),
]

# Around vectors, tiles and blocks of the kernels.
TIMES = [1, 2, 3, 7, 8, 63, 64, 65, 127, 300, 513, 1200]
CHANNELS = [1, 7, 8, 40, 129, 512, 520, 1030]
LENGTHS = [0, 1, 2, 64, 3, 0, 0, 90, 4, 200, 0]


def boundaries(lengths: Sequence[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def in_order(x: Tensor, layout: str) -> Tensor:
    """The values of [B, T, C], dense, with channels or tokens innermost in memory."""
    return x.contiguous() if layout == CHANNELS_INNERMOST else x.transpose(1, 2).contiguous().transpose(1, 2)


def gradients(case: Case, namespace: ModuleType, tensors: Tensors, douts: tuple[Tensor | None, ...]) -> Tensors:
    """Gradients of every floating tensor given those of the outputs."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    outputs = case.run(namespace, leaves)
    wanted = [(output, dout) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    torch.autograd.backward(*zip(*wanted, strict=True))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.is_floating_point()}


def wide(tensors: Tensors) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def check_values(case: Case, tensors: Tensors) -> None:
    with torch.no_grad():
        actual, eager = case.run(inlay, tensors), case.run(reference, tensors)
        exact = case.run(reference, wide(tensors))
    # The preactivation is a sum whose terms may cancel.
    terms = largest(tensors["x"]) * largest(tensors["weight"]) * case.width
    for name, results in zip(("y", "final_state"), zip(actual, eager, exact, strict=True), strict=False):
        assert_within_budget(*results, f"{case} {name}", terms)


def check_gradients(case: Case, tensors: Tensors, douts: tuple[Tensor | None, ...]) -> None:
    actual, eager = gradients(case, inlay, tensors, douts), gradients(case, reference, tensors, douts)
    wide_douts = tuple(None if dout is None else dout.double() for dout in douts)
    exact = gradients(case, reference, wide(tensors), wide_douts)
    upstream = max((largest(dout) for dout in douts if dout is not None), default=0.0)
    for name, gradient in actual.items():
        if gradient is None:
            assert eager[name] is None, name
            continue
        # Sums over few values of x, or, for the parameters, over all tokens.
        summed = (tensors["x"].shape[0] * tensors["x"].shape[1]) ** 0.5 if name in ("weight", "bias") else case.width
        assert_within_budget(gradient, eager[name], exact[name], f"{case} d{name}", 3 * upstream * summed)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
