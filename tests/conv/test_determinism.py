"""Same inputs, same bits: from run to run, in any neighbourhood, and with any number of threads."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.conv.cases import BASIC, LENGTHS, check_gradients, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import poison_free_memory, random_like


@pytest.mark.parametrize("time", [100, 1500])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_repeat(case, time, device):
    tensors = case.inputs((2, time, 96), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    first = gradients(case, inlay, tensors, douts)
    for _ in range(10):
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, first[name], f"d{name}")


def test_a_thousand_weight_gradients(device):
    """On the raw op, so that nothing but the kernels is repeated."""
    x, dy = (torch.randn(2, 250, 48, device=device) for _ in range(2))
    weight = torch.randn(48, 4, device=device)
    constants = (None, None, None, 1, True, False, False)
    results = torch.stack([torch.ops.inlay.causal_conv1d_bwd(dy, None, x, weight, *constants)[1] for _ in range(1000)])
    assert_same_bits(results, results[:1].expand_as(results), "dweight")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_batch_row_does_not_depend_on_the_others(case, device):
    tensors = case.inputs((5, 130, 40), torch.bfloat16, device)
    together = case.run(inlay, tensors)
    for row in (0, 4):
        alone = {name: t[row : row + 1] if t.dim() == 3 else t for name, t in tensors.items()}
        for output, expected in zip(case.run(inlay, alone), together, strict=True):
            assert_same_bits(output[0], expected[row], f"row {row}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_any_number_of_threads(case, packed):
    shape = (1, sum(LENGTHS), 1100) if packed else (3, 300, 1100)
    tensors = case.inputs(shape, torch.float32, "cpu", LENGTHS if packed else None)
    douts = random_like(case.run(inlay, tensors))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        outputs, grads = case.run(inlay, tensors), gradients(case, inlay, tensors, douts)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for output, expected in zip(case.run(inlay, tensors), outputs, strict=True):
                assert_same_bits(output, expected, f"{count} threads")
            for name, grad in gradients(case, inlay, tensors, douts).items():
                assert_same_bits(grad, grads[name], f"d{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say_in_gradients(case, device):
    tensors = case.inputs((3, 133, 40), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, douts)
    clean = gradients(case, inlay, tensors, douts)
    for _ in range(5):
        poison_free_memory(device, (3 * 133 * 40 * 4, 40 * 4, 40 * 4 * 4, 3 * 40 * 3 * 4, 6 * 5 * 40 * 4, 2**19))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, clean[name], f"d{name}")
