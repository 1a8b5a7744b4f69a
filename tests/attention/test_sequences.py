"""Does each packed sequence give what it gives alone, and each row what it gives without its padding?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import Case, check_gradients, check_values, gradients, random_like
from tests.support.compare import assert_same_bits

LENGTHS = [(3, 3), (0, 0), (150, 150), (40, 90), (0, 7), (7, 0), (129, 97), (1, 1)]  # of queries and of keys


def offsets(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype, device=device).cumsum(0, dtype=dtype)


@pytest.mark.parametrize("features", [(), ("causal",), ("window", "gate"), ("softcap", "sinks")], ids=str)
def test_packed_sequences_give_what_they_give_alone(features, device):
    """Bit for bit, values and gradients; but a sink's gradient, which is one sum over all."""
    queries, keys = (sum(column) for column in zip(*LENGTHS, strict=True))
    case = Case(queries=queries, keys=keys, batch=1, features=features)
    tensors = case.inputs(torch.bfloat16, device)
    cu_q, cu_k = (offsets(column, device) for column in zip(*LENGTHS, strict=True))
    packed = {**tensors, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    y, lse = case.run(inlay, packed)
    douts = random_like((y, lse))
    grads = gradients(case, inlay, packed, douts, deterministic=True)
    begin_q = begin_k = 0
    for count_q, count_k in LENGTHS:
        rows, columns = slice(begin_q, begin_q + count_q), slice(begin_k, begin_k + count_k)
        begin_q, begin_k = rows.stop, columns.stop
        parts = {"q": rows, "gate": rows, "k": columns, "v": columns}
        alone = {name: t[:, parts[name]] if name in parts else t for name, t in tensors.items()}
        own_y, own_lse = case.run(inlay, alone)
        assert_same_bits(own_y, y[:, rows], "y")
        assert_same_bits(own_lse, lse[:, :, rows], "lse")
        own = gradients(case, inlay, alone, (douts[0][:, rows], douts[1][:, :, rows]), deterministic=True)
        for name in own.keys() & parts.keys():
            assert_same_bits(own[name], grads[name][:, parts[name]], f"d{name}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_of_queries_serve_the_keys(dtype, device):
    case = Case(queries=100, keys=100, batch=1, features=("causal",))
    tensors = case.inputs(torch.float32, device)
    cu = offsets([30, 0, 70], device, dtype)
    expected = case.run(inlay, {**tensors, "cu_seqlens_q": cu, "cu_seqlens_k": cu})
    for actual, wanted in zip(case.run(inlay, {**tensors, "cu_seqlens_q": cu}), expected, strict=True):
        assert_same_bits(actual, wanted, "cu_seqlens_k by default")


def test_a_token_in_each_sequence(device):
    """Decoding a packed batch."""
    keys = [5, 1, 0, 200]
    case = Case(queries=4, keys=sum(keys), batch=1, features=("causal",))
    tensors = case.inputs(torch.bfloat16, device)
    tensors |= {"cu_seqlens_q": offsets([1] * 4, device), "cu_seqlens_k": offsets(keys, device)}
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


def test_only_empty_sequences(device):
    case = Case(queries=0, keys=0, batch=1)
    tensors = {**case.inputs(torch.float32, device), "cu_seqlens_q": offsets([0, 0, 0], device)}
    y, lse = case.run(inlay, tensors)
    assert y.shape == (1, 0, 4, 32)
    assert lse.shape == (1, 4, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_cut_the_keys_off(dtype, device):
    """What lies behind them is not looked at, NaN neither; its gradient is zero."""
    case = Case(queries=100, keys=150, batch=4)
    tensors = case.inputs(torch.bfloat16, device)
    lengths = [150, 97, 1, 0]
    for name in ("k", "v"):
        for row, length in enumerate(lengths):
            tensors[name][row, length:] = torch.nan
    padded = {**tensors, "kv_lengths": torch.tensor(lengths, dtype=dtype, device=device)}
    y, lse = case.run(inlay, padded)
    douts = random_like((y, lse))
    grads = gradients(case, inlay, padded, douts)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = {name: t[one, : length if name != "q" else None] for name, t in tensors.items()}
        own_y, own_lse = case.run(inlay, alone)
        assert_same_bits(own_y, y[one], f"y of {length} keys")
        assert_same_bits(own_lse, lse[one], f"lse of {length} keys")
        if device == "cpu":  # on CUDA gradients are eager code's
            own = gradients(case, inlay, alone, (douts[0][one], douts[1][one]))
            assert_same_bits(own["q"], grads["q"][one], "dq")
            for name in ("k", "v"):
                assert_same_bits(own[name], grads[name][one, :length], f"d{name}")
        for name in ("k", "v"):
            rest = grads[name][one, length:]
            assert_same_bits(rest, torch.zeros_like(rest), f"d{name} of the padding")


def test_lengths_do_not_move_the_diagonal(device):
    """A batch padded on the right, causal: real tokens see what they see without padding."""
    case = Case(queries=100, keys=100, features=("causal",))
    tensors = case.inputs(torch.bfloat16, device)
    padded, _ = case.run(inlay, {**tensors, "kv_lengths": torch.tensor([100, 60], device=device)})
    alone, _ = case.run(inlay, {name: t[1:, :60] for name, t in tensors.items()})
    assert_same_bits(padded[1:, :60], alone, "y")
