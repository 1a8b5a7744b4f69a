"""The demo's models: a Qwen3.5 hybrid with new weights, dense or of experts, or a checkpoint; and a nudged copy."""

from __future__ import annotations

import copy
from typing import Any

import torch

from inlay._console import CommandError, first_line
from inlay.demo.data import ByteTokenizer
from inlay.demo.options import Options


def new_model(options: Options) -> Any:
    """A Qwen3.5 with random weights: after every three Gated DeltaNet layers one with full attention."""
    family = "Qwen3_5Moe" if options.moe else "Qwen3_5"
    try:
        import transformers

        model_cls = getattr(transformers, f"{family}ForCausalLM")
        config_cls = getattr(transformers, f"{family}TextConfig")
    except (ImportError, AttributeError) as error:
        raise CommandError(
            f"this transformers has no Qwen3.5: {first_line(error)}", "pip install 'inlay[demo]'"
        ) from error
    config = config_cls(
        **options.size.shape,
        vocab_size=ByteTokenizer.vocab_size,
        eos_token_id=ByteTokenizer.eos_token_id,
        tie_word_embeddings=True,
        dtype=options.dtype,
    )
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = model_cls._from_config(config)
        _tell_experts_apart(model)
    return model


def _tell_experts_apart(model: Any) -> None:
    """transformers starts routers with zeros: all experts would be alike to them, and which are chosen is anyone's."""
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            torch.nn.init.normal_(module.weight, std=0.05)


def checkpoint(name: str, options: Options) -> tuple[Any, Any]:
    """The model and the tokenizer saved under ``name``; bytes if nothing there says how to make tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--model {name}: {first_line(error)}",
            "give the folder of a saved causal language model, or a model id that can be reached from here",
        ) from error
    model.to(options.device).eval()
    try:
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if model.config.get_text_config().vocab_size < ByteTokenizer.vocab_size:
            raise CommandError(
                f"--model {name}: no tokenizer there, and its vocabulary is too small for bytes",
                "save the tokenizer beside the model",
            ) from error
        return model, ByteTokenizer()


def nudged(model: Any, seed: int) -> Any:
    """A copy of the model with every weight moved by about one unit in the last place, up or down at random.

    How far such a copy drifts away is what rounding alone does to this model: the yardstick for every comparison.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                coin = torch.randint(2, weight.shape, generator=generator, device=weight.device, dtype=torch.int8)
                weight.copy_(weight.double() * (1 + torch.finfo(weight.dtype).eps * (2 * coin - 1)))
    return model
