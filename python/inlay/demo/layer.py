"""Times one layer of a kind by itself, unpatched and patched: what the whole model's times hide."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

import inlay
from inlay.demo.measure import now
from inlay.demo.options import Options

_REPEATS = 5
KINDS = {"gdn_layer": "One Gated DeltaNet layer", "moe_block": "One mixture of experts"}
"""By the op that replaces the whole layer, what it is called."""


@dataclass
class LayerTimes:
    """Median seconds of what one layer does, unpatched and patched, by name of the work."""

    unpatched: dict[str, float]
    patched: dict[str, float]


def time_layers(model: Any, options: Options) -> dict[str, LayerTimes]:
    """Forward and backward, prefill and a decoding step of the first layer of each kind that the demo patches."""
    chosen = [op for op in KINDS if options.ops is None or op in options.ops]
    layers = {op: _first(model, op) for op in chosen}
    return {op: _time(model, op, layer, options) for op, layer in layers.items() if layer is not None}


def _time(model: Any, op: str, layer: nn.Module, options: Options) -> LayerTimes:
    work = _work(model, op, layer, options)
    times: dict[bool, dict[str, list[float]]] = {side: {name: [] for name in work} for side in (False, True)}
    for repeat in range(1 + _REPEATS):
        for patched in (False, True):
            with inlay.patched(layer, ops=options.ops) if patched else nullcontext():
                for name, run in work.items():
                    start = now(options.device)
                    run()
                    if repeat:  # the first is a warm-up
                        times[patched][name].append(now(options.device) - start)
    return LayerTimes(*({name: median(values) for name, values in times[side].items()} for side in (False, True)))


def _first(model: Any, op: str) -> nn.Module | None:
    with inlay.patched(model, ops=[op]) as report:
        paths = [entry.path for entry in report.patched if entry.op == op]
    return model.get_submodule(paths[0]) if paths else None


def _work(model: Any, op: str, layer: Any, options: Options) -> dict[str, Callable[[], None]]:
    from transformers import DynamicCache

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, model.config.get_text_config().hidden_size).to(options.device, options.dtype)

    state = {"cache_params": DynamicCache(config=model.config)} if op == "gdn_layer" else {}
    batch, token, prompt = tokens(options.batch_size, options.sequence_length), tokens(1, 1), tokens(1, 256)
    with torch.no_grad():
        layer(prompt, **state)

    def train() -> None:
        torch.autograd.grad(layer(batch).square().sum(), list(layer.parameters()))

    def prefill() -> None:
        with torch.no_grad():
            layer(prompt)

    def decode() -> None:
        with torch.no_grad():
            layer(token, **state)

    return {
        f"forward and backward, {options.batch_size} x {options.sequence_length}": train,
        "prefill of 256": prefill,
        "decoding step": decode,
    }
