"""Tiny mixtures of experts of every family, with and without a shared expert, a bias, groups and another gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.hf import models

_DENSE_FIRST = {"first_k_dense_replace": 0, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip

# Family: (config class, its extra arguments, whether blocks have a shared expert).
MOE_MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{
        family: (*models.LANGUAGE_MODELS[family][:2], "moe_block" in models.LANGUAGE_MODELS[family][2])
        for family in ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "olmoe", "gpt_oss")
    },
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**models._EXPERTS, **models._SHARED, "decoder_sparse_step": 1, "norm_topk_prob": False},
        True,
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_DENSE_FIRST, **_LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        True,
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_DENSE_FIRST, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}, True),
}
# Of which transformers computes an auxiliary loss.
WITH_AUX_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "gpt_oss")


def moe_model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """In evaluation mode; routers, which transformers initialises to zeros, tell their experts apart."""
    import transformers

    name, extra, _ = MOE_MODELS[family]
    config = getattr(transformers, name)(**{**models._SMALL, **extra, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.lower().endswith("router"):
                module.weight.normal_(std=0.3)
                if getattr(module, "e_score_correction_bias", None) is not None:
                    module.e_score_correction_bias.normal_(std=0.1)
    return models.settled(model, device, dtype)
