"""Same inputs, same bits: from run to run, in any neighbourhood, and with any number of threads."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import BASIC, Case, gradients, random_like
from tests.support.compare import assert_same_bits

CASES = [
    *BASIC,
    Case(queries=500, keys=500, batch=1, heads=1, key_heads=1, dim=64, value_dim=64, features=("causal",)),
    Case(queries=300, keys=300, batch=1, heads=4, key_heads=1, features=("bias", "sinks", "gate")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_repeat(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    outputs = case.run(inlay, tensors, deterministic=True)
    douts = random_like(outputs)
    first = gradients(case, inlay, tensors, douts, deterministic=True)
    for _ in range(20):
        for output, expected in zip(case.run(inlay, tensors), outputs, strict=True):
            assert_same_bits(output, expected, str(case))
        for name, grad in gradients(case, inlay, tensors, douts, deterministic=True).items():
            assert_same_bits(grad, first[name], f"d{name}")


def test_torchs_own_switch(device):
    case = CASES[-2]
    tensors = case.inputs(torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    expected = gradients(case, inlay, tensors, douts, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, expected[name], f"d{name}")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case):
    """Parts of dq come from every block of keys, which different threads have."""
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


@pytest.mark.parametrize("features", [("causal", "gate"), ("window", "lengths"), ("softcap", "mask")], ids=str)
def test_a_row_does_not_depend_on_the_others(features, device):
    case = Case(batch=5, queries=150, keys=150, features=features)
    tensors = case.inputs(torch.bfloat16, device)
    outputs = case.run(inlay, tensors)
    douts = random_like(outputs)
    grads = gradients(case, inlay, tensors, douts, deterministic=True)
    for index in (0, 3):
        row = slice(index, index + 1)
        alone = {name: t[row] for name, t in tensors.items()}
        for output, expected in zip(case.run(inlay, alone), outputs, strict=True):
            assert_same_bits(output, expected[row], f"row {index}")
        own = gradients(case, inlay, alone, tuple(dout[row] for dout in douts), deterministic=True)
        for name, grad in own.items():
            assert_same_bits(grad, grads[name][row], f"d{name} of row {index}")


def test_queries_do_not_see_later_keys(device):
    case = Case(queries=150, keys=150, features=("causal",))
    tensors = case.inputs(torch.float32, device)
    y, _ = case.run(inlay, tensors)
    for name in ("k", "v"):
        tensors[name][:, 71:] = tensors[name][:, 71:] * 0.5
    changed, _ = case.run(inlay, tensors)
    assert_same_bits(changed[:, :71], y[:, :71], "queries before the change")
    assert not torch.equal(changed[:, 71:], y[:, 71:])
