"""Same inputs, same bits: from run to run, in any neighbourhood, and with any number of threads."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.rope.cases import BASIC, Case, check_gradients, gradients
from tests.support.compare import assert_same_bits
from tests.support.devices import poison_free_memory, random_like


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_gradients_repeat(case, width, device):
    tensors = case.inputs((2, 700, 4, 2, width), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    first = gradients(case, inlay, tensors, douts)
    for _ in range(10):
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, first[name], f"d{name}")


def test_a_thousand_weight_gradients(device):
    """On the raw op, so that nothing but the kernels is repeated."""
    tensors = Case().inputs((1, 200, 2, 1, 64), torch.float32, device)
    dq, dk = (torch.randn_like(tensors[name]) for name in "qk")
    results = [
        torch.ops.inlay.qk_norm_rope_bwd(dq, dk, *tensors.values(), 64, 1e-6, 0.0, False, True, True)[2:]
        for _ in range(1000)
    ]
    for side in zip(*results, strict=True):
        stacked = torch.stack(side)
        assert_same_bits(stacked, stacked[:1].expand_as(stacked), "dweight")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_token_does_not_depend_on_the_others(case, device):
    tensors = case.inputs((5, 30, 4, 2, 64), torch.bfloat16, device)
    douts = random_like(case.run(inlay, tensors))
    outputs, grads = case.run(inlay, tensors), gradients(case, inlay, tensors, douts)
    for row, token in ((0, 0), (4, 29), (2, 17)):

        def pick(t: torch.Tensor, row: int = row, token: int = token) -> torch.Tensor:
            if t.dim() == 1:
                return t
            return t[min(row, t.shape[0] - 1), token][None, None] if t.dim() > 2 else t[token][None]

        alone = {name: pick(t) for name, t in tensors.items()}
        for output, expected in zip(case.run(inlay, alone), outputs, strict=True):
            assert_same_bits(output, pick(expected), f"token {token} of row {row}")
        alone_grads = gradients(case, inlay, alone, tuple(pick(dout) for dout in douts))
        for name in "qk":
            assert_same_bits(alone_grads[name], pick(grads[name]), f"d{name} of token {token} of row {row}")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_any_number_of_threads(case):
    tensors = case.inputs((3, 300, 6, 2, 64), torch.float32, "cpu")
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


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say_in_gradients(case, width, device):
    tensors = case.inputs((3, 21, 5, 2, width), torch.float32, device)
    douts = random_like(case.run(inlay, tensors))
    check_gradients(case, tensors, douts)
    clean = gradients(case, inlay, tensors, douts)
    q_bytes = 3 * 21 * 5 * width * 4
    for _ in range(5):
        poison_free_memory(device, (q_bytes, q_bytes // 5 * 2, width * 4, 63 * 2 * width * 4, 2**19))
        for name, grad in gradients(case, inlay, tensors, douts).items():
            assert_same_bits(grad, clean[name], f"d{name}")
