"""Are forward results as accurate as eager code's, for every option, dtype, width and number of rows?"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import inlay
from inlay import reference
from tests.norm.cases import BASIC, CASES, ROWS, WIDTHS, check_values
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import each_dtype, poison_free_memory


@each_dtype()
@pytest.mark.parametrize("shape", [(5, 3, 256), (7, 127)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    check_values(case, case.inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, dtype, device):
    check_values(case, case.inputs((3, width), dtype, device))


@pytest.mark.parametrize("width", [128, 1000])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_row_counts(case, rows, width, device):
    check_values(case, case.inputs((rows, width), torch.bfloat16, device))


@given(
    leading=st.lists(st.integers(0, 5), max_size=4),
    width=st.integers(1, 300),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(leading, width, case, dtype, device):
    torch.manual_seed(0)  # for each example, so that a failure repeats
    check_values(case, case.inputs((*leading, width), dtype, device))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_zero_width_is_empty(case, device):
    for output in case.run(inlay, case.inputs((3, 0), torch.float32, device)):
        assert output.shape == (3, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_contiguous_and_new(case, device):
    tensors = case.inputs((4, 6, 64), torch.bfloat16, device)
    tensors["x"] = tensors["x"].transpose(0, 1)
    tensors |= {name: tensors[name].transpose(0, 1) for name in ("residual", "gate") if name in tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for output in case.run(inlay, tensors):
        assert output.is_contiguous()
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], f"{name} after the call")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_non_finite_values_stay_in_their_row(case, bad, device):
    tensors = case.inputs((5, 200), torch.float32, device)
    clean = case.run(inlay, tensors)
    tensors["x"][2, 77] = bad
    check_values(case, tensors)
    others = [0, 1, 3, 4]
    for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
        assert output[2].isnan().any() or case.function == "add_rms_norm"
        assert_same_bits(output[others], expected[others], "other rows")


@each_dtype(halves_only=True)
@pytest.mark.parametrize("magnitude", [1e4, 6e4])
@pytest.mark.parametrize("case", [case for case in BASIC if case.function != "add_rms_norm"], ids=str)
def test_sums_of_squares_do_not_overflow_in_half_precision(case, magnitude, device, dtype):
    tensors = case.inputs((4, 1024), dtype, device)
    tensors["x"] = tensors["x"].sign() * magnitude
    check_values(case, tensors)
    assert all(output.isfinite().all() for output in case.run(inlay, tensors))


@pytest.mark.parametrize("magnitude", [1e-3, 1e-12])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_tiny_values(case, magnitude, device):
    tensors = case.inputs((4, 1024), torch.float32, device)
    tensors |= {name: tensors[name] * magnitude for name in ("x", "residual") if name in tensors}
    check_values(case, tensors)


def test_layer_norm_far_from_zero(device):
    """The variance must not be computed as E[x^2] - E[x]^2, which cancels."""
    x = 1000.0 + torch.randn(4, 1024, device=device)
    assert_within_budget(inlay.layer_norm(x), F.layer_norm(x, (1024,)), reference.layer_norm(x.double()), "y")


def test_zero_rows_normalise_to_zero(device):
    x = torch.zeros(3, 64, device=device)
    for function in (inlay.rms_norm, inlay.layer_norm, inlay.l2_norm):
        assert_same_bits(function(x), x, function.__name__)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs((33, 257), torch.float32, device)
    clean = case.run(inlay, tensors)
    for _ in range(5):
        poison_free_memory(device, (33 * 257 * 4, 33 * 4))
        for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
            assert_same_bits(output, expected, str(case))


def test_reference_agrees_with_torch():
    """The oracle itself, against PyTorch's own functions in float64."""
    x, weight, bias, gate = (torch.randn(*shape, dtype=torch.float64) for shape in [(6, 50), (50,), (50,), (6, 50)])
    rms = F.rms_norm(x, (50,), weight, eps=1e-6)
    torch.testing.assert_close(reference.rms_norm(x, weight, bias, eps=1e-6), rms + bias)
    torch.testing.assert_close(reference.rms_norm(x, weight - 1, eps=1e-6, weight_offset=1.0), rms)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), F.layer_norm(x, (50,), weight, bias))
    torch.testing.assert_close(reference.l2_norm(x, eps=0.0), F.normalize(x, dim=-1))
    torch.testing.assert_close(reference.gated_rms_norm(x, gate, weight, eps=1e-6), rms * F.silu(gate))
    torch.testing.assert_close(
        reference.gated_rms_norm(x, gate, weight, eps=1e-6, activation="sigmoid", norm_before_gate=False),
        F.rms_norm(x * gate.sigmoid(), (50,), weight, eps=1e-6),
    )
    torch.testing.assert_close(
        reference.add_rms_norm(x, gate, weight, eps=1e-6), (F.rms_norm(x + gate, (50,), weight, eps=1e-6), x + gate)
    )
