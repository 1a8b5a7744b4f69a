"""Decoding: is a step what the rule computes, on a state that is updated in place?"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import reference
from tests.gdn.cases import Case, Tensors, widened
from tests.support.compare import assert_same_bits, assert_within_budget
from tests.support.devices import HALVES
from tests.support.on_cuda import capture

SHAPES = [
    Case(),
    Case(value_heads=4, key_dim=64, value_dim=96),
    Case(key_heads=1, value_heads=4, key_dim=128, value_dim=128, batch=3),
    Case(key_dim=8, value_dim=40, options={"l2norm_qk": True, "scale": 0.3}),
]


def step(namespace, case: Case, tensors: Tensors, state: torch.Tensor, states_out: torch.Tensor | None = None):
    options = {name: value for name, value in case.options.items() if name in ("scale", "l2norm_qk")}
    arguments = (tensors[name] for name in ("q", "k", "v", "g", "beta"))
    return namespace.gated_delta_step(*arguments, state, states_out=states_out, **options)


def inputs(case: Case, tokens: int, dtype: torch.dtype, device: str) -> Tensors:
    tensors = case.inputs(dtype, device)
    return {name: t[:, :tokens] if name != "initial_state" else t for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_accuracy(case, tokens, dtype, device):
    tensors = inputs(case, tokens, dtype, device)
    results = []
    for namespace, given in ((inlay, tensors), (reference, tensors), (reference, widened(tensors))):
        state = given["initial_state"].clone()
        results.append((step(namespace, case, given, state), state))
    for name, *values in zip(("o", "state"), *results, strict=True):
        assert_within_budget(*values, name, terms=values[2].abs().max().item())


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_is_the_rule(case, tokens, device):
    """Bit for bit the recurrent mode, state and all."""
    tensors = inputs(case, tokens, torch.bfloat16, device)
    expected_o, expected_state = case.run(inlay, tensors, mode="recurrent")
    state = tensors["initial_state"].clone()
    assert_same_bits(step(inlay, case, tensors, state), expected_o, "o")
    assert_same_bits(state, expected_state, "state")


def test_steps_follow_each_other(device):
    case = Case(tokens=20)
    tensors = case.inputs(torch.bfloat16, device)
    expected_o, expected_state = case.run(inlay, tensors, mode="recurrent")
    state = tensors["initial_state"].clone()
    for token in range(20):
        one = {name: t[:, token : token + 1] for name, t in tensors.items()}
        assert_same_bits(step(inlay, case, one, state), expected_o[:, token : token + 1], f"token {token}")
    assert_same_bits(state, expected_state, "state")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_states_of_every_token(case, state_dtype, device):
    tensors = inputs(case, 6, torch.bfloat16, device)
    start = tensors["initial_state"].to(state_dtype)
    states_out = torch.full((case.batch, 6, *start.shape[1:]), torch.nan, dtype=state_dtype, device=device)
    state = start.clone()
    o = step(inlay, case, tensors, state, states_out)
    plain_state = start.clone()
    assert_same_bits(o, step(inlay, case, tensors, plain_state), "o")
    assert_same_bits(state, plain_state, "state")
    for token in range(6):
        first = {name: t[:, : token + 1] if name != "initial_state" else t for name, t in tensors.items()}
        expected = start.clone()
        step(inlay, case, first, expected)
        assert_same_bits(states_out[:, token], expected, f"state after token {token}")


def test_bfloat16_state_is_rounded_once_a_call(device):
    case = Case()
    tensors = inputs(case, 5, torch.bfloat16, device)
    state = tensors["initial_state"].bfloat16()
    wide = state.float()
    o = step(inlay, case, tensors, state)
    assert_same_bits(o, step(inlay, case, tensors, wide), "o")
    assert_same_bits(state, wide.bfloat16(), "state")


def test_a_slice_of_a_pool_of_states(device):
    case = Case(batch=3)
    tensors = inputs(case, 1, torch.float32, device)
    pool = torch.randn(7, *tensors["initial_state"].shape[1:], device=device)
    before, state = pool.clone(), pool[1::2]
    expected = state.clone(memory_format=torch.contiguous_format)
    assert_same_bits(step(inlay, case, tensors, state), step(inlay, case, tensors, expected), "o")
    assert_same_bits(pool[1::2], expected, "states")
    assert_same_bits(pool[::2], before[::2], "states of others")


@pytest.mark.parametrize("shape", [(128, 128), (96, 72), (64, 96)], ids=str)
def test_a_sequence_does_not_depend_on_the_others(shape, device):
    """Nor on how many there are, which decides how the work is shared out."""
    case = Case(batch=140, key_dim=shape[0], value_dim=shape[1], tokens=3, value_heads=4)
    tensors = case.inputs(torch.bfloat16, device)
    state = tensors["initial_state"].clone()
    o = step(inlay, case, tensors, state)
    for index in (0, 139):
        alone = {name: t[index : index + 1].clone() for name, t in tensors.items()}
        own = alone["initial_state"]
        assert_same_bits(step(inlay, case, alone, own), o[index : index + 1], f"sequence {index}")
        assert_same_bits(own, state[index : index + 1], f"state {index}")


@pytest.mark.cuda
def test_in_a_cuda_graph():
    case = Case(tokens=1, batch=3, value_heads=4, key_dim=128, value_dim=128)
    tensors = case.inputs(torch.bfloat16, "cuda")
    state, expected = (tensors["initial_state"].clone() for _ in range(2))
    graph, o = capture(
        lambda: step(inlay, case, tensors, state), warm_up=lambda: step(inlay, case, tensors, state.clone())
    )
    for _ in range(4):
        for name, fresh in case.inputs(torch.bfloat16, "cuda").items():
            tensors[name].copy_(fresh)
        graph.replay()
        assert_same_bits(o, step(inlay, case, tensors, expected), "o")
        assert_same_bits(state, expected, "state")


def test_float64():
    case = SHAPES[1]
    tensors = inputs(case, 9, torch.float64, "cpu")
    state, expected = (tensors["initial_state"].clone() for _ in range(2))
    torch.testing.assert_close(step(inlay, case, tensors, state), step(reference, case, tensors, expected))
    torch.testing.assert_close(state, expected)


def test_a_wanted_gradient_is_refused(device):
    tensors = inputs(Case(), 1, torch.float32, device)
    tensors["v"].requires_grad_()
    with pytest.raises(ValueError, match="gated_delta_step: q, k, v, g, beta and state must not require gradients"):
        inlay.gated_delta_step(*tensors.values())
    with torch.no_grad():
        inlay.gated_delta_step(*tensors.values())


@pytest.mark.parametrize("saved", ["state", "states_out"])
def test_autograd_notices_that_a_saved_state_was_changed(saved, device):
    """The versions go up, as for any in-place operation."""
    tensors = inputs(Case(), 3, torch.float32, device)
    state = tensors["initial_state"]
    states_out = torch.zeros(state.shape[0], 3, *state.shape[1:], device=device)
    factor = torch.ones((), device=device, requires_grad=True)
    product = factor * (state if saved == "state" else states_out)
    step(inlay, Case(), tensors, state, states_out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@torch.inference_mode()
def test_states_made_in_inference_mode(device):
    tensors = inputs(Case(), 1, torch.float32, device)
    before = tensors["initial_state"].clone()
    step(inlay, Case(), tensors, tensors["initial_state"])
    assert not torch.equal(tensors["initial_state"], before)
