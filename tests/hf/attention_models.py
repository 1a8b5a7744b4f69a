"""Tiny models whose attention is in transformers' registry and not a plain decoder's, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SMALL, "vocab_size": VOCABULARY}
_DECODER = {
    **_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {**_SMALL, "image_size": 16, "patch_size": 4, "projection_dim": 32}
_SEQUENCE_TO_SEQUENCE = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
IMAGE = VOCABULARY - 1

Case = tuple[nn.Module, dict[str, Any], Tensor | None]


def _tokens(length: int = 11) -> Tensor:
    return torch.randint(6, VOCABULARY - 6, (2, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _padding(ids: Tensor, side: str) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return mask


def bert(transformers: Any) -> Case:
    mask = _padding(_tokens(), "right")
    model = transformers.BertModel(transformers.BertConfig(**_ENCODER))
    return model, {"input_ids": _tokens(), "attention_mask": mask}, mask


def modern_bert(transformers: Any) -> Case:
    """Bidirectional windows."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**_ENCODER, **ids, local_attention=4, global_attn_every_n_layers=2)
    mask = _padding(_tokens(), "right")
    return transformers.ModernBertModel(config), {"input_ids": _tokens(), "attention_mask": mask}, mask


def vit(transformers: Any) -> Case:
    config = transformers.ViTConfig(**_SMALL, image_size=16, patch_size=4)
    return transformers.ViTModel(config), {"pixel_values": _noise(2, 3, 16, 16)}, None


def whisper(transformers: Any) -> Case:
    """An encoder, a decoder and cross attention."""
    config = transformers.WhisperConfig(
        **_SEQUENCE_TO_SEQUENCE, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": _noise(2, 8, 40), "decoder_input_ids": _tokens()}, None


def bart(transformers: Any) -> Case:
    """Cross attention to a padded source."""
    model = transformers.BartModel(transformers.BartConfig(**_SEQUENCE_TO_SEQUENCE, max_position_embeddings=32))
    inputs = {"input_ids": _tokens(), "attention_mask": _padding(_tokens(), "right")}
    return model, {**inputs, "decoder_input_ids": _tokens(5)}, None


def t5(transformers: Any) -> Case:
    """A bias of positions, with padding and with causal attention."""
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    inputs = {"input_ids": _tokens(), "attention_mask": _padding(_tokens(), "right")}
    return transformers.T5Model(config), {**inputs, "decoder_input_ids": _tokens(5)}, None


def llama4(transformers: Any) -> Case:
    """Chunks, counted from the end of the padding."""
    config = transformers.Llama4TextConfig(
        **{**_DECODER, "num_hidden_layers": 4}, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4,
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    mask = _padding(_tokens(), "left")
    return transformers.Llama4ForCausalLM(config), {"input_ids": _tokens(), "attention_mask": mask}, mask


def gemma3(transformers: Any) -> Case:
    """Image blocks that see each other, within windows and without."""
    text = {**_DECODER, "num_hidden_layers": 4, "sliding_window": 4, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3Config(
        text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=IMAGE - 2, eoi_token_index=IMAGE - 1,
    )  # fmt: skip
    inputs, mask = _with_images(tokens=4)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return transformers.Gemma3ForConditionalGeneration(config), inputs, mask


def pali_gemma(transformers: Any) -> Case:
    """A prefix, image and text, that sees itself."""
    config = transformers.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma"}, vision_config=_VISION, image_token_index=IMAGE,
        projection_dim=32,
    )  # fmt: skip
    inputs, mask = _with_images(tokens=16)
    inputs["token_type_ids"] = torch.zeros_like(mask)
    inputs["token_type_ids"][:, -4:] = 1
    return transformers.PaliGemmaForConditionalGeneration(config), inputs, mask


def _with_images(tokens: int) -> tuple[dict[str, Any], Tensor]:
    ids = _tokens(tokens + 10)
    ids[:, 3 : 3 + tokens] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": _noise(2, 3, 16, 16)}, mask


MODELS: dict[str, Callable[[Any], Case]] = {
    function.__name__: function
    for function in (bert, modern_bert, vit, whisper, bart, t5, llama4, gemma3, pali_gemma)
}  # fmt: skip
