"""Are forward results as accurate as eager code's, for every option, dtype and size?"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import inlay
from inlay import reference
from tests.conv.cases import BASIC, CASES, CHANNELS, LAYOUTS, TIMES, TOKENS_INNERMOST, Case, check_values, in_order
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype, poison_free_memory


@each_dtype()
@pytest.mark.parametrize("shape", [(2, 70, 64), (3, 33, 37)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    check_values(case, case.inputs(shape, dtype, device))


@each_dtype()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", range(2, 9))
def test_every_width(width, layout, device, dtype):
    case = Case(width=width, layout=layout, bias=True, initial_state=True, final_state=True)
    check_values(case, case.inputs((2, 136, 72), dtype, device))


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_times(case, time, device):
    check_values(case, case.inputs((2, time, 48), torch.bfloat16, device))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_channels(case, channels, device):
    check_values(case, case.inputs((2, 21, channels), torch.bfloat16, device))


@given(
    batch=st.integers(0, 3),
    time=st.integers(0, 40),
    channels=st.integers(1, 70),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(batch, time, channels, case, dtype, device):
    torch.manual_seed(0)  # for each example, so that a failure repeats
    check_values(case, case.inputs((batch, time, channels), dtype, device))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_empty(case, shape, device):
    tensors = case.inputs(shape, torch.float32, device)
    for output, wanted in zip(case.run(inlay, tensors), case.run(reference, tensors), strict=True):
        assert_same_bits(output, wanted, str(case))


def test_no_tokens_keep_the_state(device):
    case = BASIC[0]
    tensors = case.inputs((2, 0, 8), torch.bfloat16, device)
    _, final_state = case.run(inlay, tensors)
    assert_same_bits(final_state, tensors["initial_state"], "final state")


@pytest.mark.parametrize("time", [1, 2, 3, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("initial", [False, True])
def test_final_state_is_the_last_inputs(time, layout, initial, device):
    case = Case(layout=layout, initial_state=initial, final_state=True)
    tensors = case.inputs((2, time, 10), torch.bfloat16, device)
    before = tensors.get("initial_state", torch.zeros(2, 10, 3, dtype=torch.bfloat16, device=device))
    expected = torch.cat([before, tensors["x"].transpose(1, 2)], dim=-1)[..., -3:]
    assert_same_bits(case.run(inlay, tensors)[1], expected, "final state")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_left_alone_and_outputs_are_dense(case, device):
    tensors = case.inputs((2, 30, 24), torch.bfloat16, device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    y, *final_state = case.run(inlay, tensors)
    assert (y.transpose(1, 2) if case.layout == TOKENS_INNERMOST else y).is_contiguous()
    assert all(state.is_contiguous() for state in final_state)
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], f"{name} after the call")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_non_finite_values_stay_under_the_taps(case, bad, device):
    tensors = case.inputs((2, 40, 16), torch.float32, device)
    clean = case.run(inlay, tensors)[0]
    tensors["x"][1, 20, 5] = bad
    y = case.run(inlay, tensors)[0]
    assert not torch.isfinite(y[1, 20 : 20 + case.width, 5]).all()
    y[1, 20 : 20 + case.width, 5] = clean[1, 20 : 20 + case.width, 5]
    assert_same_bits(y, clean, "other values")


def test_silu_at_its_limits(device):
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 200.0, -200.0, 89.0, -89.0, -104.0, 0.0])
    x = z.to(device).view(1, -1, 1).expand(1, -1, 8).contiguous()
    weight = torch.tensor([0.0, 1.0], device=device).expand(8, 2).contiguous()
    for layout in LAYOUTS:
        y = inlay.causal_conv1d(in_order(x, layout)[:, :1], weight, activation="silu")
        assert y.isnan().all()
        finite = in_order(x[:, 3:], layout)
        actual = inlay.causal_conv1d(finite, weight, activation="silu")
        torch.testing.assert_close(actual, F.silu(finite), rtol=1e-6, atol=2e-36)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs((3, 33, 130), torch.float32, device)
    clean = case.run(inlay, tensors)
    for _ in range(5):
        poison_free_memory(device, (3 * 33 * 130 * 4, 3 * 130 * 3 * 4, 2**19))
        for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
            assert_same_bits(output, expected, str(case))


def test_conv1d_weights(device):
    """A Conv1d module's weight [C, 1, W] is taken as it is."""
    case = Case(bias=True)
    tensors = case.inputs((2, 20, 24), torch.float32, device)
    flat = case.run(inlay, tensors)[0]
    tensors["weight"] = tensors["weight"].unsqueeze(1)
    assert_same_bits(case.run(inlay, tensors)[0], flat, "y")


def test_reference_agrees_with_torch():
    """The oracle itself, against PyTorch's own functions in float64."""
    case = Case(bias=True, initial_state=True, final_state=True)
    tensors = case.inputs((2, 30, 6), torch.float64, "cpu")
    padded = torch.cat([tensors["initial_state"], tensors["x"].transpose(1, 2)], dim=-1)
    expected = F.silu(F.conv1d(padded, tensors["weight"].unsqueeze(1), tensors["bias"], groups=6)).transpose(1, 2)
    y, final_state = case.run(reference, tensors)
    torch.testing.assert_close(y, expected)
    assert_same_bits(final_state, padded[..., -3:], "final state")
