"""Are attention's rivals given what they expect, and understood? Stand-ins with their signatures compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks import attention_rivals, bench_attention
from benchmarks.bench_attention import Case
from inlay import reference

CASES = {
    feature: Case("forward", 1, 4, 2, 64, 64, 16, feature=feature) for feature in ("", "window", "packed", "softcap")
}
NO_LIMIT = {"fa3": -1, "flash_attn": -1, "fa4": None}
MODULES = {"fa3": "flash_attn_interface", "flash_attn": "flash_attn", "fa4": "flash_attn.cute"}


@pytest.fixture(params=MODULES)
def rival(request, monkeypatch):
    """The package's functions, by the reference: a window of its own "no limit", a result alone or in a tuple."""
    name = request.param

    def options(causal, window_size, softcap):
        assert all(side is None or side >= 0 or side == NO_LIMIT[name] for side in window_size)
        window = tuple(None if side in (None, -1) else side for side in window_size)
        return {"causal": causal, "window": window, "softcap": softcap}

    def flash_attn_func(q, k, v, causal=False, window_size=(NO_LIMIT[name],) * 2, softcap=0.0):
        y = reference.attention(q, k, v, **options(causal, window_size, softcap))
        return y if name == "flash_attn" else (y, None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False,
        window_size=(NO_LIMIT[name],) * 2, softcap=0.0,
    ):  # fmt: skip
        assert q.dim() == k.dim() == v.dim() == 3
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        keywords = options(causal, window_size, softcap)
        y = reference.attention(
            q[None], k[None], v[None], cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **keywords
        )[0]
        return y if name == "flash_attn" else (y, None)

    parent = ""
    for part in MODULES[name].split("."):
        parent = f"{parent}.{part}" if parent else part
        module = ModuleType(parent)
        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, parent, module)
    return attention_rivals.IMPLEMENTATIONS[name][0]()["attention"]


@pytest.mark.parametrize("feature", CASES)
def test_flash_attention(rival, feature):
    case = replace(CASES[feature], dtype=torch.float32)
    tensors = case.tensors("cpu")
    y = rival(tensors, case.options())
    assert case.difference((y,), case.exact(tensors)) == ""


@pytest.mark.parametrize("feature", ["gate", "sinks", "padded"])
def test_what_a_rival_has_not_is_refused(rival, feature):
    case = Case("forward", 2, 4, 2, 64, 64, 16, feature=feature)
    with pytest.raises(NotImplementedError, match="no "):
        rival(case.tensors("cpu"), case.options())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["sdpa", "hf_eager"])
def test_what_runs_here(name, direction):
    case = Case(direction, 2, 4, 2, 64, 64, 16, dtype=torch.float32)
    tensors = case.tensors("cpu")
    op = attention_rivals.IMPLEMENTATIONS[name][0]()["attention"]
    assert case.difference(case.call(op, tensors)(), case.exact(tensors)) == ""


def test_a_wrong_result_is_noticed():
    case = CASES[""]
    tensors = case.tensors("cpu")
    exact = case.exact(tensors)
    right = case.call(attention_rivals.ours()["attention"], tensors)()
    assert case.difference(right, exact) == ""
    assert "is off by" in case.difference((right[0] * 1.1,), exact)


@pytest.mark.parametrize("feature", ["", "window", "packed", "padded"])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_of_the_mask(feature, causal):
    """What rates are counted in, against the keys that each query really sees."""
    if feature == "window" and not causal:
        return  # windows are measured with a causal mask
    case = Case("forward", 1 if feature == "packed" else 2, 1, 1, 64, 64, 8, causal=causal, feature=feature)
    tensors = case.tensors("cpu")
    shape = (case.batch, 64, 1, 64)
    eye = torch.eye(64)[None, :, None].expand(case.batch, 64, 1, 64)
    tensors |= {"q": torch.zeros(shape), "k": torch.zeros(shape), "v": eye}
    probabilities = bench_attention._reference(tensors, case.options())
    assert case.pairs() == (probabilities > 0).sum()
