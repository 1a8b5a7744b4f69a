"""Does decoding give the bits of the whole sequence, and leave the right state behind?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.conv.cases import CHANNELS, Case, wide
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import each_dtype


def zero_state(tensors: dict[str, torch.Tensor], columns: int) -> torch.Tensor:
    x = tensors["x"]
    return x.new_zeros(x.shape[0], x.shape[2], columns)


def step_options(tensors: dict[str, torch.Tensor], case: Case) -> dict:
    return {"weight": tensors["weight"], "bias": tensors.get("bias"), "activation": case.activation}


@each_dtype()
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("extra_columns", [0, 1, 5])
@pytest.mark.parametrize("case", [Case(), Case(width=2, bias=True), Case(width=7, activation=None, bias=True)], ids=str)
def test_steps_equal_the_whole(case, extra_columns, tokens, device, dtype):
    tensors = case.inputs((3, 48, 40), dtype, device)
    y = case.run(inlay, tensors)[0]
    state = zero_state(tensors, case.width - 1 + extra_columns)
    for begin in range(0, 48, tokens):
        x = tensors["x"][:, begin : begin + tokens]
        part = inlay.causal_conv1d_step(x, state, **step_options(tensors, case))
        assert_same_bits(part, y[:, begin : begin + tokens], f"tokens from {begin}")
    assert_same_bits(state, tensors["x"].transpose(1, 2)[..., 48 - state.shape[-1] :], "state")


@pytest.mark.parametrize("channels", CHANNELS)
def test_prefill_then_decode(channels, device):
    case = Case(bias=True, final_state=True)
    tensors = case.inputs((2, 30, channels), torch.bfloat16, device)
    y, _ = case.run(inlay, tensors)
    part, state = case.run(inlay, {**tensors, "x": tensors["x"][:, :25]})
    assert_same_bits(part, y[:, :25], "prefill")
    for t in range(25, 30):
        step = inlay.causal_conv1d_step(tensors["x"][:, t], state, **step_options(tensors, case))
        assert_same_bits(step, y[:, t], f"token {t}")


@each_dtype()
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["weight_x", "weight_f32"])
def test_accuracy(parameters, device, dtype):
    case = Case(bias=True, parameters=parameters)
    tensors = case.inputs((3, 5, 130), dtype, device)
    state = torch.randn(3, 130, 4, device=device).to(dtype)
    options = step_options(tensors, case)
    states = {"inlay": state.clone(), "eager": state.clone(), "exact": state.double()}
    actual = inlay.causal_conv1d_step(tensors["x"], states["inlay"], **options)
    eager = reference.causal_conv1d_step(tensors["x"], states["eager"], **options)
    exact = wide(tensors)
    wanted = reference.causal_conv1d_step(exact["x"], states["exact"], **step_options(exact, case))
    assert_within_budget(actual, eager, wanted, "y", terms=10.0)
    assert_same_bits(states["inlay"], states["eager"], "state")


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_four_columns(width, batch, device):
    """As Hugging Face keeps them; what no weight meets has no say, but moves on."""
    case = Case(width=width, bias=True)
    tensors = case.inputs((batch, 2, 40), torch.bfloat16, device)
    state = torch.randn(batch, 40, 4, device=device).bfloat16()
    state[..., : 4 - (width - 1)] = torch.nan
    apart = state.transpose(1, 2).contiguous().transpose(1, 2)
    options = step_options(tensors, case)
    y = inlay.causal_conv1d_step(tensors["x"], state, **options)
    assert not y.isnan().any()
    assert_same_bits(y, inlay.causal_conv1d_step(tensors["x"], apart, **options), "y")
    assert_same_bits(state, apart, "state")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_slots(tokens, dtype, device):
    """Rows find their slots, padding rows give zeros, and the other slots stay as they were."""
    case = Case(bias=True)
    tensors = case.inputs((4, tokens, 40), torch.bfloat16, device)
    state = torch.randn(6, 40, 4, device=device).bfloat16()
    expected_state = state.clone()
    indices = torch.tensor([5, -1, 0, 6], device=device, dtype=dtype)
    options = step_options(tensors, case)
    y = inlay.causal_conv1d_step(tensors["x"], state, **options, state_indices=indices)
    for row, slot in ((0, 5), (2, 0)):
        own = expected_state[slot : slot + 1]
        expected = inlay.causal_conv1d_step(tensors["x"][row : row + 1], own, **options)
        assert_same_bits(y[row : row + 1], expected, f"row {row}")
    assert not y[[1, 3]].any()
    assert_same_bits(state, expected_state, "state")


@pytest.mark.parametrize("order", ["channels", "columns", "slice"])
def test_strided_tensors_are_updated_in_place(order, device):
    case = Case()
    tensors = case.inputs((3, 2, 24), torch.bfloat16, device)
    expected_state = torch.randn(3, 24, 5, device=device).bfloat16()
    state = {
        "channels": lambda s: s.transpose(1, 2).contiguous().transpose(1, 2),
        "columns": lambda s: s.clone(),
        "slice": lambda s: torch.cat([s, s], -1)[..., 5:],
    }[order](expected_state)
    x = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    options = step_options(tensors, case)
    expected = inlay.causal_conv1d_step(tensors["x"], expected_state, **options)
    y = inlay.causal_conv1d_step(x, state, **options)
    assert y.is_contiguous()
    assert_same_bits(y, expected, "y")
    assert_same_bits(state, expected_state, "state")


def test_a_token_without_a_time_dimension(device):
    case = Case()
    tensors = case.inputs((3, 1, 24), torch.float32, device)
    states = torch.randn(2, 1, 24, 4, device=device).expand(2, 3, 24, 4).clone()
    states[1] = states[0]
    options = step_options(tensors, case)
    flat = inlay.causal_conv1d_step(tensors["x"][:, 0], states[0], **options)
    assert flat.shape == (3, 24)
    assert_same_bits(flat, inlay.causal_conv1d_step(tensors["x"], states[1], **options)[:, 0], "y")
    assert_same_bits(states[0], states[1], "state")


@pytest.mark.parametrize("shape", [(0, 1, 8), (2, 0, 8), (2, 1, 0)], ids=str)
def test_nothing_to_do_leaves_the_state_alone(shape, device):
    case = Case()
    tensors = case.inputs(shape, torch.float32, device)
    state = torch.randn(shape[0], shape[2], 4, device=device)
    before = state.clone()
    assert inlay.causal_conv1d_step(tensors["x"], state, tensors["weight"]).shape == shape
    assert_same_bits(state, before, "state")


@pytest.mark.parametrize("name", ["x", "state", "weight", "bias"])
def test_gradients_are_refused(name, device):
    case = Case(bias=True)
    tensors = {**case.inputs((2, 1, 8), torch.float32, device), "state": torch.randn(2, 8, 4, device=device)}
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^causal_conv1d_step: x, state, weight and bias must not require"):
        inlay.causal_conv1d_step(**tensors)
    with torch.no_grad():
        assert not inlay.causal_conv1d_step(**tensors).requires_grad


def test_autograd_notices_that_a_saved_state_was_changed(device):
    """The state's version goes up, as for any in-place operation."""
    x, weight = torch.randn(1, 3, 8, device=device), torch.randn(8, 4, device=device)
    state = torch.randn(1, 8, 3, device=device)
    y = inlay.causal_conv1d(x.requires_grad_(), weight, initial_state=state)
    with torch.no_grad():
        inlay.causal_conv1d_step(x[:, 0], state, weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
