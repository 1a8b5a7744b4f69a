"""Packed sequences: does each give what it gives alone, bit for bit, forward and backward?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inlay
from tests.gdn.cases import (
    Case,
    Tensors,
    check_gradients,
    check_values,
    gradients,
    kernel_dtype,
)
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

LENGTHS = {
    "several": [5, 64, 130, 1, 63, 65],
    "empty ones at both ends and in the middle": [0, 70, 0, 0, 3, 0],
    "one": [100],
    "all empty": [0, 0],
    "many short": [1, 2, 3] * 20,
}
MODES = ["auto", "chunk", "recurrent"]


def packed(lengths: list[int], dtype: torch.dtype, device: str, **shape: int) -> tuple[Case, Tensors]:
    case = Case(tokens=sum(lengths), batch=1, **shape)
    tensors = case.inputs(dtype, device)
    state = torch.randn(len(lengths), *tensors["initial_state"].shape[1:], device=device)
    tensors["initial_state"] = state.to(tensors["initial_state"].dtype)
    tensors["cu_seqlens"] = offsets(lengths, device)
    return case, tensors


def offsets(lengths: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def separate(tensors: Tensors, lengths: list[int]) -> list[Tensors]:
    parts, begin = [], 0
    for index, length in enumerate(lengths):
        part = {name: tensors[name][:, begin : begin + length] for name in ("q", "k", "v", "g", "beta")}
        parts.append({**part, "initial_state": tensors["initial_state"][index : index + 1]})
        begin += length
    return parts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_separate(dtype, lengths, mode, device):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("eager code")
    case, tensors = packed(lengths, dtype, device, value_heads=4)
    o, final_state = case.run(inlay, tensors, mode=mode)
    douts = random_like((o, final_state))
    grads = gradients(case, inlay, tensors, douts, mode=mode)
    begin = 0
    for index, (length, part) in enumerate(zip(lengths, separate(tensors, lengths), strict=True)):
        rows = slice(begin, begin + length)
        alone_o, alone_state = case.run(inlay, part, mode=mode)
        assert_same_bits(o[:, rows], alone_o, f"o of sequence {index}")
        assert_same_bits(final_state[index : index + 1], alone_state, f"state of sequence {index}")
        alone = gradients(case, inlay, part, (douts[0][:, rows], douts[1][index : index + 1]), mode=mode)
        for name, grad in alone.items():
            of_packed = grads[name][index : index + 1] if name == "initial_state" else grads[name][:, rows]
            assert_same_bits(of_packed, grad, f"d{name} of sequence {index}")
        begin += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_accurate(dtype, device):
    case, tensors = packed(LENGTHS["several"], dtype, device)
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


def test_both_integer_types(device):
    case, tensors = packed(LENGTHS["several"], kernel_dtype(device), device)
    expected = case.run(inlay, tensors)
    tensors["cu_seqlens"] = tensors["cu_seqlens"].long()
    for actual, wanted in zip(case.run(inlay, tensors), expected, strict=True):
        assert_same_bits(actual, wanted, "int64 offsets")


def test_no_sequences(device):
    case, tensors = packed([], kernel_dtype(device), device)
    o, final_state = case.run(inlay, tensors)
    assert o.shape[1] == final_state.shape[0] == 0


def test_states_are_zero_without_initial_ones(device):
    lengths = LENGTHS["several"]
    case, tensors = packed(lengths, kernel_dtype(device), device)
    zeros = {**tensors, "initial_state": torch.zeros_like(tensors["initial_state"])}
    del tensors["initial_state"]
    for actual, expected in zip(case.run(inlay, tensors), case.run(inlay, zeros), strict=True):
        assert_same_bits(actual, expected, "without initial states")
