"""Generates greedily with the same weights unpatched and patched: one prefill, then cached decoding."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay._console import Progress
from inlay.demo.measure import now
from inlay.demo.model import nudged
from inlay.demo.options import Options
from inlay.demo.verdict import Check
from inlay.hf.report import Report

_REPEATS = 3


@dataclass
class Generated:
    """What one side generated, and the times of all repeats."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """For each token, how far its logit was above the second best."""
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)

    @property
    def prefill_seconds(self) -> float:
        return median(self.prefills)

    @property
    def decode_seconds(self) -> float:
        """Of all tokens after the first, which the prefill gives."""
        return median(self.decodes)


@dataclass
class Generation:
    """Both sides, and what came of comparing their logits over prompt and text."""

    unpatched: Generated
    patched: Generated
    prompt_length: int
    logits: Check
    report: Report
    """The patch report after all of it, with calls and fallbacks."""

    @property
    def tokens_in_common(self) -> int:
        """How many generated tokens agree before the first that does not."""
        pairs = zip(self.unpatched.tokens, self.patched.tokens, strict=True)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), len(self.unpatched.tokens))

    @property
    def margin(self) -> float:
        """How far the unpatched model's first token that differs was above its second best; 0 if none differs."""
        common = self.tokens_in_common
        return 0.0 if common == len(self.unpatched.tokens) else self.unpatched.margins[common]

    def checks(self) -> list[Check]:
        """The logits of one forward pass over prompt and text, and the margin at the first token that differs.

        If no logit moves by more than d, no token can change whose margin is above 2 d. After the first difference
        the texts are different texts, and nothing more is compared.
        """
        return [self.logits, Check("margin of the first token that differs", self.margin, 2 * self.logits.rounding)]


def generate(model: Any, prompt: list[int], options: Options) -> Generation:
    """Continue ``prompt`` with ``options.new_tokens`` tokens, ``_REPEATS`` times by each side in turn."""
    model.eval()
    inputs = torch.tensor([prompt], device=options.device)
    unpatched, patched = Generated(), Generated()
    rounds = Progress("generating", "round", 1 + _REPEATS)
    rounds.note("warm-up")
    for index in rounds:
        warm_up = index == 0
        _greedy(model, inputs, options, unpatched, warm_up)
        with inlay.patched(model, ops=options.ops):
            _greedy(model, inputs, options, patched, warm_up)
            if index == _REPEATS:
                text = torch.cat((inputs, torch.tensor([unpatched.tokens], device=options.device)), dim=1)
                patched_logits = _logits(model, text)
                report = inlay.report(model)
        if not warm_up:
            slow, fast = (len(side.tokens) / side.decodes[-1] for side in (unpatched, patched))
            rounds.note(f"{slow:.0f} tokens/s unpatched, {fast:.0f} patched")
    logits = _logits(model, text)
    ulp = torch.finfo(options.dtype).eps * logits.abs().max().item()
    rounding = max(_distance(_logits(nudged(model, options.seed), text), logits), ulp)
    check = Check("logits over prompt and text", _distance(patched_logits, logits), rounding)
    return Generation(unpatched, patched, len(prompt), check, report)


@torch.inference_mode()
def _greedy(model: Any, inputs: Tensor, options: Options, result: Generated, warm_up: bool) -> None:
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    start = now(options.device)
    output = model(input_ids=inputs, use_cache=True, **last_only)
    best = [output.logits[:, -1].topk(2)]
    middle = now(options.device)
    for _ in range(options.new_tokens - 1):
        token = best[-1].indices[:, :1]
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        best.append(output.logits[:, -1].topk(2))
    end = now(options.device)

    result.tokens = torch.cat([each.indices[:, 0] for each in best]).tolist()
    result.margins = torch.cat([each.values[:, 0] - each.values[:, 1] for each in best]).tolist()
    if not warm_up:
        result.prefills.append(middle - start)
        result.decodes.append(end - middle)


@torch.inference_mode()
def _logits(model: Any, text: Tensor) -> Tensor:
    return model(input_ids=text, use_cache=False).logits.float()


def _distance(logits: Tensor, reference: Tensor) -> float:
    return (logits - reference).abs().max().item()
