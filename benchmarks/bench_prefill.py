"""Prefill of a whole Hugging Face model, end to end: patched, beside its own attention implementations.

The model has the layers of Qwen3-8B, fewer of them, and random weights in bfloat16 (on the CPU it is small, and
float32); a call fills a new cache with a prompt and returns the last token's logits. `peak_mib` is what that needs
beyond the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import inlay
from benchmarks import harness
from benchmarks.comparison import SUBJECT, differing
from benchmarks.harness import Bar, Options, Row
from inlay.demo.measure import peak_growth

# By name: transformers' attention implementation, and which ops are patched on top of it; None: all.
_IMPLEMENTATIONS: dict[str, tuple[str, list[str] | None]] = {
    SUBJECT: ("sdpa", None),
    "inlay_attention": ("inlay", []),  # by its name in transformers' registry, without a patch
    "sdpa": ("sdpa", []),
    "eager": ("eager", []),
}
_QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_hidden_layers": 12,
}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "num_hidden_layers": 2,
}
_TOLERANCE = 0.05  # relative L2 of the logits, for bfloat16
_BARS: tuple[Bar, ...] = (
    harness.times_faster_than(3.0, "eager"),
    harness.times_faster_than(1.10, "sdpa"),
    harness.at_most_peak(1.05, "sdpa"),  # which grows with the length, and not with its square
)


def run(options: Options) -> Iterator[Row]:
    on_cuda = options.device == "cuda"
    model = make_model(_QWEN3_8B if on_cuda else _SMALL, options.device)
    patience = harness.Patience(options.rival_seconds, unlimited=SUBJECT)
    for tokens in _lengths(options):
        case = f"prefill 1x{tokens}" + (" Qwen3-8B, 12 layers" if on_cuda else " small")
        if options.filter in case:
            ids = torch.randint(model.config.vocab_size, (1, tokens), device=options.device)
            rows = list(_measure(case, model, ids, options, patience))
            yield from harness.judged(rows, SUBJECT, _BARS if on_cuda else ())


def make_model(shape: dict[str, int], device: str) -> Any:
    import transformers

    config = transformers.Qwen3Config(**shape, max_position_embeddings=2**15)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _lengths(options: Options) -> tuple[int, ...]:
    if options.device == "cuda":
        return (4096,) if options.quick else (4096, 8192)
    return (64,) if options.quick else (1024,)


def _measure(case: str, model: Any, ids: Tensor, options: Options, patience: harness.Patience) -> Iterator[Row]:
    """A rival that fails is not timed, and the output says why."""
    with _using(model, "sdpa"):
        expected = _prefill(model, ids)
    flops = _flops(model, ids.shape[1])
    for name in options.chosen(_IMPLEMENTATIONS, SUBJECT):
        if not patience.left(name):
            continue
        try:
            with patience.spending(name), _using(model, name):
                note = differing([(_prefill(model, ids), expected)], _TOLERANCE)
                fallbacks = inlay.report(model).fallbacks
                if fallbacks and name == "inlay_attention":  # the patched model would have raised
                    raise RuntimeError(f"falls back: {', '.join(fallbacks)}")
                peak, timing = _peak(model, ids, options.device), _time(model, ids, options)
            yield harness.row(case, "eager", name, timing, 0, options.copy, note, flops, peak)
        except (Exception, harness.OutOfTime) as error:
            if name == SUBJECT:
                raise
            print(f"{name}: {case}: {harness.reason(error)}", flush=True)
        harness.free_memory()


def _peak(model: Any, ids: Tensor, device: str) -> int:
    def work() -> None:
        _prefill(model, ids)

    return peak_growth(work, torch.device(device))


def _time(model: Any, ids: Tensor, options: Options) -> harness.Timing:
    if options.device == "cuda":
        return harness.time_events(lambda: _prefill(model, ids))
    return harness.time_cpu(lambda: _prefill(model, ids), 0.2 if options.quick else 2.0)


@contextmanager
def _using(model: Any, name: str) -> Iterator[None]:
    """The model as one of the implementations; a call of a patched one that falls back raises."""
    registered, ops = _IMPLEMENTATIONS[name]
    former = model.config._attn_implementation
    model.set_attn_implementation(registered)
    try:
        with inlay.patched(model, ops, strict=True):
            yield
    finally:
        model.set_attn_implementation(former)


@torch.no_grad()
def _prefill(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, logits_to_keep=1).logits


def _flops(model: Any, tokens: int) -> float:
    """Of the products with weights, and of attention's visible pairs."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name)
    pairs = tokens * (tokens + 1) / 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * weights * tokens + 4.0 * pairs + 2.0 * config.vocab_size * config.hidden_size


FAMILY = harness.Family((), SUBJECT, ("transformers",), run)
