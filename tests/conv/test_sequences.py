"""Do packed sequences keep to themselves, and do states carry everything over? Bit for bit."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import inlay
from inlay import reference
from tests.conv.cases import BASIC, LAYOUTS, LENGTHS, Case, boundaries, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import each_dtype, random_like


def check_packed_equals_separate(
    case: Case, lengths: list[int], channels: int, dtype: torch.dtype, device: str
) -> None:
    tensors = case.inputs((1, sum(lengths), channels), dtype, device, lengths)
    outputs = case.run(inlay, tensors)
    douts = random_like(outputs)
    grads = gradients(case, inlay, tensors, douts)
    begin = 0
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        alone = {name: t for name, t in tensors.items() if name != "cu_seqlens"}
        alone["x"] = tensors["x"][:, begin : begin + length]
        if case.initial_state:
            alone["initial_state"] = tensors["initial_state"][one]
        y, *final_state = case.run(inlay, alone)
        assert_same_bits(outputs[0][:, begin : begin + length], y, f"y of sequence {index}")
        for state in final_state:
            assert_same_bits(outputs[1][one], state, f"final state of sequence {index}")
        own = (douts[0][:, begin : begin + length], *(dout[one] for dout in douts[1:]))
        expected = gradients(case, inlay, alone, own)
        assert_same_bits(grads["x"][:, begin : begin + length], expected["x"], f"dx of sequence {index}")
        if case.initial_state:
            assert_same_bits(grads["initial_state"][one], expected["initial_state"], f"dstate of sequence {index}")
        begin += length


@each_dtype()
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_packed_equals_separate(case, device, dtype):
    check_packed_equals_separate(case, LENGTHS, 40, dtype, device)


@pytest.mark.parametrize("channels", [8, 33, 520])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_packed_channels(case, channels, device):
    check_packed_equals_separate(case, [0, 5, 64, 1, 7], channels, torch.bfloat16, device)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    width=st.integers(2, 8),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_lengths(lengths, width, layout, device):
    torch.manual_seed(0)  # for each example, so that a failure repeats
    case = Case(width=width, layout=layout, bias=True, initial_state=True, final_state=True)
    check_packed_equals_separate(case, lengths, 16, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_boundaries_of_either_integer_type(case, dtype, device):
    tensors = case.inputs((1, sum(LENGTHS), 24), torch.bfloat16, device, LENGTHS)
    expected = case.run(inlay, tensors)
    tensors["cu_seqlens"] = boundaries(LENGTHS, device, dtype)
    for actual, wanted in zip(case.run(inlay, tensors), expected, strict=True):
        assert_same_bits(actual, wanted, "output")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_one_packed_sequence_is_an_ordinary_one(case, device):
    tensors = case.inputs((1, 130, 24), torch.bfloat16, device)
    expected = case.run(inlay, tensors)
    packed = {**tensors, "cu_seqlens": boundaries([130], device)}
    for actual, wanted in zip(case.run(inlay, packed), expected, strict=True):
        assert_same_bits(actual, wanted, "output")


@pytest.mark.cuda
@pytest.mark.parametrize("values", [[0, 50, 20], [0, 90, 9000], [-7, 3, 40], [40, 40, 40], [60, 20, 5], [0, 20, 30]])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_wrong_boundaries_read_nothing_out_of_bounds_on_cuda(case, values, device):
    """There they are not checked, for that would wait for the device; whatever comes out, it comes from the inputs."""
    if device != "cuda":
        pytest.skip("the CPU refuses them")
    tensors = case.inputs((1, 40, 24), torch.float32, device, [20, 20])
    tensors["cu_seqlens"] = torch.tensor(values, device=device)
    outputs = case.run(inlay, tensors)
    grads = gradients(case, inlay, tensors, random_like(outputs))
    for result in (*outputs, *grads.values()):
        assert result.isfinite().all()


@pytest.mark.parametrize("pieces", [[130], [1, 1, 1, 127], [64, 66], [3, 2, 60, 0, 65]])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_pieces_with_carried_state_equal_the_whole(case, pieces, device):
    case = Case(case.width, case.activation, case.bias, True, True, case.layout)
    tensors = case.inputs((2, sum(pieces), 40), torch.bfloat16, device)
    y, final_state = case.run(inlay, tensors)
    state, begin = tensors["initial_state"], 0
    for length in pieces:
        piece = {**tensors, "x": tensors["x"][:, begin : begin + length], "initial_state": state}
        part, state = case.run(inlay, piece)
        assert_same_bits(part, y[:, begin : begin + length], f"tokens from {begin}")
        begin += length
    assert_same_bits(state, final_state, "final state")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_carried_states_equal_those_of_the_whole(layout, device):
    case = Case(bias=True, initial_state=True, final_state=True, layout=layout)
    tensors = case.inputs((2, 40, 24), torch.float64 if device == "cpu" else torch.float32, device)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    whole = case.run(inlay, leaves)
    douts = random_like(whole)
    expected = torch.autograd.grad(whole, tuple(leaves.values()), douts)
    state, parts = leaves["initial_state"], []
    for x in leaves["x"].split([1, 2, 30, 7], dim=1):
        part, state = case.run(inlay, {**leaves, "x": x, "initial_state": state})
        parts.append(part)
    actual = torch.autograd.grad((torch.cat(parts, 1), state), tuple(leaves.values()), douts)
    for name, gradient, wanted in zip(leaves, actual, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_reference_packs_as_separate_calls():
    case = BASIC[0]
    tensors = case.inputs((1, sum(LENGTHS), 6), torch.float64, "cpu", LENGTHS)
    y, final_state = case.run(reference, tensors)
    begin = 0
    for index, length in enumerate(LENGTHS):
        alone = {name: t for name, t in tensors.items() if name != "cu_seqlens"}
        alone |= {"x": tensors["x"][:, begin : begin + length], "initial_state": tensors["initial_state"][index][None]}
        part, state = case.run(reference, alone)
        assert_same_bits(y[:, begin : begin + length], part, "y")
        assert_same_bits(final_state[index][None], state, "final state")
        begin += length
