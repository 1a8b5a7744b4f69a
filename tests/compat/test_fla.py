"""Do the gated delta rules of flash-linear-attention give what the recurrence gives, for every keyword?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from tests.support.compare import assert_same_bits

both = pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32, time: int = 70) -> dict[str, Tensor]:
    shapes = {"q": (2, time, 2, 16), "k": (2, time, 2, 16), "v": (2, time, 4, 24), "g": (2, time, 4)}
    given = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    given |= {"g": F.logsigmoid(given["g"]), "beta": torch.rand(2, time, 4, device=device)}
    return {name: x.to(dtype).requires_grad_() for name, x in given.items()}


def vectors(device: str) -> tuple[Tensor, Tensor]:
    return torch.rand(4, device=device, requires_grad=True), torch.randn(4, device=device, requires_grad=True)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, scale: float | None = None,
    normalise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token by token, from the formula."""
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(*v.shape[:1], v.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        missing = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], missing)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected).norm() <= tolerance * expected.norm()


@both
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients(function: Any, normalise: bool, scale: float | None, device: str) -> None:
    given = tensors(device)
    if not normalise:
        given["k"] = F.normalize(given["k"].detach(), dim=-1).requires_grad_()
    before = torch.randn(2, 4, 16, 24, device=device, requires_grad=True)
    leaves = [*given.values(), before]
    expected = recurrence(**given, state=before, scale=scale, normalise=normalise)
    actual = function(
        **given, initial_state=before, scale=scale, use_qk_l2norm_in_kernel=normalise, output_final_state=True
    )
    gradients = [torch.randn_like(x) for x in expected]
    for ours, theirs in zip(
        (*actual, *torch.autograd.grad(actual, leaves, gradients)),
        (*expected, *torch.autograd.grad(expected, leaves, gradients)),
        strict=True,
    ):
        assert_close(ours, theirs)


@both
def test_dtypes(function: Any, device: str) -> None:
    """Everything in bfloat16, gates and states too, as that package takes it; the final state is float32."""
    given = {name: x.detach() for name, x in tensors(device, torch.bfloat16).items()}
    before = torch.randn(2, 4, 16, 24, device=device).bfloat16()
    o, state = function(**given, initial_state=before, use_qk_l2norm_in_kernel=True, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, expected_state = recurrence(**given, state=before.float(), normalise=True)
    assert_close(o, expected, 5e-3)
    assert_close(state, expected_state, 5e-3)
    assert function(**given)[1] is None


@both
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("gate", "sigmoid"), [(True, True), (True, False), (False, True)])
def test_gates_in_the_kernel(
    function: Any, gate: bool, sigmoid: bool, biased: bool, doubled: bool, device: str
) -> None:
    given = tensors(device)
    if doubled and not sigmoid:
        pytest.skip("allow_neg_eigval goes with use_beta_sigmoid_in_kernel")
    A_log, dt_bias = vectors(device)
    made = dict(given)
    if gate:
        made["g"] = -A_log.exp() * F.softplus(given["g"] + (dt_bias if biased else 0))
    if sigmoid:
        made["beta"] = given["beta"].sigmoid() * (2 if doubled else 1)
    expected, _ = recurrence(**made, normalise=True)
    options = {"use_gate_in_kernel": gate, "A_log": A_log, "dt_bias": dt_bias if biased else None}
    options |= {"use_beta_sigmoid_in_kernel": sigmoid, "allow_neg_eigval": doubled}
    actual, _ = function(**given, **options, use_qk_l2norm_in_kernel=True)
    assert_close(actual, expected)
    leaves = [*given.values(), *([A_log] if gate else []), *([dt_bias] if gate and biased else [])]
    dy = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_close(ours, theirs, 1e-3)


@both
@pytest.mark.parametrize("name", ["state_v_first", "transpose_state_layout"])
@torch.no_grad()
def test_transposed_states(function: Any, name: str, device: str) -> None:
    given = tensors(device)
    before = torch.randn(2, 4, 16, 24, device=device)
    o, state = function(**given, initial_state=before, output_final_state=True)
    options = {"initial_state": before.mT.contiguous(), "output_final_state": True, name: True}
    transposed_o, transposed = function(**given, **options)
    assert_same_bits(transposed_o, o, "o")
    assert_same_bits(transposed, state.mT, "state")
    assert transposed.is_contiguous()


@both
@torch.no_grad()
def test_packed_sequences(function: Any, device: str) -> None:
    given = {name: x[:1] for name, x in tensors(device).items()}
    lengths = [30, 0, 40]
    cu_seqlens = torch.tensor([0, 30, 30, 70], device=device)
    before = torch.randn(3, 4, 16, 24, device=device)
    o, state = function(**given, initial_state=before, output_final_state=True, cu_seqlens=cu_seqlens)
    parts = {name: x.split(lengths, 1) for name, x in given.items()}
    for index, at in ((0, slice(0, 30)), (2, slice(30, 70))):
        one = {name: x[index] for name, x in parts.items()}
        expected, expected_state = recurrence(**one, state=before[index : index + 1])
        assert_close(o[:, at], expected)
        assert_close(state[index : index + 1], expected_state)
    assert_same_bits(state[1], before[1], "state of an empty sequence")


@torch.no_grad()
def test_defaults_of_the_recurrence(device: str) -> None:
    given = {name: x for name, x in tensors(device, time=9).items() if name in "qkv"}
    ones = torch.ones(2, 9, 4, device=device)
    o, _ = fused_recurrent_gated_delta_rule(**given, use_qk_l2norm_in_kernel=True)
    assert_close(o, recurrence(**given, g=0 * ones, beta=ones, normalise=True)[0])


@torch.no_grad()
def test_hints_change_nothing(device: str) -> None:
    given = tensors(device)
    o, _ = chunk_gated_delta_rule(**given)
    hinted, _ = chunk_gated_delta_rule(**given, chunk_size=32, chunk_indices=torch.zeros(2, 2), cu_seqlens_cpu=None)
    assert_same_bits(hinted, o, "o")


@torch.no_grad()
def test_strided_inputs(device: str) -> None:
    given = tensors(device)
    turned = {name: given[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in "qkv"}
    o, _ = chunk_gated_delta_rule(**given)
    assert_same_bits(chunk_gated_delta_rule(**{**given, **turned})[0], o, "o")


@pytest.mark.parametrize(
    ("function", "options", "error", "text"),
    [
        (chunk_gated_delta_rule, {"cp_context": 1}, NotImplementedError, "cp_context must be None"),
        (chunk_gated_delta_rule, {"chunk_size": 48}, ValueError, "chunk_size must be 16, 32 or 64, got 48"),
        (fused_recurrent_gated_delta_rule, {"gk": 1}, NotImplementedError, "gk must be None"),
        (fused_recurrent_gated_delta_rule, {"gv": 1}, NotImplementedError, "gv must be None"),
        (
            fused_recurrent_gated_delta_rule,
            {"beta": torch.ones(2, 70, 4, 24)},
            NotImplementedError,
            r"beta must have shape \[B, T, HV\], got \[2, 70, 4, 24\]",
        ),
        (fused_recurrent_gated_delta_rule, {"g": None, "use_gate_in_kernel": True}, ValueError, "g must be given"),
        (
            fused_recurrent_gated_delta_rule,
            {"beta": None, "use_beta_sigmoid_in_kernel": True},
            ValueError,
            "beta must be given",
        ),
    ],
)
def test_what_is_missing_is_named(function: Any, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {text}"):
        function(**{**tensors(), **options})


@both
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_gate_in_kernel": True}, "A_log must be given with use_gate_in_kernel=True, got None"),
        ({"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel must be True with allow_neg_eigval=True, got False"),
        ({"state_v_first": True, "transpose_state_layout": True}, "transpose_state_layout must be None with"),
    ],
)
def test_contradictions(function: Any, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: {text}"):
        function(**tensors(), **options)


@both
def test_unknown_keywords(function: Any) -> None:
    with pytest.raises(TypeError, match="head_first"):
        function(**tensors(), head_first=True)
