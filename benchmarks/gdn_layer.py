"""One Gated DeltaNet layer of a Hugging Face model, unpatched and patched: time and memory of a training step.

    python benchmarks/gdn_layer.py [--device cuda|cpu] [--tokens 8192]

The layer is Qwen3.5's, of the 9B model's shape (on the CPU a smaller one), in bfloat16, with random weights and inputs;
a step is its forward and the backward to the inputs and all weights. Memory is what a step needs beyond what it finds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inlay
from benchmarks import harness
from inlay.demo.measure import peak_growth

# hidden size, heads of q and k, heads of v, their dimension
SHAPES = {"cuda": (4096, 16, 32, 128), "cpu": (256, 4, 8, 32)}


@dataclass(frozen=True)
class Step:
    """What a training step takes."""

    seconds: float
    bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of one sequence; 8192 on CUDA, 256 on the CPU by default")
    arguments = parser.parse_args()
    tokens = arguments.tokens or (8192 if arguments.device == "cuda" else 256)
    unpatched, patched = measure(arguments.device, tokens)
    print(f"1x{tokens} tokens, {arguments.device}, bfloat16, forward and backward of one layer")
    for name, step in {"unpatched": unpatched, "patched": patched}.items():
        print(f"  {name:9}  {step.seconds * 1e3:9.2f} ms  {step.bytes / 2**20:9.1f} MiB")
    faster, memory = unpatched.seconds / patched.seconds, patched.bytes / unpatched.bytes
    print(f"  {faster:.1f} times as fast, {memory:.2f} of the memory")
    return 0


def measure(device: str, tokens: int) -> tuple[Step, Step]:
    """Of the unpatched and of the patched layer."""
    layer = make_layer(*SHAPES[device]).to(device, torch.bfloat16)
    x = torch.randn(1, tokens, SHAPES[device][0], device=device).bfloat16()
    dy = torch.randn_like(x)
    own = deepcopy(layer)
    inlay.patch(own, strict=True)
    unpatched, patched = (_measure(_training_step(module, x, dy), device) for module in (layer, own))
    return unpatched, patched


def make_layer(hidden: int, key_heads: int, value_heads: int, head_dim: int) -> nn.Module:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=hidden,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        linear_conv_kernel_dim=4,
    )
    return Qwen3_5GatedDeltaNet(config, layer_idx=0)


def _training_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()
    inputs = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), inputs, dy) and None


def _measure(step: Callable[[], None], device: str) -> Step:
    step()
    timing = harness.time_events(step, 10) if device == "cuda" else harness.time_cpu(step, 1.0)
    return Step(timing.median, peak_growth(step, torch.device(device)))


if __name__ == "__main__":
    raise SystemExit(main())
