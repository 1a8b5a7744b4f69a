"""Are the raw ops registered as torch wants them, and does the function compile, export and stay in one graph?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from inlay.ops._rounding import Rounding
from tests.rope.cases import BASIC, BF16, CASES
from tests.support.registration import (
    check_compiled,
    check_exported,
    check_fake_form,
    check_inductor,
    check_op,
    needs_compiler,
)

ONCE, STEPWISE = Rounding


def _forward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of `qk_norm_rope`."""
    for case in CASES[:10]:
        for width in (32, 12):
            t = case.inputs((2, 5, 3, 2, width), BF16, device)
            weights = t.get("q_weight"), t.get("k_weight")
            yield (
                t["q"], t["k"], t["cos"], t["sin"], *weights, case.rotary_dim(width), 1e-6, case.weight_offset,
                ONCE if case.rounding == "once" else STEPWISE,
                ONCE if case.rotary_rounding == "once" else STEPWISE, case.interleaved,
            )  # fmt: skip
    yield t["q"][:, :0], t["k"][:, :0], t["cos"][:, :0], t["sin"][:, :0], None, None, 12, 1e-6, 0.0, ONCE, ONCE, False


def _backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for q, k, cos, sin, q_weight, k_weight, rotary, eps, offset, _, _, interleaved in _forward_cases(device):
        needs = q_weight is not None
        yield (
            torch.randn_like(q), torch.randn_like(k), q, k, cos, sin, q_weight, k_weight, rotary, eps, offset,
            interleaved, needs, needs,
        )  # fmt: skip
    t = CASES[0].inputs((2, 5, 3, 2, 32), BF16, device)
    douts = torch.randn_like(t["q"]), torch.randn_like(t["k"])
    yield *douts, *t.values(), 32, 1e-6, 0.0, False, False, True


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {"qk_norm_rope": _forward_cases, "qk_norm_rope_bwd": _backward_cases}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    check_op(op, OPCHECK_CASES[op](device))


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_compiles_in_one_graph_and_once_for_all_sizes(case, device):
    """Forward and backward of the traced graph, with a second and a third length."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**tensors):
        return case.run(inlay, tensors)

    for tokens in (10, 17, 31):
        tensors = case.inputs((3, tokens, 4, 2, 64), BF16, device)
        leaves = [name for name in tensors if name not in ("cos", "sin")]
        check_compiled(compiled, lambda **given: case.run(inlay, given), tensors, leaves, str(case))


@pytest.mark.usefixtures("fresh_dynamo")
@needs_compiler
def test_inductor(device):
    """Between operations that Inductor fuses itself, on slices of one projection."""

    def block(x, weight, cos, sin):
        q, k = (x * 2).unflatten(-1, (6, 32)).split([4, 2], dim=2)
        q, k = inlay.qk_norm_rope(q, k, cos, sin, weight, weight)
        return (torch.sin(q).sum(2) * k.sum(2)).square().mean()

    x, weight = torch.randn(2, 9, 6 * 32, device=device), torch.randn(32, device=device)
    angles = torch.randn(9, 32, device=device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    check_inductor(block, leaves, [angles.cos(), angles.sin()], rtol=1e-4, atol=1e-4)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_weight = torch.nn.Parameter(torch.randn(32))
        self.k_weight = torch.nn.Parameter(torch.randn(32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k = inlay.qk_norm_rope(q, k, cos, sin, self.q_weight, self.k_weight)
        return torch.cat([q, k], dim=2)


def test_export(device):
    tokens = torch.export.Dim("tokens", min=2)

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        angles = torch.randn(count, 32, device=device)
        q, k = (torch.randn(2, count, heads, 32, device=device) for heads in (4, 2))
        return q, k, angles.cos(), angles.sin()

    dynamic = ({1: tokens}, {1: tokens}, {0: tokens}, {0: tokens})
    check_exported(Block().to(device), "qk_norm_rope", inputs(9), inputs(30), dynamic)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_fake_tensors_have_the_real_form(case, device):
    tensors = case.inputs((2, 5, 4, 2, 32), BF16, device)
    tensors["q"] = torch.cat([tensors["q"], tensors["q"]], dim=3)[..., :32]
    check_fake_form(lambda given: case.run(inlay, given), tensors)
