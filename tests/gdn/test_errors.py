"""Is every bad input refused with its argument's name, by the public function and again by the raw op?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.gdn.layer_cases import LayerCase

B, T, HK, HV, K, V = 2, 6, 2, 4, 16, 24
ones = torch.ones
GOOD = {
    "q": torch.randn(B, T, HK, K),
    "k": torch.randn(B, T, HK, K),
    "v": torch.randn(B, T, HV, V),
    "g": -torch.rand(B, T, HV),
    "beta": torch.rand(B, T, HV),
}
STATE = torch.randn(B, HV, K, V)
TRANSPOSED = torch.randn(B, HV, V, K).transpose(2, 3)

# An argument made wrong, the exception, and its text after "<op>: <argument> ". Of both functions.
BAD_TOKENS = [
    ("q", [1.0], TypeError, "must be a Tensor, got list"),
    ("q", ones(B, T, HK, K, dtype=torch.int64), ValueError, "must be float32 or bfloat16 or float16 or float64 on cpu"),
    ("q", ones(B, T, HK * K), ValueError, r"must have shape \[B, T, Hk, K\], got \[2, 6, 32\]"),
    ("q", ones(B, T, K, HK).transpose(2, 3), ValueError, "must have stride 1 in its last dimension"),
    ("k", None, TypeError, "must be a Tensor, got NoneType"),
    ("k", ones(B, T, HV, K), ValueError, r"must have q's shape \[2, 6, 2, 16\], got \[2, 6, 4, 16\]"),
    ("k", ones(B, T, HK, K).half(), ValueError, r"must be float32, got torch\.float16"),
    ("k", ones(B, T, HK, K, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    ("v", ones(B, T + 1, HV, V), ValueError, r"must have shape \[B, T, Hv, V\] with q's B and T"),
    ("v", ones(B, T, 3, V), ValueError, "must have a multiple of q's heads 2, got 3"),
    ("v", ones(B, T, 1, V), ValueError, "must have a multiple of q's heads 2, got 1"),
    ("v", ones(B, T, HV, 12), ValueError, "must have a multiple of 8 up to 256 in its last dimension, got 12"),
    ("v", ones(B, T, HV, 264), ValueError, "must have a multiple of 8 up to 256 in its last dimension, got 264"),
    ("v", ones(B, T, HV, V).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("g", ones(B, T, HK), ValueError, r"must have shape \[2, 6, 4\] \(B, T, Hv\), got \[2, 6, 2\]"),
    ("g", ones(B, T, HV).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("g", ones(B, T, HV, device="meta"), ValueError, "must be on q's device cpu, got meta"),
    ("beta", ones(B, T), ValueError, r"must have shape \[2, 6, 4\] \(B, T, Hv\), got \[2, 6\]"),
    ("beta", ones(B, T, HV).half(), ValueError, r"must be float32, got torch\.float16"),
    ("beta", 1.0, TypeError, "must be a Tensor, got float"),
]


def bad_states(name: str) -> list:
    shape = r"must have shape \[2, 4, 16, 24\] \(N, Hv, K, V\), got"
    return [
        (name, 0.0, TypeError, "must be a Tensor, got float"),
        (
            name,
            ones(B, HK, K, V),
            ValueError,
            rf"{shape} \[2, 2, 16, 24\]",
        ),
        (
            name,
            ones(B, HV, V, K),
            ValueError,
            rf"{shape} \[2, 4, 24, 16\]",
        ),
        (name, STATE.half(), ValueError, r"must be float32 or bfloat16, got torch\.float16"),
        (name, STATE.double(), ValueError, r"must be float32 or bfloat16, got torch\.float64"),
        (name, TRANSPOSED, ValueError, r"must have dense matrices \[K, V\]"),
        (name, STATE.to("meta"), ValueError, "must be on q's device cpu, got meta"),
    ]


BAD_RULE = [
    *BAD_TOKENS,
    *bad_states("initial_state"),
    ("mode", "fast", ValueError, "must be one of 'auto', 'chunk', 'recurrent', got 'fast'"),
    ("state_dtype", torch.float16, ValueError, r"must be float32 or bfloat16, got torch\.float16"),
]
BAD_STEP = [
    *BAD_TOKENS,
    *bad_states("state"),
    ("state", STATE[:1].expand(B, -1, -1, -1), ValueError, r"must not overlap itself: a dense \[Hv, K, V\] for each"),
    ("state", torch.randn(B, 2 * HV, K, V)[:, ::2], ValueError, "must not overlap itself"),
    ("states_out", ones(B, T - 1, HV, K, V), ValueError, r"must have shape \[2, 6, 4, 16, 24\] \(B, T, Hv, K, V\)"),
    ("states_out", ones(B, T, HV, K, V).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("states_out", ones(T, B, HV, K, V).transpose(0, 1), ValueError, "must be contiguous"),
]
PACKED = {name: tensor[:1] for name, tensor in GOOD.items()}


def cumulative(*offsets: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(offsets, dtype=dtype)


BAD_OFFSETS = [
    ([0, 6], TypeError, "must be a Tensor, got list"),
    (cumulative(0, 6).float(), ValueError, r"must be int32 or int64, got torch\.float32"),
    (cumulative(0, 6)[None], ValueError, r"must have shape \[N \+ 1\], got \[1, 2\]"),
    (cumulative(), ValueError, r"must have shape \[N \+ 1\], got \[0\]"),
    (cumulative(0, 0, 6, 6)[::2], ValueError, "must be contiguous"),
    (cumulative(0, 6).to("meta"), ValueError, "must be on q's device cpu, got meta"),
    (cumulative(1, 6), ValueError, r"must not decrease and lead from 0 to the number of tokens 6, got \[1, 6\]"),
    (cumulative(0, 5), ValueError, r"must not decrease and lead from 0 to the number of tokens 6, got \[0, 5\]"),
    (cumulative(0, 7), ValueError, r"must not decrease and lead from 0 to the number of tokens 6, got \[0, 7\]"),
    (cumulative(0, 4, 2, 6), ValueError, "must not decrease and lead from 0 to the number of tokens 6"),
    (cumulative(0, -(2**40), 6, dtype=torch.int64), ValueError, "must not decrease"),
]


def ids(value):
    return value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_RULE, ids=ids)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_rule(needs_grad, name, value, error, text):
    arguments = {**GOOD, "v": GOOD["v"].clone().requires_grad_(needs_grad), name: value}
    with pytest.raises(error, match=rf"^gated_delta_rule: {name} {text}"):
        inlay.gated_delta_rule(**arguments)


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_STEP, ids=ids)
def test_step(name, value, error, text):
    with pytest.raises(error, match=rf"^gated_delta_step: {name} {text}"):
        inlay.gated_delta_step(**{**GOOD, "state": STATE, name: value})


@pytest.mark.parametrize("tokens", [0, 17])
def test_step_of_no_or_many_tokens(tokens):
    arguments = {name: tensor[:, :1].expand(-1, tokens, *tensor.shape[2:]) for name, tensor in GOOD.items()}
    with pytest.raises(ValueError, match=f"gated_delta_step: q must have 1 to 16 tokens, got {tokens}"):
        inlay.gated_delta_step(**arguments, state=STATE)


@pytest.mark.parametrize(("offsets", "error", "text"), BAD_OFFSETS, ids=ids)
def test_offsets(offsets, error, text):
    with pytest.raises(error, match=f"^gated_delta_rule: cu_seqlens {text}"):
        inlay.gated_delta_rule(**PACKED, cu_seqlens=offsets)


def test_offsets_with_a_batch():
    with pytest.raises(ValueError, match="gated_delta_rule: q must have a batch of 1 with cu_seqlens, got 2"):
        inlay.gated_delta_rule(**GOOD, cu_seqlens=cumulative(0, 6))


def test_a_state_for_each_batch_row_of_packed_sequences():
    with pytest.raises(ValueError, match=r"initial_state must have shape \[3, 4, 16, 24\]"):
        inlay.gated_delta_rule(**PACKED, cu_seqlens=cumulative(0, 2, 4, 6), initial_state=STATE[:1])


LAYER = LayerCase(tokens=T, batch=B, key_heads=HK, value_heads=HV, key_dim=K, value_dim=V).inputs(torch.float32)
C = 2 * HK * K + HV * V
BAD_LAYER = [
    ("mixed_qkv", None, TypeError, "must be a Tensor, got NoneType"),
    ("mixed_qkv", ones(B, C), ValueError, r"must have shape \[B, T, C\], got \[2, 160\]"),
    ("mixed_qkv", ones(B, T, C + 1), ValueError, r"must have 2 Hk K \+ Hv V = 160 channels, got 161"),
    ("mixed_qkv", ones(B, 17, C), ValueError, "must have 1 to 16 tokens, got 17"),
    ("mixed_qkv", ones(B, 0, C), ValueError, "must have 1 to 16 tokens, got 0"),
    ("mixed_qkv", ones(B, T, C).long(), ValueError, "must be float32"),
    ("z", ones(B, T, HV * V), ValueError, r"must have shape \[B, T, Hv, V\] with mixed_qkv's B and T"),
    ("z", ones(B, T, HV, V).half(), ValueError, r"must be float32, got torch\.float16"),
    ("z", ones(B, T, HV, 12), ValueError, "must have a multiple of 8 up to 256 as V, got 12"),
    ("z", ones(B, T, V, HV).transpose(2, 3), ValueError, "must have stride 1 in its last dimension"),
    ("a", ones(B, T, HK), ValueError, r"must have shape \[2, 6, 4\] \(B, T, Hv\), got \[2, 6, 2\]"),
    ("a", ones(B, T, HV).double(), ValueError, "must be .*, got torch.float64"),
    ("a", ones(B, HV, T).transpose(1, 2), ValueError, "must have stride 1 in its last dimension"),
    ("b", ones(B, T, HV).half(), ValueError, r"must be float32, got torch\.float16"),
    ("b", ones(B, T, HV, device="meta"), ValueError, "must be on mixed_qkv's device cpu, got meta"),
    ("conv_weight", ones(C, 2, 4), ValueError, r"must have shape \[160, W\] or \[160, 1, W\] \(mixed_qkv's channels\)"),
    ("conv_weight", ones(C, 9), ValueError, "must be 2 to 8 wide, got 9"),
    ("conv_weight", ones(4, C).T, ValueError, "must be contiguous"),
    ("conv_bias", ones(C - 1), ValueError, r"must have shape \[160\] \(mixed_qkv's width\), got \[159\]"),
    ("A_log", ones(HK), ValueError, r"must have shape \[4\] \(a's width\), got \[2\]"),
    ("dt_bias", None, TypeError, "must be a Tensor, got NoneType"),
    ("norm_weight", ones(K), ValueError, r"must have shape \[24\] \(z's width\), got \[16\]"),
    ("conv_state", ones(B, C, 2), ValueError, r"must have shape \[2, 160, L\] with L at least 3, got \[2, 160, 2\]"),
    ("conv_state", ones(B + 1, C, 4), ValueError, r"must have shape \[2, 160, L\] with L at least 3"),
    ("conv_state", ones(B, C, 4).half(), ValueError, r"must be float32, got torch\.float16"),
    ("conv_state", ones(1, C, 4).expand(B, -1, -1), ValueError, "must not overlap itself"),
    ("state", ones(B, HV, 12, V), ValueError, "must have a multiple of 8 up to 256 as K of .*, got 12"),
    ("state", ones(B, HK, K, V), ValueError, r"must have shape \[2, 4, 16, 24\] \(B, Hv, K, V\), got \[2, 2, 16, 24\]"),
    ("state", ones(B, HV, K, V).half(), ValueError, r"must be float32 or bfloat16, got torch\.float16"),
    ("state", ones(1, HV, K, V).expand(B, -1, -1, -1), ValueError, "must not overlap itself"),
    ("states_out", ones(B, 1, HV, K, V), ValueError, r"must have shape \[2, 6, 4, 16, 24\] \(B, T, Hv, K, V\)"),
    ("states_out", ones(B, T, HV, K, V).bfloat16(), ValueError, r"must be float32, got torch\.bfloat16"),
    ("states_out", ones(T, B, HV, K, V).transpose(0, 1), ValueError, "must be contiguous"),
    ("key_heads", 3, ValueError, "must divide z's heads 4, got 3"),
    ("key_heads", 0, ValueError, "must divide z's heads 4, got 0"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_LAYER, ids=ids)
def test_layer_step(name, value, error, text):
    with pytest.raises(error, match=rf"^gdn_layer_step: {name} {text}"):
        inlay.gdn_layer_step(**{**LAYER, "key_heads": HK, name: value})


GATES = {"a": torch.randn(B, T, HV), "b": torch.randn(B, T, HV), "A_log": torch.randn(HV), "dt_bias": torch.randn(HV)}


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("a", None, TypeError, "must be a Tensor, got NoneType"),
        ("a", ones(B, T, HV).long(), ValueError, "must be float32"),
        ("b", ones(B, T), ValueError, r"must have a's shape \[2, 6, 4\], got \[2, 6\]"),
        ("b", ones(B, T, HV).double(), ValueError, r"must be .*, got torch\.float64"),
        ("A_log", None, TypeError, "must be a Tensor, got NoneType"),
        ("A_log", ones(HK), ValueError, r"must have shape \[4\] \(a's width\), got \[2\]"),
        ("dt_bias", ones(HV).double(), ValueError, r"must be .* for torch\.float32 a, got torch\.float64"),
        ("dt_bias", ones(HV, device="meta"), ValueError, "must be on a's device cpu, got meta"),
        ("beta_dtype", torch.float64, ValueError, r"must be .*, got torch\.float64"),
    ],
    ids=ids,
)
def test_gates(name, value, error, text):
    with pytest.raises(error, match=f"^gdn_gates: {name} {text}"):
        inlay.gdn_gates(**{**GATES, name: value})


def test_meta_tensors_give_meta_results():
    meta = {name: tensor.to("meta") for name, tensor in GOOD.items()}
    o, final_state = inlay.gated_delta_rule(**meta, output_final_state=True)
    assert (o.device.type, o.shape, final_state.shape) == ("meta", GOOD["v"].shape, STATE.shape)


# The raw ops: a safety net for whoever calls them past the public functions.
RULE = {
    **GOOD, "initial_state": STATE, "cu_seqlens": None, "scale": 1.0, "l2norm_qk": False, "output_final_state": True,
    "state_dtype": torch.float32, "mode": 0,
}  # fmt: skip
BACKWARD = {
    "dout": torch.randn(B, T, HV, V), "dfinal_state": STATE, **GOOD, "initial_state": STATE, "cu_seqlens": None,
    "scale": 1.0, "l2norm_qk": False, "needs_dinitial_state": True,
}  # fmt: skip
STEP = {**GOOD, "state": STATE, "states_out": None, "scale": 1.0, "l2norm_qk": False}
GATE_OP = {**GATES, "beta_scale": 1.0, "beta_dtype": torch.float32}
GATE_BACKWARD = {
    "dg": torch.randn(B, T, HV), "dbeta": torch.randn(B, T, HV), **GATES, "beta_scale": 1.0, "needs_vectors": True,
}  # fmt: skip
LAYER_OP = {**LAYER, "states_out": None, "key_heads": HK, "eps": 1e-6, "beta_scale": 1.0}
ONE_ROW = {**PACKED, "initial_state": None}
RAW = [
    ("gated_delta_rule", RULE, {"q": ones(B, T, HK * K)}, r"q must have shape \[B, T, Hk, K\]"),
    ("gated_delta_rule", RULE, {"k": ones(B, T, HK, 8)}, "k must have q's shape"),
    ("gated_delta_rule", RULE, {"k": ones(B, T, HK, K).half()}, "k must be float32, got float16"),
    ("gated_delta_rule", RULE, {"v": ones(B, T, 3, V)}, "v must have a multiple of q's heads 2, got 3"),
    ("gated_delta_rule", RULE, {"v": ones(B, T, HV, 4)}, "v must have a multiple of 8 up to 256"),
    ("gated_delta_rule", RULE, {"v": ones(B, T, V, HV).transpose(2, 3)}, "v must have stride 1 in its last dimension"),
    ("gated_delta_rule", RULE, {"g": ones(B, T, HK)}, r"g must have shape \[2, 6, 4\] \(B, T, Hv\), got \[2, 6, 2\]"),
    ("gated_delta_rule", RULE, {"g": ones(B, T, HV).half()}, "g must be float32, got float16"),
    ("gated_delta_rule", RULE, {"beta": ones(B, T, HV).half()}, "beta must be float32, got float16"),
    ("gated_delta_rule", RULE, {"initial_state": ones(1, HV, K, V)}, r"initial_state must have shape \[2, 4, 16, 24\]"),
    ("gated_delta_rule", RULE, {"initial_state": STATE.half()}, "initial_state must be float32 or bfloat16"),
    ("gated_delta_rule", RULE, {"initial_state": TRANSPOSED}, "initial_state must have "),
    ("gated_delta_rule", RULE, {"state_dtype": torch.float16}, "state_dtype must be float32 or bfloat16"),
    ("gated_delta_rule", RULE, {"mode": 3}, "mode must be 0 to 2, got 3"),
    ("gated_delta_rule", RULE, {"cu_seqlens": cumulative(0, 6)}, "q must have a batch of 1 with cu_seqlens, got 2"),
    ("gated_delta_rule", RULE, {**ONE_ROW, "cu_seqlens": cumulative(0, 6).half()}, "cu_seqlens must be int32 or int64"),
    ("gated_delta_rule", RULE, {**ONE_ROW, "cu_seqlens": cumulative()}, r"cu_seqlens must have shape \[N \+ 1\]"),
    ("gated_delta_rule_bwd", BACKWARD, {"dout": ones(B, T, HV, K)}, "dout must have v's shape"),
    ("gated_delta_rule_bwd", BACKWARD, {"dout": ones(B, T, HV, V).half()}, "dout must be float32, got float16"),
    ("gated_delta_rule_bwd", BACKWARD, {"dfinal_state": ones(B, HV, V, K)}, "dfinal_state must have shape"),
    ("gated_delta_rule_bwd", BACKWARD, {"initial_state": None}, "initial_state must be given when its gradient is"),
    ("gated_delta_step", STEP, {"state": torch.randn(B, 2 * HV, K, V)[:, ::2]}, "state must not overlap itself"),
    ("gated_delta_step", STEP, {"state": STATE.half()}, "state must be float32 or bfloat16"),
    ("gated_delta_step", STEP, {"states_out": ones(B, T, HV, K, V).half()}, "states_out must be float32, got float16"),
    ("gated_delta_step", STEP, {"states_out": ones(B, T, HV, V, K)}, "states_out must have shape"),
    ("gdn_layer_step", LAYER_OP, {"mixed_qkv": ones(B, T, C + 8)}, "mixed_qkv must have 2 Hk K"),
    ("gdn_layer_step", LAYER_OP, {"mixed_qkv": ones(B, 17, C)}, "mixed_qkv must have 1 to 16 tokens, got 17"),
    ("gdn_layer_step", LAYER_OP, {"z": ones(B, 1, HV, V)}, r"z must have shape \[B, T, Hv, V\]"),
    ("gdn_layer_step", LAYER_OP, {"key_heads": 3}, "key_heads must divide z's heads 4, got 3"),
    ("gdn_layer_step", LAYER_OP, {"b": ones(B, T, HV).half()}, "b must be float32, got float16"),
    ("gdn_layer_step", LAYER_OP, {"a": ones(B, T, HK)}, r"a must have shape \[2, 6, 4\] \(B, T, Hv\)"),
    ("gdn_layer_step", LAYER_OP, {"conv_weight": ones(C, 9)}, "conv_weight must be 2 to 8 wide, got 9"),
    ("gdn_layer_step", LAYER_OP, {"conv_bias": ones(C - 1)}, r"conv_bias must have shape \[160\]"),
    ("gdn_layer_step", LAYER_OP, {"conv_state": ones(B, C, 2)}, r"conv_state must have shape \[B, 160, L\]"),
    ("gdn_layer_step", LAYER_OP, {"conv_state": ones(B + 1, C, 4)}, "conv_state must have mixed_qkv's batch size 2"),
    ("gdn_layer_step", LAYER_OP, {"state": ones(B, HK, K, V)}, r"state must have shape \[2, 4, 16, 24\]"),
    ("gdn_layer_step", LAYER_OP, {"state": ones(B, HV, K, V).half()}, "state must be float32 or bfloat16"),
    ("gdn_layer_step", LAYER_OP, {"states_out": ones(B, T, HV, V, K)}, "states_out must have shape"),
    ("gdn_layer_step", LAYER_OP, {"norm_weight": ones(K)}, r"norm_weight must have shape \[24\]"),
    ("gdn_gates", GATE_OP, {"b": ones(B, T)}, "b must have a's shape"),
    ("gdn_gates", GATE_OP, {"A_log": ones(HK)}, r"A_log must have shape \[4\] \(a's width\), got \[2\]"),
    ("gdn_gates", GATE_OP, {"beta_dtype": torch.float64}, "beta_dtype must be float64 exactly when a is"),
    ("gdn_gates_bwd", GATE_BACKWARD, {"dg": ones(B, T)}, "dg must have a's shape"),
    ("gdn_gates_bwd", GATE_BACKWARD, {"dg": ones(B, T, HV).half()}, "dg must be float32, got float16"),
]


@pytest.mark.parametrize(("op", "good", "bad", "text"), RAW, ids=ids)
def test_raw_ops(op, good, bad, text, device):
    if op == "gated_delta_rule_bwd" and device == "cuda":
        pytest.skip("there it has no float32 kernel")

    def on_device(value):
        if not isinstance(value, torch.Tensor):
            return value
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)  # .to() would lose the strides

    raw = getattr(torch.ops.inlay, op)
    good = {name: on_device(value) for name, value in good.items()}
    raw(**good)
    with pytest.raises(RuntimeError, match=f"{op}: {text}"):
        raw(**{**good, **{name: on_device(value) for name, value in bad.items()}})


@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        (cumulative(1, 6), "start with 0, got 1"),
        (cumulative(0, 4, 2, 6), "not decrease, got 2 after 4"),
        (cumulative(0, 7), "end with the number of tokens 6, got 7"),
    ],
    ids=ids,
)
@pytest.mark.parametrize("op", ["gated_delta_rule", "gated_delta_rule_bwd"])
def test_raw_ops_look_at_offsets_on_the_cpu(op, offsets, text):
    arguments = dict(RULE if op == "gated_delta_rule" else BACKWARD)
    changes = {**ONE_ROW, "cu_seqlens": offsets}
    if op == "gated_delta_rule_bwd":
        changes |= {"dout": BACKWARD["dout"][:1], "dfinal_state": None, "needs_dinitial_state": False}
    with pytest.raises(RuntimeError, match=f"{op}: cu_seqlens must {text}"):
        getattr(torch.ops.inlay, op)(**{**arguments, **changes})


@pytest.mark.cuda
@pytest.mark.parametrize("offsets", [(1, 6), (0, 4, 2, 6), (0, 2**40), (-(2**40), 6)], ids=str)
def test_wrong_offsets_read_nothing_out_of_bounds_on_cuda(offsets, device):
    """There they are not looked at beforehand; results are then anything, but come from within the tensors."""
    if device != "cuda":
        pytest.skip("the CPU refuses them")
    arguments = {name: tensor.to(device) for name, tensor in PACKED.items()}
    inlay.gated_delta_rule(**arguments, cu_seqlens=cumulative(*offsets, dtype=torch.int64).to(device))
    torch.cuda.synchronize()
