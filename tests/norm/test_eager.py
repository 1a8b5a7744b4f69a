"""Do 16-bit results equal the eager code that a patched model ran before, bit for bit but for one value in a thousand?

The eager code is written here from each model's formula, and taken from transformers and torch where they are there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from tests.support.compare import assert_matches_eager
from tests.support.devices import each_dtype

EPS = 1e-6
SHAPES = [(64, 2048), (16, 5120), (512, 128), (96, 1001)]
# Units in the last place that a value may be off whose first rounding went the other way, see assert_matches_eager.
ONCE, TWICE, THRICE = 1, 2, 4  # by how often the eager code rounds
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def root_mean_square(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    return weight * root_mean_square(x).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (root_mean_square(x) * (1.0 + weight.float())).to(x.dtype)


def gpt_oss(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * root_mean_square(x)).to(x.dtype)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return (llama(x, weight) * F.silu(gate.float())).to(x.dtype)


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def weights(width: int, dtype: torch.dtype, device: str, centre: float = 1.0) -> Tensor:
    return (centre + 0.2 * torch.randn(width, device=device)).to(dtype)


@shapes
@each_dtype(halves_only=True)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight_x", "weight_f32"])
def test_llama(shape, dtype, device, weight_dtype):
    """Float32 weights make a float32 result; divided by them it shows the 16-bit rounding in between."""
    x, weight = rows(shape, dtype, device), weights(shape[-1], weight_dtype or dtype, device)
    actual = inlay.rms_norm(x, weight, eps=EPS, rounding="stepwise")
    eager = llama(x, weight)
    assert actual.dtype == eager.dtype
    if weight_dtype is not None:
        actual, eager = (actual / weight).to(dtype), (eager / weight).to(dtype)
    assert_matches_eager(actual, eager, "llama", ulps=TWICE)


@shapes
@each_dtype(halves_only=True)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight_x", "weight_f32"])
def test_gemma(shape, dtype, device, weight_dtype):
    x, weight = rows(shape, dtype, device), weights(shape[-1], weight_dtype or dtype, device, centre=0.0)
    actual = inlay.rms_norm(x, weight, eps=EPS, weight_offset=1.0)
    assert_matches_eager(actual, gemma(x, weight), "gemma")


@shapes
@each_dtype(halves_only=True)
def test_gpt_oss(shape, dtype, device):
    x, weight = rows(shape, dtype, device), weights(shape[-1], dtype, device)
    assert_matches_eager(inlay.rms_norm(x, weight, eps=EPS), gpt_oss(x, weight), "gpt_oss")


@shapes
@each_dtype(halves_only=True)
def test_gated(shape, dtype, device):
    x, gate, weight = rows(shape, dtype, device), rows(shape, dtype, device), weights(shape[-1], dtype, device)
    assert_matches_eager(inlay.gated_rms_norm(x, gate, weight, eps=EPS), gated(x, gate, weight), "gated", ulps=THRICE)


@shapes
@each_dtype(halves_only=True)
@pytest.mark.parametrize("eager", [llama, gemma])
def test_residual_add_then_norm(shape, dtype, device, eager):
    x, residual = rows(shape, dtype, device), rows(shape, dtype, device)
    weight = weights(shape[-1], dtype, device, centre=0.0 if eager is gemma else 1.0)
    options = {"weight_offset": 1.0} if eager is gemma else {"rounding": "stepwise"}
    y, residual_out = inlay.add_rms_norm(x, residual, weight, eps=EPS, **options)
    assert torch.equal(residual_out, residual + x)
    assert_matches_eager(y, eager(residual + x, weight), "y", ulps=ONCE if eager is gemma else TWICE)


@shapes
@each_dtype(halves_only=True)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_torch_rms_norm(shape, dtype, device, eps):
    """eps None is the machine epsilon of the dtype computed in, as PyTorch's kernel has it."""
    x = rows(shape, dtype, device) * 1e-3  # small enough for eps to matter
    module = nn.RMSNorm(shape[-1], eps=eps, device=device, dtype=dtype)
    module.weight.data = weights(shape[-1], dtype, device)
    assert_matches_eager(inlay.rms_norm(x, module.weight.detach(), eps=eps), module(x).detach(), "nn.RMSNorm")


@shapes
@each_dtype(halves_only=True)
def test_torch_layer_norm(shape, dtype, device):
    x, weight, bias = rows(shape, dtype, device), weights(shape[-1], dtype, device), weights(shape[-1], dtype, device)
    eager = F.layer_norm(x.float(), shape[-1:], weight.float(), bias.float(), 1e-5).to(dtype)
    assert_matches_eager(inlay.layer_norm(x, weight, bias), eager, "layer_norm", ulps=None)


_ROUNDING = {"stepwise": {"rounding": "stepwise"}, "zero_centred": {"weight_offset": 1.0}, "once": {}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("path", "rounding"),
    [
        ("llama.modeling_llama.LlamaRMSNorm", "stepwise"),
        ("mistral.modeling_mistral.MistralRMSNorm", "stepwise"),
        ("mixtral.modeling_mixtral.MixtralRMSNorm", "stepwise"),
        ("olmoe.modeling_olmoe.OlmoeRMSNorm", "stepwise"),
        ("qwen2.modeling_qwen2.Qwen2RMSNorm", "stepwise"),
        ("qwen3.modeling_qwen3.Qwen3RMSNorm", "stepwise"),
        ("qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm", "stepwise"),
        ("gemma2.modeling_gemma2.Gemma2RMSNorm", "zero_centred"),
        ("gemma3.modeling_gemma3.Gemma3RMSNorm", "zero_centred"),
        ("qwen3_next.modeling_qwen3_next.Qwen3NextRMSNorm", "zero_centred"),
        ("qwen3_5.modeling_qwen3_5.Qwen3_5RMSNorm", "zero_centred"),
        ("gpt_oss.modeling_gpt_oss.GptOssRMSNorm", "once"),
    ],
)
def test_transformers_classes(path, rounding, dtype, device):
    module = _transformers_class(path)(2048, eps=EPS).to(device, dtype)
    centre = 0.0 if rounding == "zero_centred" else 1.0
    module.weight.data = weights(2048, dtype, device, centre)
    x = rows((64, 2048), dtype, device)
    actual = inlay.rms_norm(x, module.weight.detach(), eps=EPS, **_ROUNDING[rounding])
    assert_matches_eager(actual, module(x).detach(), path, ulps=TWICE if rounding == "stepwise" else ONCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "path",
    ["qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", "qwen3_5.modeling_qwen3_5.Qwen3_5RMSNormGated"],
)
def test_transformers_gated_classes(path, dtype, device):
    module = _transformers_class(path)(128, eps=EPS).to(device, dtype)
    module.weight.data = weights(128, dtype, device)
    x, gate = rows((1024, 128), dtype, device), rows((1024, 128), dtype, device)
    actual = inlay.gated_rms_norm(x, gate, module.weight.detach(), eps=EPS)
    assert_matches_eager(actual, module(x, gate).detach(), path, ulps=THRICE)


def _transformers_class(path: str) -> Callable[..., nn.Module]:
    pytest.importorskip("transformers")
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)
