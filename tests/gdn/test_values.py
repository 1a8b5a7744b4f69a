"""Are outputs and final states as accurate as eager code's, whatever the gates, the keys and the lengths?"""

from __future__ import annotations

import inspect

import pytest
import torch

import inlay
from inlay import reference
from tests.gdn.cases import BASIC, GATES, HARD, LENGTHS, SHAPES, Case, check_values, kernel_dtype
from tests.support.compare import assert_matches_eager, assert_same_bits, assert_within_budget
from tests.support.devices import HALVES, poison_free_memory

MODES = ["chunk", "recurrent"]
DTYPES = [torch.float32, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, mode, dtype, device):
    check_values(case, case.inputs(dtype, device), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_float64(case, mode):
    tensors = case.inputs(torch.float64)
    for actual, exact in zip(
        case.run(inlay, tensors, mode=mode), case.run(reference, tensors, mode="recurrent"), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", HARD, ids=str)
def test_gates_keys_and_betas(case, mode, dtype, device):
    check_values(case, case.inputs(dtype, device), mode=mode)


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize("gates", ["weak", "strong"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens, gates, mode, device):
    case = Case(tokens=tokens, gates=gates, batch=1)
    check_values(case, case.inputs(torch.float32, device), mode=mode)


@pytest.mark.slow
@pytest.mark.parametrize("gates", GATES)
def test_long_sequences(gates, device):
    case = Case(tokens=8192, gates=gates, batch=1, key_dim=64, value_dim=64)
    check_values(case, case.inputs(torch.float32, device))


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_no_tokens(mode, device):
    case = Case(tokens=0)
    tensors = case.inputs(torch.bfloat16, device)
    o, final_state = case.run(inlay, tensors, mode=mode)
    assert o.shape == tensors["v"].shape
    assert_same_bits(final_state, tensors["initial_state"], "final state")
    _, final_state = inlay.gated_delta_rule(*list(tensors.values())[:5], output_final_state=True, mode=mode)
    assert_same_bits(final_state, torch.zeros_like(final_state), "final state")


def test_no_sequences(device):
    case = Case(batch=0)
    o, final_state = case.run(inlay, case.inputs(torch.bfloat16, device))
    assert o.shape[0] == final_state.shape[0] == 0


def test_output_alone(device):
    case = Case()
    tensors = case.inputs(torch.bfloat16, device)
    o = case.run(inlay, tensors)[0]
    alone = inlay.gated_delta_rule(**tensors)
    assert_same_bits(alone, o, "o")


@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_recurrence_agree(mode, device):
    """To rounding, with each other and with any split of the tokens that carries the state."""
    case = Case(tokens=200)
    tensors = case.inputs(torch.float32, device)
    exact = case.run(reference, {name: t.double() for name, t in tensors.items()}, mode="recurrent")
    eager = case.run(reference, tensors, mode="chunk")
    for lengths in ([200], [64, 136], [1, 199], [63, 1, 65, 71], [16] * 12 + [8]):
        parts, state, begin = [], tensors["initial_state"], 0
        for index, length in enumerate(lengths):
            part = {name: tensors[name][:, begin : begin + length] for name in ("q", "k", "v", "g", "beta")}
            chosen = mode if index % 2 == 0 else MODES[1 - MODES.index(mode)]
            o, state = case.run(inlay, {**part, "initial_state": state}, mode=chosen)
            parts.append(o)
            begin += length
        for name, actual, *others in zip(("o", "state"), (torch.cat(parts, 1), state), eager, exact, strict=True):
            terms = 2 * others[1].abs().max().item()
            assert_within_budget(actual, *others, f"{name} of {lengths}", terms=terms)


def test_auto_is_one_of_both(device):
    for tokens, mode in ((1, "recurrent" if device == "cpu" else "chunk"), (200, "chunk")):
        case = Case(tokens=tokens)
        tensors = case.inputs(torch.bfloat16, device)
        for actual, expected in zip(case.run(inlay, tensors), case.run(inlay, tensors, mode=mode), strict=True):
            assert_same_bits(actual, expected, f"{tokens} tokens")


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_state_dtypes(mode, wanted, given, device):
    case = Case()
    tensors = case.inputs(torch.bfloat16, device)
    tensors["initial_state"] = tensors["initial_state"].to(given)
    o, final_state = case.run(inlay, tensors, mode=mode, state_dtype=wanted)
    assert final_state.dtype == (wanted or given)
    wide = {**tensors, "initial_state": tensors["initial_state"].float()}
    expected_o, expected_state = case.run(inlay, wide, mode=mode, state_dtype=torch.float32)
    assert_same_bits(o, expected_o, "o")
    assert_same_bits(final_state, expected_state.to(final_state.dtype), "final state")


@pytest.mark.parametrize("strength", [-1e3, -1e30, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gates_that_forget_everything(mode, dtype, strength, device):
    """No NaN out of 0 * inf; what follows such a gate is what starts from zeros."""
    case = Case(tokens=100, batch=1)
    tensors = case.inputs(dtype, device)
    tensors["g"][:, 40] = strength
    tensors["g"][:, 70:75] = strength
    check_values(case, tensors, mode=mode)
    if dtype != torch.float32:
        return
    o, final_state = case.run(inlay, tensors, mode=mode)
    fresh = {name: t[:, 74:] if name != "initial_state" else t * 0 for name, t in tensors.items()}
    for actual, expected in zip((o[:, 74:], final_state), case.run(inlay, fresh, mode=mode), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["g", "beta", "k", "v"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_goes_where_the_recurrence_takes_it(mode, name, device):
    """Into its own head from its token on, and into no other head, sequence, or earlier chunk."""
    case = Case(tokens=150, key_heads=2, value_heads=2)
    tensors = case.inputs(kernel_dtype(device), device)
    clean_o, clean_state = case.run(inlay, tensors, mode=mode)
    tensors[name][1, 100, 0] = torch.nan
    o, final_state = case.run(inlay, tensors, mode=mode)
    assert o[1, 100:, 0].isnan().all()
    assert final_state[1, 0].isnan().all()
    assert_same_bits(o[0], clean_o[0], "the other sequence")
    assert_same_bits(o[1, :, 1], clean_o[1, :, 1], "the other head")
    assert_same_bits(o[1, :64, 0], clean_o[1, :64, 0], "the chunk before")
    assert_same_bits(final_state[0], clean_state[0], "the other sequence's state")


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_inputs_stay_as_they_were(case, device):
    tensors = case.inputs(torch.bfloat16, device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for output in case.run(inlay, tensors):
        assert output.is_contiguous()
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], name)


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_uninitialised_memory_has_no_say(case, device):
    tensors = case.inputs(kernel_dtype(device), device)
    clean = case.run(inlay, tensors)
    for _ in range(5):
        poison_free_memory(device, (clean[0].numel() * 4, clean[1].numel() * 4, 400_000, 100_000))
        for output, expected in zip(case.run(inlay, tensors), clean, strict=True):
            assert_same_bits(output, expected, str(case))


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_hugging_face(dtype, tokens, device):
    """The functions of Qwen3.5 that it stands for, with their arguments."""
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    names = {1: "torch_recurrent_gated_delta_rule", 150: "torch_chunk_gated_delta_rule"}
    function = getattr(modeling, names[tokens])
    function = getattr(function, "__wrapped__", function)
    case = Case(tokens=tokens, value_heads=4, key_dim=64, value_dim=64, options={"l2norm_qk": True})
    tensors = case.inputs(dtype, device)
    q, k, v, g, beta, state = tensors.values()
    if "repeat_interleave" not in inspect.getsource(function):  # until transformers 5.17 that is the layer's work
        q, k = (x.repeat_interleave(case.value_heads // case.key_heads, 2) for x in (q, k))
    expected = function(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    o, final_state = case.run(inlay, tensors)
    if device == "cuda" and dtype != torch.float32:  # in bfloat16's and float16's products
        limit = 4 * torch.finfo(dtype).eps
        for actual, wanted in zip((o, final_state), expected, strict=True):
            assert (actual - wanted).norm() <= limit * wanted.norm()
        return
    torch.testing.assert_close(final_state, expected[1], rtol=2e-5, atol=2e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(o, expected[0], rtol=2e-5, atol=2e-5)
    else:
        # float32 sums in another order show more often in float16, which has three more digits.
        assert_matches_eager(o, expected[0], "o", share=0.999 if dtype == torch.bfloat16 else 0.995, ulps=None)


@pytest.mark.parametrize("case", [*HARD, *SHAPES], ids=str)
def test_references_agree(case):
    """The chunked eager form, which runs where there are no kernels, against the token recurrence."""
    tensors = case.inputs(torch.float64)
    for chunk, recurrent in zip(
        case.run(reference, tensors, mode="chunk"), case.run(reference, tensors, mode="recurrent"), strict=True
    ):
        torch.testing.assert_close(chunk, recurrent, rtol=1e-8, atol=1e-9)
