"""Measures the cases of an op family: ours beside every rival, on the same tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Bar, Call, Options, Row

SUBJECT = "inlay"
Tensors = dict[str, Tensor]
Op = Callable[..., Any]
Implementation = Mapping[str, Op]  # of an op's name
Makers = Mapping[str, tuple[Callable[[], Implementation], tuple[str, ...]]]  # with the devices it is for


class Case(Protocol):
    """One op on one shape in one direction; ``str()`` names it."""

    @property
    def op(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def modes(self) -> tuple[str, ...]: ...
    @property
    def bars(self) -> Mapping[str, tuple[Bar, ...]]:
        """Per mode."""

    def bytes(self) -> int:
        """Each input read once, each output written once."""

    def tensors(self, device: str) -> Tensors: ...

    def call(self, op: Op, tensors: Tensors) -> Call:
        """What is timed: the forward without gradients, or the backward alone, through autograd."""

    def agrees(self, results: tuple, tensors: Tensors) -> bool:
        """Whether the call's results are the reference's for ``tensors``, which were copied before the call."""


def compare(makers: Makers, options: Options, cases: Iterable[Case], host_cases: Iterable[Case] = ()) -> Iterator[Row]:
    chosen = {name: maker for name, (maker, devices) in makers.items() if options.device in devices}
    implementations = harness.importable(chosen, options.chosen(chosen, SUBJECT))
    patience = harness.Patience(options.rival_seconds, unlimited=SUBJECT)
    for case in cases:
        if options.filter in str(case):
            yield from _measure(case, implementations, options, patience)
            harness.free_memory()
    for case in host_cases:
        if options.filter in f"host {case}":
            yield from _host(case, implementations, options)


def _measure(
    case: Case, implementations: Mapping[str, Implementation], options: Options, patience: harness.Patience
) -> Iterator[Row]:
    count = harness.buffer_sets(case.bytes()) if "graph" in case.modes else 1
    sets = [case.tensors(options.device) for _ in range(count)]
    rows: dict[str, list[Row]] = {mode: [] for mode in case.modes}
    for name, implementation in implementations.items():
        op = implementation.get(case.op)
        if op is None or not patience.left(name):
            continue
        start = time.perf_counter()
        try:
            before = {name: tensor.clone() for name, tensor in sets[0].items()}  # a step changes its state
            calls = [case.call(op, tensors) for tensors in sets]
            note = "" if case.agrees(calls[0](), before) else "result differs"
            for mode in case.modes:
                timing = _time(mode, calls, options)
                rows[mode].append(harness.row(str(case), mode, name, timing, case.bytes(), options.copy, note))
        except Exception as error:  # a rival that fails is a note, not the end of the run
            if name == SUBJECT:
                raise
            print(f"{name}: {case}: {type(error).__name__}: {error}", flush=True)
        patience.spend(name, time.perf_counter() - start)
        calls = []
        harness.free_memory()
    for mode in case.modes:
        yield from harness.judged(rows[mode], SUBJECT, case.bars.get(mode, ()))


def _time(mode: str, calls: list[Call], options: Options) -> harness.Timing:
    if options.device == "cpu":
        return harness.time_cpu(calls[0], 0.2 if options.quick else 1.0)
    return harness.time_graph(calls) if mode == "graph" else harness.time_events(calls[0])


def _host(case: Case, implementations: Mapping[str, Implementation], options: Options) -> Iterator[Row]:
    """Host time per eager call on tensors too small to keep the device busy, beside ``torch.mul``."""
    tensors = case.tensors(options.device)
    x = torch.zeros(4, 64, device=options.device, dtype=torch.bfloat16)
    calls: dict[str, Call] = {"torch.mul": lambda: torch.mul(x, x)}
    calls |= {name: case.call(ops[case.op], tensors) for name, ops in implementations.items() if case.op in ops}
    bars = (harness.at_most_times(2.0, "torch.mul"),) if case.direction == "forward" else ()
    timings = harness.time_host(calls, per_block=20 if options.quick else 100)
    rows = [harness.row(f"host {case}", "host", name, timing, 0, options.copy) for name, timing in timings.items()]
    yield from harness.judged(rows, SUBJECT, bars)
