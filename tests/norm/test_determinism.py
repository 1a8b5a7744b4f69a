"""Same inputs, same bits: from run to run, in any neighbourhood, and with any number of threads."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.norm.cases import BASIC, check_gradients, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import poison_free_memory, random_like


@pytest.mark.parametrize("rows", [200, 3000])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_repeat(case, rows, device):
    tensors = case.inputs((rows, 192), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    first = gradients(case, inlay, tensors, douts)
    for _ in range(10):
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, first[name], f"d{name}")


def test_a_thousand_weight_gradients(device):
    """On the raw op, so that nothing but the kernels is repeated."""
    rows, width = 500, 96
    x, dy = (torch.randn(rows, width, device=device) for _ in range(2))
    weight = torch.randn(width, device=device)
    constants = (0.0, 0, 0, False, torch.float32, torch.float32, True, False)
    _, stats = torch.ops.inlay.norm_fwd(x, weight, None, None, 1e-6, 0.0, 0, 0, 0, False)
    results = torch.stack(
        [torch.ops.inlay.norm_bwd(dy, None, x, stats, weight, None, None, *constants)[3] for _ in range(1000)]
    )
    assert_same_bits(results, results[:1].expand_as(results), "dweight")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_row_does_not_depend_on_the_others(case, device):
    """Batch invariance of the forward: a row alone gives the bits it gives among many."""
    tensors = case.inputs((130, 320), torch.bfloat16, device)
    together = case.run(inlay, tensors)
    for row in (0, 64, 129):
        alone = {name: t[row : row + 1] if t.dim() > 1 else t for name, t in tensors.items()}
        for output, expected in zip(case.run(inlay, alone), together, strict=True):
            assert_same_bits(output[0], expected[row], f"row {row}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_any_number_of_threads(case):
    tensors = case.inputs((700, 130), torch.float32, "cpu")
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
    tensors = case.inputs((33, 257), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, douts)
    clean = gradients(case, inlay, tensors, douts)
    for _ in range(5):
        poison_free_memory(device, (33 * 257 * 4, 257 * 4, 33 * 4, 64 * 257 * 4, 2 * 64 * 257 * 4))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, clean[name], f"d{name}")
