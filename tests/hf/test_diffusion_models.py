"""The denoisers of Flux, Qwen-Image, Wan, Stable Diffusion 1.5 and SDXL, tiny and randomly initialised."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from tests.hf.compare import assert_same_values
from tests.hf.models import settled

diffusers = pytest.importorskip("diffusers")

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
    "norm_num_groups": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=False, **_HEADS,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
    }
    return model, inputs


def _qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), **_HEADS
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "encoder_hidden_states_mask": torch.ones(1, 6),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    return model, inputs


def _wan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_dim=32,
        freq_dim=16,
        ffn_dim=48,
        cross_attn_norm=True,
        **_HEADS,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "timestep": torch.tensor([7]),
    }
    return model, inputs


def _stable_diffusion() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(**_UNET)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 6, 32)}
    return model, inputs


def _sdxl() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(
        **_UNET, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=2, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 7,
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)},
    }
    return model, inputs


DENOISERS = {
    "flux": (_flux, {"layer_norm": 6, "rms_norm": 6}),
    "qwen_image": (_qwen_image, {"layer_norm": 9, "rms_norm": 9}),
    "wan": (_wan, {"layer_norm": 7, "rms_norm": 8}),
    "stable_diffusion": (_stable_diffusion, {"layer_norm": 12}),
    "sdxl": (_sdxl, {"layer_norm": 24}),
}
denoisers = pytest.mark.parametrize("name", DENOISERS)


def _to(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _to(item, device, dtype) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


@denoisers
def test_output_and_gradients(name: str, device: str, dtype: torch.dtype) -> None:
    build, found = DENOISERS[name]
    model, inputs = build()
    model, inputs = settled(model, device, dtype), _to(inputs, device, dtype)
    unpatched = deepcopy(model)
    report = inlay.patch(model, strict=True)
    assert Counter(entry.op for entry in report.patched) == found
    assert {entry.cls for entry in report.unpatched} <= {"GroupNorm"}
    actual, expected = model(**inputs).sample, unpatched(**inputs).sample
    assert inlay.report(model).calls == sum(found.values())
    scale = expected.float().abs().max()
    if dtype == torch.float32:
        assert_same_values(actual, expected, "sample")
    else:
        # LayerNorm differs from torch's in one value of thousands by a unit in the last place, which convolutions and
        # attention spread over the whole sample.
        assert (actual - expected).abs().max() <= 8 * torch.finfo(dtype).eps * scale
    actual.float().square().mean().backward()
    expected.float().square().mean().backward()
    for (path, ours), theirs in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        if theirs.grad is not None:
            tolerance = 1e-3 if dtype == torch.float32 else 1e-1
            error = (ours.grad.float() - theirs.grad.float()).norm()
            assert error <= tolerance * theirs.grad.float().norm() + 1e-6, path


def test_pipeline_components_are_patched() -> None:
    model, _ = _stable_diffusion()
    scheduler = diffusers.DDIMScheduler()

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, unet: nn.Module, scheduler: Any):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    pipeline = Pipeline(model, scheduler)
    report = inlay.patch(pipeline)
    assert {entry.path.split(".")[0] for entry in report.patched} == {"unet"}
    inlay.unpatch(pipeline)
    assert not inlay.report(pipeline).patched
