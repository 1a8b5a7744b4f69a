"""The order of the demo: train, generate, compare, write."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
import transformers

import inlay
from inlay._console import CommandError, heading, indent, seconds_text
from inlay.demo import data, plot, show
from inlay.demo.generate import Generation, generate
from inlay.demo.layer import KINDS, LayerTimes, time_layers
from inlay.demo.model import checkpoint, new_model
from inlay.demo.options import Options, resolve
from inlay.demo.train import Run, Training, train
from inlay.demo.verdict import Check


def run(arguments: argparse.Namespace) -> int:
    """Run the demo that ``arguments`` ask for; 0 if all numbers agree, 1 if not. Raises ``CommandError``."""
    options = resolve(arguments)
    # It would say once per missing kernel package what `show.setting` says in one line.
    transformers.logging.set_verbosity_error()
    try:
        return _run(options)
    except torch.OutOfMemoryError as error:
        raise CommandError(
            "the GPU has not enough memory for this size", "--batch-size, --sequence-length or --quick make it smaller"
        ) from error


def _run(options: Options) -> int:
    started = time.perf_counter()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"--output {options.output}: {error.strerror}", "give a folder that can be written"
        ) from error
    if options.model is None:
        model, tokenizer = new_model(options), data.ByteTokenizer()
    else:
        model, tokenizer = checkpoint(options.model, options)
    show.setting(model, options)

    training = None
    if options.model is None:
        heading("Training")
        training = train(model, options)
        show.training(training)

    heading("Generation")
    prompt = options.prompt or data.prompt_text(options.size.prompt_length)
    generation = generate(model, tokenizer.encode(prompt), options)
    texts = tokenizer.decode(generation.unpatched.tokens), tokenizer.decode(generation.patched.tokens)
    show.generation(generation, prompt, texts)

    layer_times = time_layers(model, options)
    for op, times in layer_times.items():
        heading(KINDS[op])
        show.layer(times)

    heading("What Inlay replaced")
    print(indent(str((training or generation).report)))

    heading("Do the numbers agree?")
    checks = (training.checks() if training else []) + generation.checks()
    show.verdict(checks)
    agrees = all(check.passed for check in checks)

    results = _results(options, training, generation, layer_times, texts, checks)
    (options.output / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n  {'The numbers agree.' if agrees else 'The numbers do NOT agree.'} ", end="")
    print(f"Took {seconds_text(time.perf_counter() - started)}. Results: {options.output / 'demo.json'}", end="")
    if find_spec("matplotlib"):
        title = f"{show.model_text(model, options)}, {show.device_text(options.device)}"
        plot.draw(training, generation, title, options.output / "demo.png")
        print(f", {options.output / 'demo.png'}")
    else:
        print("; no plot, because matplotlib is not installed")
    return 0 if agrees else 1


def _results(
    options: Options,
    training: Training | None,
    generation: Generation,
    layer_times: dict[str, LayerTimes],
    texts: tuple[str, ...],
    checks: list[Check],
) -> dict[str, Any]:
    """Everything measured, as plain values."""
    results: dict[str, Any] = {
        "options": {name: _plain(value) for name, value in asdict(options).items()},
        "info": asdict(inlay.info()),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "generation": asdict(generation) | {"texts": texts},
    }
    results |= {op: asdict(times) for op, times in layer_times.items()}
    if training:
        runs = {name: _run_results(getattr(training, name)) for name in ("unpatched", "patched", "nudged")}
        results["training"] = runs | {
            "tokens_per_step": training.tokens_per_step,
            "speed_up": training.speed_up,
            "report": asdict(training.report),
        }
    return results


def _run_results(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("losses", "seconds", "state_bytes", "step_bytes")}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, dict, list, tuple, type(None))) else str(value)
