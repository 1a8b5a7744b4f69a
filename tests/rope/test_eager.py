"""Do 16-bit results equal the eager code that a patched model ran before, bit for bit but for one value in a thousand?

The eager code is that of transformers' models, and, written here, that of diffusers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from tests.support.compare import assert_matches_eager
from tests.support.devices import each_dtype

EPS = 1e-6
TOKENS = 90
# The norm's module, and how our op is told to round as it does. None: there is no norm of heads.
STEPWISE = {"rounding": "stepwise"}
ZERO_CENTRED = {"rounding": "once", "weight_offset": 1.0}
# Model, its norm of heads, our options, query and key heads, width, how many channels are rotated.
MODELS: list[tuple[str, str | None, dict[str, Any], int, int, int, int]] = [
    ("llama", None, {}, 8, 2, 64, 64),
    ("mistral", None, {}, 8, 2, 128, 128),
    ("qwen2", None, {}, 8, 2, 128, 128),
    ("qwen3", "Qwen3RMSNorm", STEPWISE, 8, 2, 128, 128),
    ("qwen3_moe", "Qwen3MoeRMSNorm", STEPWISE, 8, 2, 128, 128),
    ("qwen3_next", "Qwen3NextRMSNorm", ZERO_CENTRED, 4, 1, 256, 64),
    ("qwen3_5", "Qwen3_5RMSNorm", ZERO_CENTRED, 4, 1, 256, 64),
    ("qwen3_vl", "Qwen3VLTextRMSNorm", STEPWISE, 8, 2, 128, 128),
    ("gemma2", None, {}, 4, 2, 256, 256),
    ("gemma3", "Gemma3RMSNorm", ZERO_CENTRED, 4, 2, 256, 256),
    ("glm", None, {"interleaved": True}, 8, 2, 128, 64),
    ("glm4", None, {"interleaved": True}, 8, 2, 128, 64),
    ("glm4_moe", "Glm4MoeRMSNorm", STEPWISE, 8, 2, 128, 64),
    ("gpt_oss", None, {}, 8, 1, 64, 64),
    ("cohere", None, {"interleaved": True, "rotary_rounding": "once"}, 8, 2, 128, 128),
    ("ernie4_5", None, {"interleaved": True}, 8, 2, 128, 128),
]


def modeling(name: str) -> ModuleType:
    pytest.importorskip("transformers")
    try:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {name}")


def angles(name: str, rotary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin as the model's rotary embedding gives them, of two batch rows at other positions."""
    positions = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) + 1000]).to(device)
    frequencies = 1.0 / 10000 ** (torch.arange(0, rotary, 2, device=device).float() / rotary)
    each_pair = positions[..., None].float() * frequencies
    if name == "gpt_oss":
        each = each_pair
    elif name == "cohere":
        each = each_pair.repeat_interleave(2, dim=-1)
    else:
        each = torch.cat([each_pair, each_pair], dim=-1)
    keep = torch.float32 if name == "ernie4_5" else dtype
    return each.cos().to(keep), each.sin().to(keep)


@each_dtype(halves_only=True)
@pytest.mark.parametrize("model", MODELS, ids=[model[0] for model in MODELS])
def test_transformers(model, dtype, device):
    name, norm_name, options, q_heads, k_heads, width, rotary = model
    code = modeling(name)
    q, k = (torch.randn(2, TOKENS, heads, width, device=device).to(dtype) for heads in (q_heads, k_heads))
    cos, sin = angles(name, rotary, dtype, device)
    norms: list[nn.Module | None] = [None, None]
    if norm_name is not None:
        norms = [getattr(code, norm_name)(width, eps=EPS).to(device, dtype) for _ in range(2)]
        for norm in norms:
            norm.weight.data += 0.3 * torch.randn_like(norm.weight)
    with torch.no_grad():
        normalised = [x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True)]
        eager = code.apply_rotary_pos_emb(*(x.transpose(1, 2) for x in normalised), cos, sin)
        weights = [None if norm is None else norm.weight for norm in norms]
        if name.startswith(("glm", "ernie")) and options.get("interleaved"):  # which use the first half, twice
            cos, sin = cos[..., : rotary // 2], sin[..., : rotary // 2]
        actual = inlay.qk_norm_rope(q, k, cos, sin, *weights, eps=EPS, rotary_dim=rotary, **options)
    for side, output, expected in zip("qk", actual, eager, strict=True):
        # A first rounding that goes the other way is multiplied, rounded and added to what may cancel it.
        ulps = None if norm_name else 1
        assert_matches_eager(output.transpose(1, 2), expected.to(dtype), f"{name} {side}", ulps=ulps)


@each_dtype(halves_only=True)
def test_diffusers(dtype, device):
    """torch.nn.RMSNorm and float32 angles for neighbours: Flux."""
    q, k = (torch.randn(2, TOKENS, 4, 128, device=device).to(dtype) for _ in range(2))
    cos, sin = (t[0].repeat_interleave(2, dim=-1)[..., :128] for t in angles("llama", 128, torch.float32, device))
    norms = [nn.RMSNorm(128, eps=EPS, device=device, dtype=dtype) for _ in range(2)]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack([-second, first], dim=-1).flatten(3)
        return (x.float() * cos[:, None] + partner.float() * sin[:, None]).to(dtype)

    with torch.no_grad():
        for norm in norms:
            norm.weight += 0.3 * torch.randn_like(norm.weight)
        eager = [rotate(norm(x)) for x, norm in zip((q, k), norms, strict=True)]
        actual = inlay.qk_norm_rope(
            q, k, cos, sin, norms[0].weight, norms[1].weight, eps=EPS, rounding="once", interleaved=True
        )
    for output, expected in zip(actual, eager, strict=True):
        assert_matches_eager(output, expected, "flux", ulps=None)


@each_dtype(halves_only=True)
def test_wide_weights_are_rounded_once_at_the_end(dtype, device):
    """Under autocast a norm's float32 weight makes what follows float32; attention then casts it."""
    q, k = (torch.randn(2, TOKENS, heads, 128, device=device).to(dtype) for heads in (4, 2))
    weight = 1 + 0.3 * torch.randn(128, device=device)
    cos, sin = angles("qwen3", 128, dtype, device)
    code = modeling("qwen3")
    norm = code.Qwen3RMSNorm(128, eps=EPS).to(device)
    norm.weight.data.copy_(weight)
    with torch.no_grad():
        eager = code.apply_rotary_pos_emb(norm(q), norm(k), cos, sin, unsqueeze_dim=2)
        assert eager[0].dtype == torch.float32
        actual = inlay.qk_norm_rope(q, k, cos, sin, weight, weight, eps=EPS)
    for output, expected in zip(actual, eager, strict=True):
        assert_matches_eager(output, expected.to(dtype), "qwen3, float32 weights", ulps=None)
