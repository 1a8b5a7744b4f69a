"""Do the functions of the causal-conv1d package give what that package's reference gives?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tests.support.compare import assert_same_bits


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, activation: str | None) -> Tensor:
    """Of one batch of sequences, [B, C, T]."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    y = F.conv1d(torch.cat([before, x], -1), weight.unsqueeze(1), bias, groups=x.shape[1])
    return y if activation is None else F.silu(y)


def tensors(device: str, time: int = 30) -> dict[str, Tensor]:
    shapes = {"x": (2, 24, time), "weight": (24, 4), "bias": (24,)}
    return {name: torch.randn(shape, device=device, requires_grad=True) for name, shape in shapes.items()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_fn(states, channels_last, activation, device):
    given = tensors(device)
    x = given["x"].transpose(1, 2).contiguous().transpose(1, 2) if channels_last else given["x"]
    before = torch.randn(2, 24, 3, device=device, requires_grad=True) if states else None
    expected = reference(x, given["weight"], given["bias"], before, activation)
    y = causal_conv1d_fn(x, given["weight"], given["bias"], initial_states=before, activation=activation)
    assert_close(y, expected)
    leaves = [*given.values(), *([before] if states else [])]
    dy = torch.randn_like(expected)
    for actual, wanted in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_close(actual, wanted)


def test_final_states(device):
    given = tensors(device)
    out = torch.empty(2, 3, 24, device=device).transpose(1, 2)
    with torch.no_grad():
        _, states = causal_conv1d_fn(given["x"], given["weight"], return_final_states=True)
        _, same = causal_conv1d_fn(given["x"], given["weight"], return_final_states=True, final_states_out=out)
    assert_same_bits(states, given["x"].detach()[..., -3:], "final states")
    assert same is out
    assert_same_bits(out, states, "final_states_out")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_seq_idx(dtype, channels_last, device):
    """Sequences of one row after another, the same numbers in both rows, a row that is one sequence with the next."""
    given = tensors(device, time=12)
    x = given["x"].transpose(1, 2).contiguous().transpose(1, 2) if channels_last else given["x"]
    seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 6, [2] * 10 + [0] * 2], device=device, dtype=dtype)
    y = causal_conv1d_fn(x, given["weight"], given["bias"], seq_idx=seq_idx, activation="silu")
    for row, lengths in enumerate([[5, 1, 6], [10, 2]]):
        parts = x[row : row + 1].split(lengths, dim=-1)
        expected = torch.cat([reference(part, given["weight"], given["bias"], None, "silu") for part in parts], -1)
        assert_close(y[row : row + 1], expected)


def test_seq_idx_of_nothing(device):
    given = tensors(device, time=0)
    seq_idx = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert causal_conv1d_fn(given["x"], given["weight"], seq_idx=seq_idx).shape == (2, 24, 0)


@pytest.mark.cuda
def test_seq_idx_does_not_wait_for_the_device():
    given = tensors("cuda")
    seq_idx = torch.zeros(2, 30, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv1d_fn(given["x"], given["weight"], seq_idx=seq_idx).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize("time", [None, 1, 3])
@torch.no_grad()
def test_update(time, activation, device):
    given = tensors(device, time=3)
    x = given["x"][..., :time] if time else given["x"][..., 0]
    state = torch.randn(2, 24, 5, device=device)
    old = state.clone()
    y = causal_conv1d_update(x, state, given["weight"], given["bias"], activation)
    new = x if time else x.unsqueeze(-1)
    expected = reference(new, given["weight"], given["bias"], old[..., -3:], activation)
    assert_close(y, expected if time else expected.squeeze(-1))
    assert_same_bits(state, torch.cat([old, new], -1)[..., -5:], "state")


@torch.no_grad()
def test_update_of_chosen_states(device):
    given = tensors(device, time=1)
    states = torch.randn(4, 24, 4, device=device)
    own = states[[3, 1]]
    indices = torch.tensor([3, 1], dtype=torch.int32, device=device)
    y = causal_conv1d_update(given["x"], states, given["weight"], conv_state_indices=indices)
    assert_same_bits(y, causal_conv1d_update(given["x"], own, given["weight"]), "y")
    assert_same_bits(states[[3, 1]], own, "states")


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (causal_conv1d_fn, {"activation": "relu"}, "activation must be None, 'silu' or 'swish', got 'relu'"),
        (causal_conv1d_fn, {"seq_idx": True, "initial_states": True}, "initial_states must be None with seq_idx"),
        (causal_conv1d_fn, {"seq_idx": True, "return_final_states": True}, "return_final_states must be False with"),
        (causal_conv1d_update, {"conv_state": True, "cache_seqlens": True}, "cache_seqlens must be None"),
        (
            causal_conv1d_update,
            {"conv_state": True, "activation": "gelu"},
            "activation must be None, 'silu' or 'swish'",
        ),
    ],
)
def test_what_is_missing_is_named(function, options, text):
    given = tensors("cpu")
    with pytest.raises(NotImplementedError, match=f"^{function.__name__}: {text}"):
        function(given["x"], weight=given["weight"], **options)


def test_seq_idx_of_another_shape():
    given = tensors("cpu")
    with pytest.raises(ValueError, match=r"^causal_conv1d_fn: seq_idx must have shape \[2, 30\], got \[2, 29\]"):
        causal_conv1d_fn(given["x"], given["weight"], seq_idx=torch.zeros(2, 29, dtype=torch.int32))
