"""What a demo run does: the command line's choices, completed by defaults that suit the device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inlay._console import CommandError
from inlay.hf.patch import OPS

WARM_UP_STEPS = 2
"""Training steps that are not timed: the first allocates the optimizer's state, the second is run for its memory."""


@dataclass(frozen=True)
class Size:
    """A model's shape and the work that suits it."""

    name: str
    shape: dict[str, Any]
    """Fields of ``Qwen3_5TextConfig``, or with experts of ``Qwen3_5MoeTextConfig``."""
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    prompt_length: int
    new_tokens: int


def _shape(hidden: int, layers: int, ffn: int, heads: tuple[int, int, int], gdn: tuple[int, int]) -> dict[str, Any]:
    """``heads``: query heads, key/value heads, width of a head. ``gdn``: heads, width of a head."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "linear_num_key_heads": gdn[0],
        "linear_num_value_heads": gdn[0],
        "linear_key_head_dim": gdn[1],
        "linear_value_head_dim": gdn[1],
    }


QUICK = Size(
    "tiny", _shape(64, 4, 192, heads=(2, 1, 32), gdn=(2, 32)),
    steps=6, batch_size=2, sequence_length=64, learning_rate=3e-3, prompt_length=96, new_tokens=16,
)  # fmt: skip
CPU = Size(
    "12 M", _shape(512, 4, 1152, heads=(8, 2, 64), gdn=(8, 64)),
    steps=60, batch_size=4, sequence_length=128, learning_rate=1e-3, prompt_length=256, new_tokens=64,
)  # fmt: skip
CUDA = Size(
    "0.8B", _shape(1024, 24, 3584, heads=(8, 2, 256), gdn=(16, 128)),
    steps=60, batch_size=4, sequence_length=1024, learning_rate=5e-4, prompt_length=1024, new_tokens=128,
)  # fmt: skip


def _of_experts(size: Size, count: int, chosen: int, width: int) -> Size:
    """The same with a mixture of experts in each layer, all as wide as the shared one, in place of an FFN."""
    shape = {name: value for name, value in size.shape.items() if name != "intermediate_size"}
    experts = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    return replace(size, shape=shape | experts | {"shared_expert_intermediate_size": width})


WITH_EXPERTS = {
    QUICK.name: _of_experts(QUICK, count=8, chosen=2, width=64),
    CPU.name: _of_experts(CPU, count=16, chosen=4, width=224),
    CUDA.name: _of_experts(CUDA, count=32, chosen=4, width=512),
}


@dataclass(frozen=True)
class Options:
    """A complete description of a run: the same options and the same software give the same numbers."""

    model: str | None
    """A checkpoint to generate with, or None: train a model of ``size`` first."""
    moe: bool
    size: Size
    device: torch.device
    dtype: torch.dtype
    steps: int
    batch_size: int
    sequence_length: int
    prompt: str | None
    new_tokens: int
    seed: int
    ops: tuple[str, ...] | None
    output: Path


def resolve(arguments: argparse.Namespace) -> Options:
    """Options from the parsed command line. Raises ``CommandError`` for what cannot be run."""
    device = _device(arguments.device)
    size = QUICK if arguments.quick else CUDA if device.type == "cuda" else CPU
    if arguments.moe:
        size = WITH_EXPERTS[size.name]
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    steps = arguments.steps or size.steps
    if steps <= WARM_UP_STEPS:
        raise CommandError(f"--steps {steps}: the first {WARM_UP_STEPS} are not timed", "take more steps")
    return Options(
        model=arguments.model,
        moe=arguments.moe,
        size=size,
        device=device,
        dtype=getattr(torch, dtype),
        steps=steps,
        batch_size=arguments.batch_size or size.batch_size,
        sequence_length=arguments.sequence_length or size.sequence_length,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens or size.new_tokens,
        seed=arguments.seed,
        ops=_ops(arguments.ops),
        output=arguments.output,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            f"--device cuda: torch {torch.__version__} finds no GPU", "use --device cpu, or a torch built with CUDA"
        )
    return torch.device(name)


def _ops(names: str | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    chosen = tuple(names.split(","))
    unknown = [name for name in chosen if name not in OPS]
    if unknown:
        raise CommandError(f"--ops: there is no op {', '.join(unknown)}", f"the ops are {', '.join(OPS)}")
    return chosen
