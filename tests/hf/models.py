"""Tiny, randomly initialised models of every family that is patched, and what patching must find in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 96

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GDN = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {"shared_expert_intermediate_size": 32}
_MOE = {"moe_router": 2, "moe_experts": 2}
_MOE_SHARED = {"moe_router": 4, "moe_experts": 4, "moe_block": 4}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Family: (config class, its extra arguments, modules patched by op).
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("LlamaConfig", {}, {"rms_norm": 5, "add_rms_norm": 2, "attention_layer": 2}),
    "mistral": ("MistralConfig", {}, {"rms_norm": 5, "add_rms_norm": 2, "attention_layer": 2}),
    "qwen2": ("Qwen2Config", {}, {"rms_norm": 5, "add_rms_norm": 2, "attention_layer": 2}),
    "qwen3": ("Qwen3Config", {}, {"rms_norm": 9, "add_rms_norm": 2, "attention_layer": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS, {"rms_norm": 9, "add_rms_norm": 2, "attention_layer": 2, **_MOE}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_GDN, **_EXPERTS, **_SHARED},
        {"rms_norm": 11, "gated_rms_norm": 3, "add_rms_norm": 4, "gdn_layer": 3, "attention_layer": 1, **_MOE_SHARED},
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        _GDN,
        {"rms_norm": 11, "gated_rms_norm": 3, "add_rms_norm": 4, "gdn_layer": 3, "attention_layer": 1},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**_GDN, **_EXPERTS, **_SHARED},
        {"rms_norm": 11, "gated_rms_norm": 3, "add_rms_norm": 4, "gdn_layer": 3, "attention_layer": 1, **_MOE_SHARED},
    ),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16}, {"rms_norm": 9, "add_rms_norm": 2, "attention_layer": 2}),
    "gemma3": (
        "Gemma3TextConfig",
        {"query_pre_attn_scalar": 16},
        {"rms_norm": 13, "add_rms_norm": 2, "attention_layer": 2},
    ),
    "mixtral": ("MixtralConfig", _LOCAL, {"rms_norm": 5, "add_rms_norm": 2, "attention_layer": 2, **_MOE}),
    "olmoe": ("OlmoeConfig", _EXPERTS, {"rms_norm": 9, "add_rms_norm": 2, **_MOE}),
    "gpt_oss": ("GptOssConfig", _LOCAL, {"rms_norm": 5, "add_rms_norm": 2, "attention_layer": 2, **_MOE}),
}


def language_model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A causal language model in evaluation mode, its norm weights randomised (they all start as ones or zeros)."""
    import transformers

    name, extra, _ = LANGUAGE_MODELS[family]
    config = getattr(transformers, name)(**{**_SMALL, **extra, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    return settled(model, device, dtype)


def settled(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """The model on a device in a dtype, in evaluation mode, its vectors off their initial ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(device, dtype).eval()


def tokens(model: nn.Module, batch: int = 2, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).to(next(model.parameters()).device)
