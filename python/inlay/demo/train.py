"""Trains the same model unpatched and patched, step by step in turn, and a third one with nudged weights."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay._console import Progress
from inlay.demo import data
from inlay.demo.measure import now, peak_growth
from inlay.demo.model import nudged
from inlay.demo.options import WARM_UP_STEPS, Options
from inlay.demo.verdict import Check, worst
from inlay.hf.report import Report

_BETAS, _WEIGHT_DECAY, _CLIP, _RAMP = (0.9, 0.95), 0.1, 1.0, 10


@dataclass
class Run:
    """One model on its way through the training steps."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each timed step: forward, backward, clipping and optimizer."""
    state_bytes: int = 0
    """Weights and optimizer state."""
    step_bytes: int = 0
    """Most that one step needs beyond that: gradients, saved activations, temporaries."""

    @property
    def step_seconds(self) -> float:
        return median(self.seconds)


@dataclass
class Training:
    """The three runs, and what came of comparing the gradients of their first step."""

    unpatched: Run
    patched: Run
    nudged: Run
    tokens_per_step: int
    gradients: Check
    report: Report
    """The patch report after all steps, with calls and fallbacks."""

    @property
    def speed_up(self) -> float:
        return self.unpatched.step_seconds / self.patched.step_seconds

    def checks(self) -> list[Check]:
        """The gradients of the first step, of the parameter that fares worst, and the losses of all steps."""
        reference = self.unpatched.losses
        ulp = torch.finfo(torch.float32).eps * max(reference)
        rounding = max(_largest_difference(self.nudged.losses, reference), ulp)
        return [self.gradients, Check("losses", _largest_difference(self.patched.losses, reference), rounding)]


def train(model: Any, options: Options) -> Training:
    """Train ``model``, unpatched, beside a patched and a nudged copy, on the same batches with the same optimizer.

    The unpatched and the patched model take every step one right after the other, in alternating order, so that
    whatever else the machine does meets both alike.
    """
    copied = copy.deepcopy(model)
    inlay.patch(copied, ops=options.ops)
    unpatched, patched, noisy = (_start(each, options) for each in (model, copied, nudged(model, options.seed)))
    batches = data.training_batches(options.steps, options.batch_size, options.sequence_length, options.seed)

    steps = Progress("training", "step", options.steps)
    for step in steps:
        batch = batches[step].to(options.device)
        pair = (unpatched, patched) if step % 2 == 0 else (patched, unpatched)
        for run in (*pair, noisy):
            _set_learning_rate(run, step, options)
            _step(run, batch, step, options.device)
        if step == 0:
            gradients = _compare_gradients(unpatched.model, patched.model, noisy.model)
        steps.note(f"loss {unpatched.losses[-1]:.3f} unpatched, {patched.losses[-1]:.3f} patched")
    for run in (unpatched, patched, noisy):
        run.optimizer.zero_grad()
    tokens_per_step = options.batch_size * options.sequence_length
    return Training(unpatched, patched, noisy, tokens_per_step, gradients, inlay.report(patched.model))


def _start(model: Any, options: Options) -> Run:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.size.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY
    )
    return Run(model, optimizer)


def _set_learning_rate(run: Run, step: int, options: Options) -> None:
    """Up over the first steps, then down in a straight line to a twentieth."""
    ramp = min(1.0, (step + 1) / _RAMP)
    decay = 1.0 - 0.95 * step / options.steps
    for group in run.optimizer.param_groups:
        group["lr"] = options.size.learning_rate * ramp * decay


def _step(run: Run, batch: Tensor, step: int, device: torch.device) -> None:
    """One training step. Its gradients stay until the next one, for the comparison after the first."""
    run.optimizer.zero_grad()

    def work() -> None:
        loss = run.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), _CLIP)
        run.optimizer.step()
        run.losses.append(loss.item())

    if step == WARM_UP_STEPS - 1:
        run.state_bytes = _state_bytes(run)
        run.step_bytes = peak_growth(work, device)
        return
    start = now(device)
    work()
    if step >= WARM_UP_STEPS:
        run.seconds.append(now(device) - start)


def _state_bytes(run: Run) -> int:
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def _compare_gradients(unpatched: Any, patched: Any, noisy: Any) -> Check:
    """The kind of parameter whose gradients ``g`` lie furthest apart, by the Euclidean norm of the difference.

    Parameters that differ only in the number of their layer are one kind: some, such as a GDN layer's ``dt_bias``, have
    so few elements and so much cancellation in each that one layer's alone says little.
    """
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    parameters = zip(unpatched.named_parameters(), patched.parameters(), noisy.parameters(), strict=True)
    for (name, weight), *others in parameters:
        g, g_patched, g_nudged = (parameter.grad.double() for parameter in (weight, *others))
        ulp = torch.finfo(weight.dtype).eps * g
        kind = squares[re.sub(r"\.\d+\.", ".*.", name)]
        for place, difference in enumerate((g_patched - g, g_nudged - g, ulp)):
            kind[place] += difference.square().sum().item()
    return worst(
        Check(f"gradient of {kind}, step 1", math.sqrt(error), math.sqrt(max(drift, ulp)))
        for kind, (error, drift, ulp) in squares.items()
    )


def _largest_difference(losses: list[float], reference: list[float]) -> float:
    """NaN if there is one."""
    return torch.tensor(losses).sub(torch.tensor(reference)).abs().max().item()
