"""Same inputs, same bits: from run to run, in any neighbourhood, and with any number of threads."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.gdn.cases import Case, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import random_like

CASES = [
    Case(tokens=200, value_heads=4, value_dim=128, batch=1),
    Case(tokens=200, value_heads=4, value_dim=128, batch=1, options={"mode": "recurrent"}),
    Case(tokens=70, key_heads=1, value_heads=1, value_dim=200, batch=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_repeat(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    outputs = case.run(inlay, tensors)
    douts = random_like(outputs)
    first = gradients(case, inlay, tensors, douts)
    runs = 1000 if device == "cuda" and "mode" not in case.options else 20
    for _ in range(runs):
        for output, expected in zip(case.run(inlay, tensors), outputs, strict=True):
            assert_same_bits(output, expected, str(case))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, first[name], f"d{name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case):
    """With more threads than heads the columns of V are dealt out too."""
    tensors = case.inputs(torch.float32)
    douts = random_like(case.run(inlay, tensors))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        outputs, grads = case.run(inlay, tensors), gradients(case, inlay, tensors, douts)
        for count in (2, 3, 7, 40):
            torch.set_num_threads(count)
            for output, expected in zip(case.run(inlay, tensors), outputs, strict=True):
                assert_same_bits(output, expected, f"{count} threads")
            for name, grad in gradients(case, inlay, tensors, douts).items():
                assert_same_bits(grad, grads[name], f"d{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_a_sequence_does_not_depend_on_the_others(mode, device):
    case = Case(tokens=100, batch=5, value_heads=4, options={"mode": mode})
    tensors = case.inputs(torch.bfloat16, device)
    outputs = case.run(inlay, tensors)
    douts = random_like(outputs)
    grads = gradients(case, inlay, tensors, douts)
    for index in (0, 3):
        row = slice(index, index + 1)
        alone = {name: t[row] for name, t in tensors.items()}
        for output, expected in zip(case.run(inlay, alone), outputs, strict=True):
            assert_same_bits(output, expected[row], f"sequence {index}")
        for name, grad in gradients(case, inlay, alone, tuple(dout[row] for dout in douts)).items():
            assert_same_bits(grad, grads[name][row], f"d{name} of sequence {index}")


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_tokens_do_not_see_later_ones(mode, device):
    case = Case(tokens=100, options={"mode": mode})
    tensors = case.inputs(torch.float32, device)
    o, _ = case.run(inlay, tensors)
    for name in ("q", "k", "v", "g", "beta"):
        tensors[name][:, 71:] = tensors[name][:, 71:] * 0.5
    changed, _ = case.run(inlay, tensors)
    assert_same_bits(changed[:, :71], o[:, :71], "tokens before the change")
    assert not torch.equal(changed[:, 71:], o[:, 71:])
