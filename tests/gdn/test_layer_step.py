"""Is a layer's step what its parts compute one after another, and what Hugging Face's layer computes?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import inlay
from inlay import reference
from tests.gdn.layer_cases import CASES, STATES, LayerCase, Tensors, with_own_states
from tests.support.compare import assert_matches_eager, assert_same_bits, assert_within_budget
from tests.support.devices import HALVES
from tests.support.on_cuda import capture

OP = "gdn_layer_step"


def widened(tensors: Tensors) -> Tensors:
    return {name: tensor if tensor is None else tensor.double() for name, tensor in tensors.items()}


def parts(case: LayerCase, t: Tensors) -> torch.Tensor:
    """The same by our other ops."""
    convolved = inlay.causal_conv1d_step(
        t["mixed_qkv"], t["conv_state"], t["conv_weight"], t["conv_bias"], activation="silu"
    )
    keys = case.key_heads * case.key_dim
    q, k, v = convolved.split([keys, keys, case.value_heads * case.value_dim], -1)
    q, k = (x.unflatten(-1, (case.key_heads, case.key_dim)) for x in (q, k))
    g, beta = inlay.gdn_gates(t["a"], t["b"], t["A_log"], t["dt_bias"], beta_scale=case.beta_scale)
    v = v.unflatten(-1, (case.value_heads, case.value_dim))
    o = inlay.gated_delta_step(q, k, v, g, beta, t["state"], l2norm_qk=True)
    return inlay.gated_rms_norm(o, t["z"], t["norm_weight"], eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, tokens, dtype, device):
    case = dataclasses.replace(case, tokens=tokens)
    tensors = case.inputs(dtype, device)
    results = []
    for namespace, given in ((inlay, tensors), (reference, tensors), (reference, widened(tensors))):
        own = with_own_states(given)
        results.append((case.run(namespace, own), own["state"], own["conv_state"]))
    for name, actual, eager, exact in zip(("y", "state"), *results, strict=False):
        assert_within_budget(actual, eager, exact, name, terms=exact.abs().max().item())
    assert_same_bits(results[0][2], results[1][2], "conv_state")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_its_parts(case, tokens, dtype, device):
    """In every bit but for what another order of float32 sums leaves."""
    case = dataclasses.replace(case, tokens=tokens)
    tensors = case.inputs(dtype, device)
    own, expected = with_own_states(tensors), with_own_states(tensors)
    y, wanted = case.run(inlay, own), parts(case, expected)
    if device == "cpu":
        assert_same_bits(y, wanted, "y")
        assert_same_bits(own["state"], expected["state"], "state")
    else:
        assert_matches_eager(y, wanted, "y", share=0.97, ulps=None)
        torch.testing.assert_close(own["state"], expected["state"], rtol=1e-4, atol=1e-5)
    assert_same_bits(own["conv_state"], expected["conv_state"], "conv_state")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_call_is_several(case, state_dtype, device):
    """Tokens of one call and calls of one token; a bfloat16 state is rounded once a call."""
    case = dataclasses.replace(case, tokens=6)
    tensors = case.inputs(torch.bfloat16, device, state_dtype)
    own = with_own_states(tensors)
    y = case.run(inlay, own)
    if state_dtype == torch.bfloat16:
        wide = with_own_states({**tensors, "state": tensors["state"].float()})
        assert_same_bits(y, case.run(inlay, wide), "y")
        assert_same_bits(own["state"], wide["state"].bfloat16(), "state")
        return
    single = with_own_states(tensors)
    for token in range(6):
        one = {
            name: t[:, token : token + 1] if name in ("mixed_qkv", "z", "a", "b") else t for name, t in single.items()
        }
        assert_same_bits(case.run(inlay, one), y[:, token : token + 1], f"token {token}")
    for name in STATES:
        assert_same_bits(own[name], single[name], name)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_of_every_token(case, state_dtype, device):
    """Those that calls of so many tokens leave; and asking for them changes nothing else."""
    case = dataclasses.replace(case, tokens=5)
    tensors = case.inputs(torch.bfloat16, device, state_dtype)
    own, plain = with_own_states(tensors), with_own_states(tensors)
    states_out = torch.full((case.batch, 5, *own["state"].shape[1:]), torch.nan, dtype=state_dtype, device=device)
    assert_same_bits(case.run(inlay, own, states_out=states_out), case.run(inlay, plain), "y")
    for name in STATES:
        assert_same_bits(own[name], plain[name], name)
    for token in range(5):
        first = with_own_states(
            {name: t[:, : token + 1] if name in ("mixed_qkv", "z", "a", "b") else t for name, t in tensors.items()}
        )
        case.run(inlay, first)
        assert_same_bits(states_out[:, token], first["state"], f"state after token {token}")


def test_states_of_every_token_at_any_address(device):
    case = dataclasses.replace(CASES[1], tokens=3)
    tensors = case.inputs(torch.bfloat16, device)
    shape = (case.batch, 3, *tensors["state"].shape[1:])
    expected = torch.empty(shape, device=device)
    case.run(inlay, with_own_states(tensors), states_out=expected)
    shifted = torch.empty(expected.numel() + 1, device=device)[1:].view(shape)
    case.run(inlay, with_own_states(tensors), states_out=shifted)
    assert_same_bits(shifted, expected, "states_out")


def test_slices_of_one_projection(device):
    case = CASES[0]
    tensors = with_own_states(case.inputs(torch.bfloat16, device))
    expected = with_own_states(tensors)
    wanted = case.run(inlay, expected)
    names = ("mixed_qkv", "z", "b", "a")
    flat = torch.cat([tensors[name].flatten(2) for name in names], -1)
    sizes = [tensors[name].flatten(2).shape[-1] for name in names]
    for name, part in zip(names, torch.nn.functional.pad(flat, (0, 3)).split([*sizes, 3], -1), strict=False):
        tensors[name] = part.unflatten(-1, tensors[name].shape[2:]) if name == "z" else part
    assert_same_bits(case.run(inlay, tensors), wanted, "y")
    for name in STATES:
        assert_same_bits(tensors[name], expected[name], name)


@pytest.mark.parametrize("layout", ["channels innermost", "a slice", "of a pool"])
def test_strided_states_are_updated_in_place(layout, device):
    case = dataclasses.replace(CASES[1], tokens=2)
    tensors = with_own_states(case.inputs(torch.bfloat16, device))
    expected = with_own_states(tensors)
    wanted = case.run(inlay, expected)
    conv, state = tensors["conv_state"], tensors["state"]
    if layout == "channels innermost":
        tensors["conv_state"] = conv.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "a slice":
        tensors["conv_state"] = torch.cat([conv, conv], -1)[..., conv.shape[-1] :]
    else:
        tensors["conv_state"] = torch.stack([conv, conv], 1)[:, 1]
        tensors["state"] = torch.stack([state, state], 1)[:, 1]
    assert_same_bits(case.run(inlay, tensors), wanted, "y")
    for name in STATES:
        assert_same_bits(tensors[name], expected[name], name)


def test_flat_and_grouped_weights_are_the_same(device):
    case = CASES[0]
    tensors = case.inputs(torch.bfloat16, device)
    grouped = {**tensors, "conv_weight": tensors["conv_weight"][:, None]}
    y = case.run(inlay, with_own_states(tensors))
    assert_same_bits(case.run(inlay, with_own_states(grouped)), y, "y")


def test_no_sequences(device):
    case = LayerCase(batch=0)
    tensors = case.inputs(torch.float32, device)
    assert case.run(inlay, tensors).shape == (0, 1, 4, 32)


def test_float64():
    case = LayerCase(tokens=3, conv_bias=True)
    tensors = case.inputs(torch.float64)
    own, expected = with_own_states(tensors), with_own_states(tensors)
    torch.testing.assert_close(case.run(inlay, own), case.run(reference, expected))
    for name in STATES:
        torch.testing.assert_close(own[name], expected[name])


def test_nan_stays_in_its_heads(device):
    case = LayerCase(key_heads=2, value_heads=4)
    tensors = with_own_states(case.inputs(torch.bfloat16, device))
    tensors["mixed_qkv"][0, :, -1] = torch.nan  # of the last value head of the first sequence
    tensors["a"][1, :, 0] = torch.nan
    heads = case.run(inlay, tensors).isnan()[:, 0]
    wanted = torch.tensor([[False, False, False, True], [True, False, False, False]], device=device)
    assert torch.equal(heads.all(-1), wanted)
    assert torch.equal(heads.any(-1), wanted)


def test_runs_repeat(device):
    case = LayerCase(batch=5, key_heads=4, value_heads=8, key_dim=128, value_dim=128, tokens=2)
    tensors = case.inputs(torch.bfloat16, device)
    first = with_own_states(tensors)
    y = case.run(inlay, first)
    for _ in range(50):
        own = with_own_states(tensors)
        assert_same_bits(case.run(inlay, own), y, "y")
        for name in STATES:
            assert_same_bits(own[name], first[name], name)


@pytest.mark.parametrize("batch", [1, 3, 200])
def test_a_sequence_does_not_depend_on_the_others(batch, device):
    """Nor on how many there are, which decides how the work is shared out."""
    case = LayerCase(batch=batch, key_heads=2, value_heads=6, key_dim=16, value_dim=24)
    tensors = with_own_states(case.inputs(torch.bfloat16, device))
    shared = ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
    alone = {name: t if name in shared else t[-1:].clone() for name, t in tensors.items()}
    assert_same_bits(case.run(inlay, alone), case.run(inlay, tensors)[-1:], "y")
    for name in STATES:
        assert_same_bits(alone[name], tensors[name][-1:], name)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [LayerCase(), LayerCase(key_heads=16, value_heads=32, key_dim=128, value_dim=128)])
def test_in_a_cuda_graph(case):
    tensors = with_own_states(case.inputs(torch.bfloat16, "cuda"))
    expected = with_own_states(tensors)
    graph, y = capture(lambda: case.run(inlay, tensors), warm_up=lambda: case.run(inlay, with_own_states(tensors)))
    for _ in range(4):
        fresh = case.inputs(torch.bfloat16, "cuda")
        for name in ("mixed_qkv", "z", "a", "b"):
            tensors[name].copy_(fresh[name])
            expected[name].copy_(fresh[name])
        graph.replay()
        assert_same_bits(y, case.run(inlay, expected), "y")
        for name in STATES:
            assert_same_bits(tensors[name], expected[name], name)


@pytest.mark.parametrize("name", ["mixed_qkv", "norm_weight", "state"])
def test_a_wanted_gradient_is_refused(name, device):
    case = LayerCase()
    tensors = case.inputs(torch.float32, device)
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match="gdn_layer_step: no tensor must require gradients"):
        case.run(inlay, tensors)
    with torch.no_grad():
        case.run(inlay, tensors)


@pytest.mark.parametrize("name", [*STATES, "states_out"])
def test_autograd_notices_that_a_saved_state_was_changed(name, device):
    """The states' versions go up, as for any in-place operation."""
    case = LayerCase()
    tensors = case.inputs(torch.float32, device)
    written = {**tensors, "states_out": torch.zeros_like(tensors["state"])[:, None]}
    factor = torch.ones((), device=device, requires_grad=True)
    product = factor * written[name]
    case.run(inlay, written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", ["qwen3_5", "qwen3_next"])
def test_hugging_face_layer(model, dtype, device):
    """The decoding branch of the layer itself, kernels of other packages off: outputs and both states."""
    layer, cache, hidden, steps = _hugging_face_layer(model, dtype, device)
    with torch.no_grad():
        layer(hidden, cache_params=cache)
        ours = {"conv_state": cache.layers[0].conv_states, "state": cache.layers[0].recurrent_states}
        ours = {name: (t[0] if isinstance(t, (list, tuple, dict)) else t).clone() for name, t in ours.items()}
        for token in steps:
            wanted = _core_output(layer, token, cache)
            y = _our_output(model, layer, token, ours)
            if dtype == torch.bfloat16:
                assert_matches_eager(y, wanted, "y", share=0.98, ulps=None)
                torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.01)
            else:
                torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def _hugging_face_layer(model: str, dtype: torch.dtype, device: str):
    transformers = pytest.importorskip("transformers")
    import importlib

    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    if model == "qwen3_5":
        config, kind = transformers.Qwen3_5TextConfig(**sizes), modeling.Qwen3_5GatedDeltaNet
    else:
        config, kind = transformers.Qwen3NextConfig(**sizes), modeling.Qwen3NextGatedDeltaNet
    layer = kind(config, 0).to(device, dtype).eval()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.dt_bias)
    cache = transformers.DynamicCache(config=config)
    hidden = torch.randn(2, 9, 48, device=device).to(dtype)
    return layer, cache, hidden, torch.randn(4, 2, 1, 48, device=device).to(dtype)


def _core_output(layer: torch.nn.Module, token: torch.Tensor, cache: object) -> torch.Tensor:
    """What the layer gives to its output projection."""
    seen = []
    handle = layer.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(token, cache_params=cache)
    handle.remove()
    return seen[0]


def _our_output(model: str, layer: torch.nn.Module, token: torch.Tensor, states: Tensors) -> torch.Tensor:
    if model == "qwen3_5":
        z = layer.in_proj_z(token).unflatten(-1, (-1, layer.head_v_dim))
        mixed_qkv, b, a = layer.in_proj_qkv(token), layer.in_proj_b(token), layer.in_proj_a(token)
    else:
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(token), layer.in_proj_ba(token))
        mixed_qkv = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    y = inlay.gdn_layer_step(
        mixed_qkv, z, a, b, layer.conv1d.weight, layer.conv1d.bias, layer.A_log, layer.dt_bias, layer.norm.weight,
        states["conv_state"], states["state"], key_heads=layer.num_k_heads, eps=layer.layer_norm_epsilon,
    )  # fmt: skip
    return y.flatten(2)
