"""Do 16-bit results equal the eager code that a patched model ran before, bit for bit but for one value in a thousand?

The eager code is written here as transformers has it, and taken from there where it is installed.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import inlay
from tests.conv.cases import LAYOUTS, in_order
from tests.support.compare import assert_matches_eager, assert_same_bits
from tests.support.devices import each_dtype

# Units in the last place that a value may be off whose first rounding went the other way.
ONCE, TWICE = 1, 3


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``causal_conv1d_fn`` of transformers, for [B, T, C]."""
    inputs = x.transpose(1, 2).to(weight.dtype)
    width = weight.shape[-1]
    y = F.conv1d(inputs, weight.unsqueeze(1), bias, padding=width - 1, groups=x.shape[2])[..., : x.shape[1]]
    return (F.silu(y) if activation else y).to(x.dtype).transpose(1, 2)


def tensors(dtype: torch.dtype, parameters: torch.dtype, width: int, layout: str, device: str) -> dict[str, Tensor]:
    x = in_order(torch.randn(2, 200, 256, device=device).to(dtype), layout)
    weight = (torch.randn(256, width, device=device) / 2).to(parameters)
    return {"x": x, "weight": weight, "bias": torch.randn(256, device=device).to(parameters)}


@each_dtype(halves_only=True)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["weight_x", "weight_f32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 4])
def test_convolution_then_activation(width, activation, layout, parameters, dtype, device):
    given = tensors(dtype, parameters or dtype, width, layout, device)
    rounds_twice = activation is not None and parameters is None
    for bias in (None, given["bias"]) if device == "cpu" else (None,):  # cuDNN rounds before it adds a bias
        actual = inlay.causal_conv1d(given["x"], given["weight"], bias, activation=activation)
        expected = eager(given["x"], given["weight"], bias, activation)
        assert_matches_eager(actual, expected, "y", ulps=TWICE if rounds_twice else None)


@each_dtype(halves_only=True)
@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5"])
def test_transformers_functions(model, dtype, device):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    given = tensors(dtype, dtype, 4, LAYOUTS[0], device)
    x, weight = given["x"], given["weight"]
    expected = module.causal_conv1d_fn(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)
    assert_matches_eager(inlay.causal_conv1d(x, weight, activation="silu"), expected, "y", ulps=TWICE)

    state = x[:, -4:].transpose(1, 2).contiguous()  # a cache's columns
    own_state = state.clone()
    token = torch.randn(2, 1, 256, device=device).to(dtype)
    expected = module.causal_conv1d_update(token.transpose(1, 2), state, weight, None, "silu").transpose(1, 2)
    actual = inlay.causal_conv1d_step(token, own_state, weight, activation="silu")
    assert_matches_eager(actual, expected, "y of a step", share=0.99, ulps=TWICE)
    assert_same_bits(own_state, state, "state")
