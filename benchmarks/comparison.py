"""Measures the cases of an op family: ours beside every rival, on the same tensors."""

from __future__ import annotations

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

    def exact(self, tensors: Tensors) -> tuple:
        """The reference's results for ``tensors``, which it may overwrite; or those of some rows."""

    def difference(self, results: tuple, exact: tuple) -> str:
        """What of the call's results is not as ``exact`` says; empty if nothing."""


def differing(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> str:
    """Which results are further than ``tolerance`` from the exact ones, in relative L2, and how far."""
    far = []
    for index, (result, exact) in enumerate(pairs):
        if result.shape != exact.shape:
            far.append(f"result {index} has shape {tuple(result.shape)}")
            continue
        error = float((result.double() - exact.double()).norm() / exact.double().norm())
        if not error <= tolerance:
            far.append(f"result {index} is off by {error:.2g}")
    return ", ".join(far)


def compare(makers: Makers, options: Options, cases: Iterable[Case], host_cases: Iterable[Case] = ()) -> Iterator[Row]:
    chosen = {name: maker for name, (maker, devices) in makers.items() if options.device in devices}
    patience = harness.Patience(options.rival_seconds, unlimited=SUBJECT)
    implementations = harness.importable(chosen, options.chosen(chosen, SUBJECT), patience)
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
    """Every implementation's rows. A rival that fails or is wrong is not timed, and the output says why."""
    count = harness.buffer_sets(case.bytes()) if "graph" in case.modes else 1
    sets = [case.tensors(options.device) for _ in range(count)]
    before = {name: tensor.clone() for name, tensor in sets[0].items()}
    exact = case.exact({name: tensor.clone() for name, tensor in before.items()})
    rows: dict[str, list[Row]] = {mode: [] for mode in case.modes}
    for name, implementation in implementations.items():
        op = implementation.get(case.op)
        if op is None or not patience.left(name):
            continue
        for key, tensor in before.items():  # a step changed its state
            sets[0][key].copy_(tensor)
        try:
            with patience.spending(name):
                for mode, timing, note in _timings(case, op, sets, exact, options, name):
                    rows[mode].append(
                        harness.row(str(case), mode, name, timing, case.bytes(), options.copy, note, _flops(case))
                    )
        except (Exception, harness.OutOfTime) as error:  # a rival that fails is a note, not the end of the run
            if name == SUBJECT:
                raise
            print(f"{name}: {case}: {harness.reason(error)}", flush=True)
        harness.free_memory()
    for mode in case.modes:
        yield from harness.judged(rows[mode], SUBJECT, case.bars.get(mode, ()))


def _flops(case: Case) -> float:
    """Of the cases that have a method of that name: what matrix products bound, and not memory."""
    count = getattr(case, "flops", None)
    return 0.0 if count is None else count()


def _timings(
    case: Case, op: Op, sets: list[Tensors], exact: tuple, options: Options, name: str
) -> Iterator[tuple[str, harness.Timing, str]]:
    """Per mode, with a note where our own results are wrong."""
    calls = [case.call(op, sets[0])]
    difference = case.difference(calls[0](), exact)
    if getattr(op, "differs", False):  # on purpose, and says so
        difference = ""
    if difference and name != SUBJECT:
        raise ArithmeticError(difference)
    calls += [case.call(op, tensors) for tensors in sets[1:]]
    for mode in case.modes:
        try:
            yield mode, _time(mode, calls, options), difference
        except Exception as error:  # what no graph can hold may still be called
            if name == SUBJECT:
                raise
            print(f"{name}: {case} [{mode}]: {harness.reason(error)}", flush=True)


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
