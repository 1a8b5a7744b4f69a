"""Models loaded with attn_implementation="inlay", without a patch: against the same models with their own attention."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hf.report import REGISTRY_OP
from tests.hf.attention_models import MODELS
from tests.hf.compare import assert_same_values, gradients, relative_error
from tests.hf.models import LANGUAGE_MODELS, language_model, tokens

transformers: Any = pytest.importorskip("transformers")
FAMILIES = [family for family in LANGUAGE_MODELS if family not in ("mixtral", "olmoe")]
families = pytest.mark.parametrize("family", FAMILIES)
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")


def decoder(family: str, device: str = "cpu", **overrides: Any) -> nn.Module:
    """With a window, where it has one, that is shorter than what it is given."""
    if family in WINDOWED:
        overrides = {"sliding_window": 4, **overrides}
    return language_model(family, device, **overrides)


def twin(model: nn.Module) -> Any:
    """The model with Inlay's attention."""
    copy: Any = deepcopy(model)
    copy.set_attn_implementation("inlay")
    for module in copy.modules():  # T5's stacks have configurations of their own, which older releases forget
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation = "inlay"
    return copy


def assert_served(model: nn.Module) -> None:
    """Every attention module has called the op, and has never fallen back."""
    entries = [entry for entry in inlay.report(model).entries if entry.op == REGISTRY_OP]
    assert entries
    if next(model.parameters()).device.type == "cpu":
        assert all(entry.calls and not entry.fallbacks for entry in entries)
        assert {entry.backend for entry in entries} == {"cpu"}


@families
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits(family: str, side: str, device: str) -> None:
    model = decoder(family, device)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    expected = model(ids, attention_mask=mask).logits
    ours = twin(model)
    assert_same_values(ours(ids, attention_mask=mask).logits * mask[..., None], expected * mask[..., None], "logits")
    assert_served(ours)


@pytest.fixture
def ordered_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' copies from an offloaded cache wait for those to it, and are waited for.

    Its stream for them starts a copy back before the copy to the host has ended (5.17; 5.23 waits), and the only
    offloaded layer of a model uses its keys before they are back (5.23 as well). A GPU that lags behind, as it does
    with tiny models, then reads keys that are not there, whichever attention runs.
    """
    prefetch = transformers.Cache.prefetch

    def ordered(cache: Any, *args: Any, **kwargs: Any) -> None:
        here = torch.cuda.current_stream()
        cache.prefetch_stream.wait_stream(here)
        prefetch(cache, *args, **kwargs)
        here.wait_stream(cache.prefetch_stream)

    monkeypatch.setattr(transformers.Cache, "prefetch", ordered)


@families
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@pytest.mark.usefixtures("ordered_prefetch")
def test_greedy_tokens(family: str, kind: str, device: str) -> None:
    """Padded on the left, beyond the window, with every kind of cache; sliding layers have sliding caches."""
    if kind == "offloaded" and device == "cpu":
        pytest.skip("offloads from a GPU")
    model = decoder(family, device)
    ids = tokens(model, length=7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    options["cache_implementation"] = kind
    expected = model.generate(ids, **options)
    ours = twin(model)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert_served(ours)


@families
@torch.no_grad()
def test_prefill_in_pieces(family: str, device: str) -> None:
    """With both caches: several tokens that go on with one are aligned to its end."""
    model = decoder(family, device)
    ours, ids = twin(model), tokens(model, length=14)
    for make in (
        lambda: transformers.DynamicCache(config=model.config),
        lambda: transformers.StaticCache(config=model.config, max_cache_len=20),
    ):
        theirs_cache, ours_cache = make(), make()
        for piece in ids.split([5, 4, 1, 4], dim=1):
            expected = model(piece, past_key_values=theirs_cache).logits
            assert_same_values(ours(piece, past_key_values=ours_cache).logits, expected, "logits")
    assert_served(ours)


@families
def test_gradients(family: str, device: str) -> None:
    model = decoder(family, device)
    ids = tokens(model)
    mask = torch.ones_like(ids)
    # Not on the left: there, queries without keys have results, which are what an implementation makes of them.
    mask[0, -4:] = 0
    expected = gradients(model, ids, attention_mask=mask)
    ours = twin(model)
    assert max(relative_error(gradients(ours, ids, attention_mask=mask), expected).values()) < 1e-3
    assert_served(ours)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("told_by", ["position_ids", "both"])
def test_packed_sequences(family: str, told_by: str, device: str) -> None:
    """Each sequence as if it were alone, in values and gradients."""
    model = decoder(family, device)
    ids = tokens(model, batch=1, length=17)
    lengths = [6, 1, 10]
    if told_by == "position_ids" and family == "gpt_oss":
        pytest.skip("transformers' gpt-oss makes its masks without them")
    packing: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device)}
    if told_by == "both":  # as transformers' collator for flash attention gives them, and with a cache
        ends = torch.tensor([0, 6, 7, 17], dtype=torch.int32, device=device)
        packing |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 10, "max_length_k": 10}
    ours = twin(model)
    for use_cache in (False, told_by == "both"):
        actual = ours(ids, **packing, use_cache=use_cache).logits
        expected = torch.cat([model(piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)], 1)
        assert_same_values(actual, expected, "logits")
        leaves = [parameter for parameter in ours.parameters() if parameter.dim() == 2]
        theirs = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        pairs = zip(
            torch.autograd.grad(actual.square().sum(), leaves, allow_unused=True),
            torch.autograd.grad(expected.square().sum(), theirs, allow_unused=True),
            strict=True,
        )
        for got, want in pairs:
            assert (got is None) == (want is None)
            assert want is None or (got - want).norm() <= 1e-4 * want.norm()
    assert_served(ours)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
@torch.no_grad()
def test_masks_of_four_dimensions(family: str, dtype: torch.dtype, device: str) -> None:
    """A user's own, for all heads."""
    model = decoder(family, device)
    ids = tokens(model)
    seen = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    seen = (seen | torch.eye(11, dtype=torch.bool, device=device)) & torch.ones_like(seen).tril()
    hidden = torch.finfo(torch.float32).min
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, hidden)
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = eager(ids, attention_mask=added).logits
    ours = twin(model)
    assert_same_values(ours(ids, attention_mask=seen if dtype == torch.bool else added).logits, expected, "logits")
    assert_served(ours)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_other_models(name: str, device: str) -> None:
    """Encoders, cross attention, biases of positions, chunks, prefixes and image blocks."""
    torch.manual_seed(0)
    model, inputs, mask = MODELS[name](transformers)
    model = model.to(device).eval()
    inputs = {key: value.to(device) for key, value in inputs.items()}
    expected = model(**inputs)[0]
    ours = twin(model)
    actual = ours(**inputs)[0]
    if mask is not None:
        actual, expected = (x * mask[..., None].to(device) for x in (actual, expected))
    assert_same_values(actual, expected, name)
    assert_served(ours)


@pytest.mark.parametrize("name", ["gemma3", "pali_gemma"])
def test_generation_after_images(name: str, device: str) -> None:
    torch.manual_seed(0)
    model, inputs, _ = MODELS[name](transformers)
    model = model.to(device).eval()
    inputs = {key: value.to(device) for key, value in inputs.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    for kind in ("dynamic", "static"):
        try:
            expected = model.generate(**inputs, **options, cache_implementation=kind)
        except IndexError:  # transformers 5.16, whose own masks of blocks are too short for a static cache
            continue
        assert torch.equal(twin(model).generate(**inputs, **options, cache_implementation=kind), expected)


@torch.no_grad()
def test_no_mask_of_all_scores_is_made(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, in a window, in pieces: transformers' own mask functions are never called."""
    from transformers import masking_utils

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a mask [B, 1, Sq, Sk] was made")

    model = decoder("gemma3", device)
    model.set_attn_implementation("inlay")
    ids = tokens(model, length=14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    cache = transformers.DynamicCache(config=model.config)
    for end in (6, 10, 11, 14):
        model(ids[:, cache.get_seq_length() : end], attention_mask=mask[:, :end], past_key_values=cache)
    mask[1, 5] = 0
    with pytest.raises(AssertionError, match="was made"):  # for a hole in the padding
        model(ids, attention_mask=mask)


def test_dropout_is_the_ops(device: str) -> None:
    """Drawn from torch's generator, so that a seed repeats it, and gradients are those of what was drawn."""
    model = language_model("llama", device, attention_dropout=0.5).train()
    model.set_attn_implementation("inlay")
    ids = tokens(model)

    def logits() -> Tensor:
        torch.manual_seed(3)
        return model(ids).logits

    assert torch.equal(logits(), logits())
    assert not torch.equal(logits(), model(ids).logits)
    assert not torch.equal(logits(), model.eval()(ids).logits)
    assert_served(model)


@pytest.mark.parametrize("first", ["inlay", "transformers"])
def test_importing_is_enough_in_either_order(first: str) -> None:
    second = "transformers" if first == "inlay" else "inlay"
    code = (
        f"import {first}\n"
        f"{'from transformers import modeling_utils' if first == 'transformers' else ''}\n"
        f"import {second}\n"
        "import sys\n"
        "from transformers import masking_utils, modeling_utils\n"
        "assert modeling_utils.__spec__.loader.__class__.__module__ != 'inlay.hf.registry'\n"
        "assert not any(type(finder).__module__.startswith('inlay.') for finder in sys.meta_path)\n"
        "assert 'inlay' in modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()\n"
        "assert 'inlay' in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@families
def test_the_name_is_taken_from_the_start(family: str) -> None:
    """Also by gpt-oss, which takes few."""
    config = language_model(family).config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="inlay")
    assert model.config._attn_implementation == "inlay"
    model(tokens(model))
    assert_served(model)
