"""Are forward results as accurate as eager code's, for every option, dtype and size?"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import inlay
from inlay import reference
from tests.rope.cases import BASIC, CASES, SHAPES, WIDTHS, Case, check_values
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype, poison_free_memory


@each_dtype()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, shape, device, dtype):
    check_values(case, case.inputs(shape, dtype, device))


@each_dtype()
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, device, dtype):
    check_values(case, case.inputs((2, 7, 3, 2, width), dtype, device))


@pytest.mark.parametrize("rotary", range(5))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [36, 64, 100, 128])
def test_rotary_shares(width, interleaved, rotary, device):
    for norm in (False, True):
        case = Case(norm=norm, rotary=rotary, interleaved=interleaved)
        check_values(case, case.inputs((2, 5, 3, 1, width), torch.bfloat16, device))


@pytest.mark.parametrize("heads", [(1, 1), (2, 16), (7, 1), (16, 2), (17, 5), (33, 8), (64, 8), (3, 0), (0, 3)])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_heads(case, heads, device):
    for width in (64, 256):
        check_values(case, case.inputs((2, 3, *heads, width), torch.bfloat16, device))


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 20),
    q_heads=st.integers(0, 9),
    k_heads=st.integers(0, 4),
    width=st.integers(1, 140),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape(batch, tokens, q_heads, k_heads, width, case, dtype, device):
    torch.manual_seed(0)  # for each example, so that a failure repeats
    check_values(case, case.inputs((batch, tokens, q_heads, k_heads, width), dtype, device))


@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (2, 5, 0, 0, 8), (2, 5, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_empty(case, shape, device):
    tensors = case.inputs(shape, torch.float32, device)
    for output, wanted in zip(case.run(inlay, tensors), case.run(reference, tensors), strict=True):
        assert_same_bits(output, wanted, str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_left_alone_and_outputs_are_dense(case, device):
    tensors = case.inputs((2, 6, 4, 2, 64), torch.bfloat16, device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for output in case.run(inlay, tensors):
        assert output.is_contiguous()
        assert output.dtype == torch.bfloat16
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], f"{name} after the call")


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_finite_values_go_where_eager_code_lets_them(case, bad, width, device):
    tensors = case.inputs((2, 4, 3, 2, width), torch.bfloat16, device)
    clean = case.run(inlay, tensors)
    for channel in (0, width // 4, width - 1):
        spoilt = {name: tensor.clone() for name, tensor in tensors.items()}
        spoilt["q"][1, 2, 1, channel] = bad
        q, k = case.run(inlay, spoilt)
        # To the channel and its partner, through the norm to the whole head.
        assert_same_bits(q.isfinite(), case.run(reference, spoilt)[0].isfinite(), "finite")
        assert not q[1, 2, 1].isfinite().all()
        q[1, 2, 1] = clean[0][1, 2, 1]
        assert_same_bits(q, clean[0], "other heads of q")
        assert_same_bits(k, clean[1], "k")


@pytest.mark.parametrize("width", [64, 100])
def test_a_bad_angle_spoils_its_token_alone(width, device):
    case = Case(norm=False)
    tensors = case.inputs((2, 4, 3, 2, width), torch.float32, device)
    clean = case.run(inlay, tensors)
    tensors["sin"][1, 2, 3] = torch.nan
    for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
        assert output[1, 2, :, 3].isnan().all()
        output[1, 2, :, 3] = expected[1, 2, :, 3]
        assert_same_bits(output, expected, "other values")


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e4, 1e18])
def test_magnitudes(magnitude, width, device):
    """Small heads that eps outweighs, large ones whose squares are near the limit."""
    case = Case(rounding="once")
    tensors = case.inputs((1, 3, 2, 1, width), torch.float32, device)
    tensors["q"] *= magnitude
    check_values(case, tensors)


def test_zero_heads_give_zeros(device):
    for width in (64, 100):
        tensors = Case().inputs((1, 3, 2, 1, width), torch.bfloat16, device)
        tensors["q"].zero_()
        assert not Case().run(inlay, tensors)[0].any()


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs((3, 11, 5, 2, 128), torch.float32, device)
    clean = case.run(inlay, tensors)
    for _ in range(5):
        poison_free_memory(device, (3 * 11 * 5 * 128 * 4, 3 * 11 * 2 * 128 * 4, 2**19))
        for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
            assert_same_bits(output, expected, str(case))


def test_rotary_dim_defaults_to_all_angles(device):
    tensors = Case(rotary=2).inputs((2, 5, 2, 1, 32), torch.float32, device)
    for output, expected in zip(inlay.qk_norm_rope(**tensors), Case(rotary=2).run(inlay, tensors), strict=True):
        assert_same_bits(output, expected, "rotary_dim")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [64, 100])
def test_partners_may_have_angles_of_their_own(interleaved, width, device):
    """As eager code has it: nothing assumes that the halves of cos and sin are equal."""
    case = Case(interleaved=interleaved)  # random for each channel
    check_values(case, case.inputs((2, 5, 2, 1, width), torch.float16, device))


def test_a_rotation_by_zero_changes_nothing(device):
    for width in (64, 100):
        q, k = (torch.randn(2, 5, heads, width, device=device).bfloat16() for heads in (3, 1))
        ones, zeros = torch.ones(5, width, device=device).bfloat16(), torch.zeros(5, width, device=device).bfloat16()
        for output, x in zip(inlay.qk_norm_rope(q, k, ones, zeros), (q, k), strict=True):
            assert_same_bits(output, x, "x")
