"""Every family: what is patched, and that the patched model computes what the unpatched one does."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch

import inlay
from tests.hf.compare import assert_same_rounding, assert_same_values, gradients, relative_error
from tests.hf.models import LANGUAGE_MODELS, language_model, tokens

pytest.importorskip("transformers")
families = pytest.mark.parametrize("family", LANGUAGE_MODELS)


@families
def test_finds_every_module(family: str) -> None:
    report = inlay.patch(language_model(family))
    assert Counter(entry.op for entry in report.patched) == LANGUAGE_MODELS[family][2]
    left = {entry.cls for entry in report.unpatched}
    assert left == ({"OlmoeAttention"} if family == "olmoe" else set())  # whose norms are over all heads at once


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_norm_rounds_as_the_original(family: str, device: str, dtype: torch.dtype) -> None:
    model = language_model(family, device, dtype)
    seen: dict[str, tuple] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, path=path: seen.update({path: (inputs, output)}))
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
    ]
    with torch.no_grad():
        model(tokens(model, batch=4, length=24))
        for hook in hooks:
            hook.remove()
        inlay.patch(model, strict=True)
        for path, (inputs, output) in seen.items():
            assert_same_rounding(model.get_submodule(path)(*inputs), output, path)
    ran = {entry.path for entry in inlay.report(model).patched if entry.calls}
    assert ran == seen.keys()


@families
def test_logits_and_hidden_states(family: str, device: str, dtype: torch.dtype) -> None:
    model = language_model(family, device, dtype)
    ids = tokens(model)
    options = {"output_hidden_states": True}
    if hasattr(model.config, "output_router_logits"):
        options["output_router_logits"] = True
    expected = model(ids, **options)
    report = inlay.patch(model, strict=True)
    actual = model(ids, **options)
    assert_same_values(actual.logits, expected.logits, "logits")
    for index, (ours, theirs) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_same_values(ours, theirs, f"hidden state {index}")
    routers = getattr(expected, "router_logits", None) or ()
    assert bool(routers) == ("output_router_logits" in options)
    for ours, theirs in zip(getattr(actual, "router_logits", ()) if routers else (), routers, strict=True):
        assert_same_values(ours, theirs, "router logits")
    assert report.calls == 0
    idle = [entry.path for entry in inlay.report(model).entries if not entry.calls]
    # The norm after the residual add runs within its layer's op, those of queries and keys within the rotation's.
    # And experts beside a shared one within their block's.
    within = ("post_attention_layernorm", "pre_feedforward_layernorm", "q_norm", "k_norm", "experts")
    if device == "cuda":  # which may have no kernel for attention
        within += ("self_attn",)
    assert all(path.endswith(within) or path in {entry.path for entry in report.unpatched} for path in idle)


@families
def test_gradients(family: str, device: str, dtype: torch.dtype) -> None:
    model = language_model(family, device, dtype)
    ids = tokens(model)
    truth = gradients(deepcopy(model).float(), ids)
    eager = relative_error(gradients(model, ids), truth)
    inlay.patch(model, strict=True)
    patched = relative_error(gradients(model, ids), truth)
    floor = 2e-2 if dtype == torch.bfloat16 else 1e-3

    def allowed(name: str) -> float:
        # Of a few values, such as A_log's, each is a sum of everything in bfloat16, and its error is a matter of luck.
        luck = 0.3 if dtype == torch.bfloat16 and truth[name].numel() < 64 else 0
        return max(2 * eager[name], floor) + luck

    worse = {name: (patched[name], eager[name]) for name in eager if patched[name] > allowed(name)}
    assert not worse, f"relative errors, patched and eager: {worse}"


@families
def test_greedy_tokens(family: str, device: str, dtype: torch.dtype) -> None:
    model = language_model(family, device, dtype)
    ids = tokens(model, length=5)
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    inlay.patch(model, strict=True)
    actual = model.generate(ids, **options)
    for row, (ours, theirs) in enumerate(zip(actual.sequences, expected.sequences, strict=True)):
        parted = (ours != theirs).nonzero().flatten().tolist()
        if parted:  # where rounding decides
            assert device == "cuda" or dtype != torch.float32
            scores = expected.scores[parted[0] - ids.shape[1]][row].float()
            gap = scores[theirs[parted[0]]] - scores[ours[parted[0]]]
            assert gap <= 4 * torch.finfo(dtype).eps * scores.abs().max()
            return
    assert_same_values(torch.stack(actual.scores), torch.stack(expected.scores), "scores", dtype)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(family: str, cache: str, device: str) -> None:
    import transformers

    model = language_model(family, device, torch.bfloat16)
    ids = tokens(model)
    contents = []
    for patched in (False, True):
        if patched:
            inlay.patch(model, strict=True)
        if cache == "dynamic":
            past = transformers.DynamicCache(config=model.config)
        else:
            past = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=past, use_cache=True)
            step = model(ids[:, -1:], past_key_values=past, use_cache=True).logits
        states = [value for layer in past.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        contents.append([step, *states])
    assert len(contents[0]) > 2
    for actual, expected in zip(contents[1], contents[0], strict=True):
        if expected.is_floating_point():
            assert_same_values(actual, expected, "cache")
        else:
            assert torch.equal(actual, expected)


def test_left_padding(device: str) -> None:
    model = language_model("qwen3_5", device)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    inlay.patch(model, strict=True)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, reentrant: bool, device: str) -> None:
    model = language_model(family, device).train()
    ids = tokens(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = gradients(model, ids, use_cache=False)
    inlay.patch(model, strict=True)
    actual = gradients(model, ids, use_cache=False)
    worst = max(relative_error(actual, expected).values())
    assert worst < 1e-3
    # Every layer ran twice: once forward, once recomputed in the backward.
    layers = [entry for entry in inlay.report(model).patched if entry.op == "add_rms_norm"]
    assert [entry.calls for entry in layers] == [2] * len(layers)


def test_autocast_training(device: str) -> None:
    """float32 weights under bfloat16 autocast: norms take bfloat16 and float32 rows, in one model."""
    model = language_model("qwen3", device).train()
    ids = tokens(model)
    with torch.autocast(device, torch.bfloat16):
        expected_logits = model(ids).logits
        expected = gradients(model, ids)
        inlay.patch(model)
        actual_logits = model(ids).logits
        actual = gradients(model, ids)
    assert_same_values(actual_logits, expected_logits, "logits")
    assert max(relative_error(actual, expected).values()) < 2e-2
    report = inlay.report(model)
    assert sum(entry.calls for entry in report.patched if entry.op == "rms_norm") > 0
    reasons = set(report.fallbacks)
    assert reasons == {
        "post_attention_layernorm: the residual and the sublayer's output differ in dtype, shape or device"
    }


def test_vision_language_model(device: str, dtype: torch.dtype) -> None:
    import transformers

    text = {**LANGUAGE_MODELS["qwen3_5"][1], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=5)
    from tests.hf.models import settled

    model = settled(transformers.Qwen3_5ForConditionalGeneration(config), device, dtype)
    ids = torch.tensor([[7, 5, 5, 5, 5, 8]], device=device)
    inputs = {
        "pixel_values": torch.randn(16, 3 * 4 * 4, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 4, 4]], device=device),
        "mm_token_type_ids": (ids == 5).int(),
    }
    expected = model(ids, **inputs).logits
    report = inlay.patch(model, strict=True)
    assert Counter(entry.op for entry in report.patched)["layer_norm"] == 5
    assert_same_values(model(ids, **inputs).logits, expected, "logits")
