"""What the demo prints."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch

import inlay
from inlay._console import bytes_text, facts, heading, indent, seconds_text, spread, table
from inlay.demo.generate import Generation
from inlay.demo.layer import LayerTimes
from inlay.demo.options import Options
from inlay.demo.train import Training
from inlay.demo.verdict import FACTOR, Check

_SIDES = ("", "unpatched", "patched", "")


def model_text(model: Any, options: Options) -> str:
    """The model in a few words."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(options.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {dtype}"


def device_text(device: torch.device) -> str:
    """The GPU's name, or what Inlay knows about the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return inlay.info().cpu


def setting(model: Any, options: Options) -> None:
    """What is about to run, and on what."""
    config = model.config.get_text_config()
    layers = Counter(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    kinds = " + ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in layers.items())
    rivals = {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d", "kernels": "kernels"}
    installed = [name for name, module in rivals.items() if find_spec(module)]
    heading("Inlay demo")
    rows = [
        ("model", model_text(model, options)),
        ("layers", kinds),
        *_experts(config),
        ("weights", options.model or "new, random"),
        ("device", device_text(options.device)),
        ("unpatched", "transformers' own code" + (f" with {', '.join(installed)}" if installed else ", PyTorch only")),
    ]
    if options.model is None:
        size = f"{options.batch_size} x {options.sequence_length} tokens"
        rows += [
            ("text", "Python's documentation (pydoc_data.topics), a token a byte"),
            ("training", f"{options.steps} steps of {size}, AdamW, seed {options.seed}"),
        ]
    print(indent(facts(rows)), flush=True)


def _experts(config: Any) -> list[tuple[str, str]]:
    """How many a mixture of experts has; nothing for another model."""
    if not hasattr(config, "num_experts"):
        return []
    shared = " and a shared one" if getattr(config, "shared_expert_intermediate_size", 0) else ""
    return [("experts", f"{config.num_experts} in each layer, {config.num_experts_per_tok} of them a token{shared}")]


def training(result: Training) -> None:
    """Loss curves, then speed and memory."""
    first, second = result.unpatched, result.patched
    curves = [
        (str(step + 1), f"{a:.4f}", f"{b:.4f}", f"{abs(a - b):.1e}")
        for step in spread(len(first.losses), 9)
        for a, b in [(first.losses[step], second.losses[step])]
    ]
    _, losses = result.checks()
    print(f"\n{indent(table(('step', 'loss unpatched', 'loss patched', 'difference'), curves))}")
    print(f"\n  largest difference of all {len(first.losses)} steps: {losses.difference:.1e}")
    tokens = result.tokens_per_step
    rows = [
        _row("tokens/s", tokens / first.step_seconds, tokens / second.step_seconds, _rate),
        _row("time of a step (median)", first.step_seconds, second.step_seconds, seconds_text, faster=True),
        _row("peak memory", first.state_bytes + first.step_bytes, second.state_bytes + second.step_bytes, bytes_text),
        _row("- weights and optimizer", first.state_bytes, second.state_bytes, bytes_text),
        _row("- needed by a step", first.step_bytes, second.step_bytes, bytes_text),
    ]
    print(f"\n{indent(table(_SIDES, rows))}", flush=True)


def generation(result: Generation, prompt: str, texts: tuple[str, str]) -> None:
    """The texts, then speed."""
    first, second = result.unpatched, result.patched
    total, common = len(first.tokens), result.tokens_in_common
    agreement = f"all {total} agree"
    if common < total:
        agreement = f"the first {common} of {total} agree; the next had a margin of {result.margin:.1e}"
    parts = [
        ("prompt", repr(prompt[-60:])),
        ("unpatched", repr(texts[0])),
        ("patched", repr(texts[1])),
        ("tokens", agreement),
    ]
    print(f"\n{indent(facts(parts))}")
    decoded = max(1, total - 1)
    rows = [
        _row(
            f"prefill of {result.prompt_length}, tokens/s",
            result.prompt_length / first.prefill_seconds,
            result.prompt_length / second.prefill_seconds,
            _rate,
        ),
        _row(f"decode of {decoded}, tokens/s", decoded / first.decode_seconds, decoded / second.decode_seconds, _rate),
    ]
    print(f"\n{indent(table(_SIDES, rows))}", flush=True)


def layer(times: LayerTimes) -> None:
    """What one layer takes."""
    rows = [
        _row(name, seconds, times.patched[name], seconds_text, faster=True) for name, seconds in times.unpatched.items()
    ]
    print(f"\n{indent(table(_SIDES, rows))}", flush=True)


def verdict(checks: list[Check]) -> None:
    """Each comparison against its limit."""
    print(
        indent(
            "The yardstick: how far a third model drifts, unpatched, when each of its weights starts one unit in the\n"
            f"last place away. That is what rounding does here; agreement means at most {FACTOR:g} times as much.\n"
        )
    )
    rows = [
        (
            check.name,
            f"{check.difference:.1e}",
            f"{check.rounding:.1e}",
            f"{check.ratio:.2f}",
            "yes" if check.passed else "NO",
        )
        for check in checks
    ]
    print(indent(table(("largest difference", "patched", "rounding", "ratio", "agrees"), rows)), flush=True)


def _row(name: str, unpatched: float, patched: float, text: Any, faster: bool = False) -> tuple[str, str, str, str]:
    ratio = unpatched / patched if faster else patched / unpatched
    return name, text(unpatched), text(patched), f"{ratio:.2f}x"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
