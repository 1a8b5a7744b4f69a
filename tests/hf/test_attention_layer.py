"""Whole attention layers, patched against unpatched: masks, caches, norms, autocast, and what patching leaves behind.

Logits, gradients and tokens of the models they are in: test_language_models.py. Masks: test_attention_registry.py.
"""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf import masks
from tests.hf.attention_models import MODELS
from tests.hf.compare import assert_same_values, gradients, relative_error
from tests.hf.models import tokens
from tests.hf.test_attention_registry import decoder, families

transformers: Any = pytest.importorskip("transformers")
ONLY = ["attention_layer"]
QK_NORMS = ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma3"]


def patched(model: nn.Module, **options: Any) -> Any:
    copy: Any = deepcopy(model)
    inlay.patch(copy, ONLY, **options)
    return copy


def layers(model: nn.Module) -> list[Any]:
    """The attention layers."""
    return [
        module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "num_key_value_groups")
    ]


def calls(model: nn.Module) -> list[int]:
    return [entry.calls for entry in inlay.report(model).patched]


def assert_no_fallbacks(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "cpu":
        assert not inlay.report(model).fallbacks


@families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(family: str, side: str, device: str) -> None:
    model = decoder(family, device)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    ours = patched(model)
    actual, expected = (m(ids, attention_mask=mask).logits * mask[..., None] for m in (ours, model))
    assert_same_values(actual, expected, "logits")
    assert calls(ours) == [1] * len(layers(ours))
    assert_no_fallbacks(ours)


@families
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_prefill_in_pieces_then_decoding(family: str, kind: str, device: str) -> None:
    model = decoder(family, device)
    ids = tokens(model, length=14)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ours, results = patched(model), []
    for each in (ours, model):
        cache = (
            transformers.DynamicCache(config=model.config)
            if kind == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=20)
        )
        logits, end = [], 0
        for piece in ids.split([5, 4, 1, 1, 3], dim=1):
            end += piece.shape[1]
            logits.append(each(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
        # Of the row without padding: queries without keys have results, which are what an implementation makes of them.
        keys = [layer.keys[1] for layer in cache.layers if getattr(layer, "keys", None) is not None]
        results.append((torch.cat(logits, 1) * mask[..., None], *keys))
    for actual, expected in zip(*results, strict=True):
        assert_same_values(actual, expected, "logits, or keys of a cache")
    assert_no_fallbacks(ours)


@families
def test_gradients(family: str, device: str) -> None:
    """In training, recomputed in the backward."""
    model = decoder(family, device).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    ours = patched(model)
    expected = gradients(model, ids, attention_mask=mask, use_cache=False)
    actual = gradients(ours, ids, attention_mask=mask, use_cache=False)
    assert max(relative_error(actual, expected).values()) < 1e-3
    assert calls(ours) == [2] * len(layers(ours))
    assert_no_fallbacks(ours)


@families
def test_bfloat16_is_as_exact_as_before(family: str, device: str) -> None:
    model = decoder(family, device)
    ids = tokens(model, batch=4, length=24)
    with torch.no_grad():
        exact = model(ids).logits
        model.bfloat16()
        eager, ours = model(ids).logits.float(), patched(model)(ids).logits.float()
    assert (ours - exact).norm() <= 1.5 * (eager - exact).norm()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "gpt_oss"])
def test_autocast_training(family: str, device: str) -> None:
    """float32 weights under bfloat16 autocast: queries and keys are rotated in 16 bits.

    Errors are of several models together: in some the sum over tokens that a router's bias has for a gradient cancels
    to a hundredth of its terms, and nothing can be said of what is left of it in 16 bits.
    """
    truth, eager, actual = [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = decoder(family, device).train()
        ids = tokens(model)
        ours = patched(model)
        truth.append(gradients(model, ids))
        with torch.autocast(device, torch.bfloat16):
            eager.append(gradients(model, ids))
            actual.append(gradients(ours, ids))
        assert_no_fallbacks(ours)
        assert all(calls(ours))
    together = [
        {name: torch.stack([each[name] for each in found]) for name in found[0]} for found in (truth, eager, actual)
    ]
    errors, allowed = (relative_error(found, together[0]) for found in (together[2], together[1]))
    assert not {name: (errors[name], allowed[name]) for name in errors if errors[name] > 2 * allowed[name] + 1e-2}


def test_packed_sequences(device: str) -> None:
    model = decoder("gpt_oss", device)
    ids = tokens(model, batch=1, length=17)
    ends = torch.tensor([0, 6, 7, 17], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in (6, 1, 10)])[None].to(device)
    ours = patched(model)
    actual = ours(ids, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False).logits
    expected = torch.cat([model(piece, use_cache=False).logits for piece in ids.split([6, 1, 10], dim=1)], 1)
    assert_same_values(actual, expected, "logits")
    assert_no_fallbacks(ours)


@pytest.mark.parametrize("family", QK_NORMS)
@torch.no_grad()
def test_norms_are_fused_with_the_rotation(family: str, device: str) -> None:
    """Their modules are not called; unless something else belongs to them, which then runs."""
    model = decoder(family, device)
    ids = tokens(model)
    expected = model(ids).logits
    inlay.patch(model)
    assert_same_values(model(ids).logits, expected, "logits")
    count = {entry.path: entry.calls for entry in inlay.report(model).patched if entry.path.endswith("_norm")}
    assert {calls for path, calls in count.items() if path.endswith(("q_norm", "k_norm"))} == {0}
    seen: list[str] = []
    layer = layers(model)[0]
    layer.k_norm.register_forward_hook(lambda *_: seen.append("k_norm"))
    assert_same_values(model(ids).logits, expected, "logits, with a hook")
    assert seen == ["k_norm"]


@torch.no_grad()
def test_projections_stay_modules(device: str) -> None:
    model = decoder("llama", device)
    ids = tokens(model)
    inlay.patch(model, ONLY)
    seen: list[str] = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layers(model)[1], name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(ids)
    assert sorted(seen) == ["k_proj", "o_proj", "q_proj", "v_proj"]


@torch.no_grad()
def test_an_image_model(device: str) -> None:
    """Its text model's layers are patched, and get ranges of keys; its vision tower keeps its own attention."""
    torch.manual_seed(0)
    model, inputs, mask = MODELS["gemma3"](transformers)
    model = model.to(device).eval()
    inputs = {key: value.to(device) for key, value in inputs.items()}
    expected = model(**inputs).logits
    report = inlay.patch(model, ONLY)
    assert {entry.cls for entry in report.patched} == {"Gemma3Attention"}
    seen: list[Tensor] = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    kept = mask[..., None].to(device)
    assert_same_values(model(**inputs).logits * kept, expected * kept, "logits")
    shown = [mask for mask in seen if mask is not None and masks.is_ranges(mask)]
    assert len(shown) == len(report.patched)
    assert model.config.vision_config._attn_implementation == "sdpa"
    inlay.unpatch(model)
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@families
@torch.no_grad()
def test_masks_of_other_implementations(family: str, implementation: str, device: str) -> None:
    """Whoever sets another one after patching gets its masks, and the patched layers understand them."""
    if family in ("gpt_oss", "gemma2") and implementation == "sdpa":
        pytest.skip("sdpa has no sinks, and no softcap")
    model = decoder(family, device)
    ids = tokens(model, length=9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ours = patched(model)
    for each in (model, ours):
        each.config._attn_implementation = implementation
    for cache in ("DynamicCache", "StaticCache"):
        caches = [
            getattr(transformers, cache)(
                config=model.config, **({"max_cache_len": 12} if cache == "StaticCache" else {})
            )
            for _ in range(2)
        ]
        for begin, end in ((0, 5), (5, 8), (8, 9)):
            expected, actual = (
                each(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past).logits
                for each, past in zip((model, ours), caches, strict=True)
            )
            kept = mask[:, begin:end, None]
            assert_same_values(actual * kept, expected * kept, f"logits, {cache}")
    assert_no_fallbacks(ours)


def test_the_configuration_names_inlay_and_is_restored() -> None:
    model = decoder("gemma2")
    model.set_attn_implementation("eager")
    inlay.patch(model)
    assert model.config._attn_implementation == "inlay"
    assert "attn_implementation" not in model.config.to_json_string()
    copy = deepcopy(model)
    inlay.unpatch(model)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "eager"
    assert copy.config._attn_implementation == "inlay"
    inlay.unpatch(copy)
    assert copy.config._attn_implementation == "eager"


def test_a_name_set_after_patching_stays() -> None:
    model = decoder("llama")
    inlay.patch(model)
    model.set_attn_implementation("eager")
    inlay.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_had_the_name_keeps_it() -> None:
    model = decoder("llama")
    model.set_attn_implementation("inlay")
    with inlay.patched(model):
        assert model.config._attn_implementation == "inlay"
    assert model.config._attn_implementation == "inlay"


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@torch.no_grad()
def test_a_pickled_model_knows_nothing_of_inlay(how: str) -> None:
    model = decoder("qwen3")
    ids = tokens(model)
    expected = model(ids).logits
    inlay.patch(model)
    model(ids)
    if how == "pickle":
        data = pickle.dumps(model)
        loaded = pickle.loads(data)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        data = buffer.getvalue()
        loaded = torch.load(io.BytesIO(data), weights_only=False)
    assert b"inlay.hf" not in data
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, expected)
    assert model.config._attn_implementation == "inlay"
    model.set_attn_implementation("eager")
    assert pickle.loads(pickle.dumps(model)).config._attn_implementation == "eager"


@torch.no_grad()
def test_copies_run_on_their_own_weights() -> None:
    model = decoder("qwen3_5")
    ids = tokens(model)
    inlay.patch(model, strict=True)
    copy = deepcopy(model)
    expected = model(ids).logits
    for layer in layers(copy):
        layer.v_proj.weight.zero_()
    assert not torch.allclose(copy(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert sum(calls(copy)) < sum(calls(model))
    inlay.unpatch(copy)
    assert not any("forward" in vars(module) for module in copy.modules())
    assert_same_values(model(ids).logits, expected, "logits of the one still patched")


@pytest.mark.parametrize("family", ["qwen3_5", "mistral", "gemma2"])
def test_compiled(family: str, device: str) -> None:
    """One graph without padding or with it, in inference and in training."""
    whole = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    model = decoder(family, device, **(whole if family == "qwen3_5" else {}))
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    ours = patched(model, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, actual = (each(ids, attention_mask=mask).logits * mask[..., None] for each in (model, compiled))
    assert_same_values(actual, expected, "logits")
    theirs, got = (
        torch.autograd.grad(logits.square().sum(), layers(each)[0].q_proj.weight)[0]
        for logits, each in ((expected, model), (actual, ours))
    )
    assert (got - theirs).norm() <= 1e-4 * theirs.norm()


def test_generation_with_a_compiled_static_cache(device: str) -> None:
    """As ``generate`` compiles by itself where there is a GPU: masks are made before, and are inputs of the graph."""
    model = decoder("llama", device)
    ids = tokens(model, length=5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "attention_mask": mask}
    expected = model.generate(ids, **options, disable_compile=True)
    inlay.patch(model, strict=True)
    torch.compiler.reset()
    compiled = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
    compiled._compile_all_devices = True
    assert torch.equal(model.generate(ids, **options, compile_config=compiled), expected)
