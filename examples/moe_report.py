"""Figures, summary and notebook of ``moe_study.py``'s results. Every number in them comes from its files.

``python examples/moe_report.py`` draws and writes those of ``examples/results``; the study does so by itself.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
RENORMALIZED = RESULTS / "renormalized"
NOTEBOOK = ROOT / "notebooks" / "moe_balance.ipynb"
ROUTED = ("unbalanced", "losses", "bias")
DENSE = ("dense (active)", "dense (total)")
_COLORS = {
    "unbalanced": "#8a94a6",
    "losses": "#d1495b",
    "bias": "#2a6f97",
    "dense (active)": "#c9a227",
    "dense (total)": "#4f772d",
}
_PANELS = {
    "effective_experts": "Effective experts",
    "max_vio": "Largest load over the mean, less one",
    "dead": "Share of dead experts",
    "entropy": "Entropy of a token's probabilities",
    "entropy_of_mean": "Entropy of the mean probabilities",
    "gap": "What a token says about its expert",
}


class Results:
    """What ``moe_study.save`` wrote into a folder."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        about = json.loads((folder / "moe_study.json").read_text())
        self.setting: dict[str, Any] = about["setting"]
        self.machine: dict[str, Any] = about["machine"]
        self.arms: dict[str, dict[str, Any]] = {arm["name"]: arm for arm in about["arms"]}
        self.steps, self.windows = (_table(folder / f"moe_study_{name}.csv") for name in ("steps", "windows"))

    def column(self, arm: str, layer: int, name: str) -> list[float]:
        """A measure, window by window."""
        return [row[name] for row in self.windows if row["arm"] == arm and row["layer"] == layer]

    def mean_of_layers(self, arm: str, name: str) -> list[float]:
        layers = [self.column(arm, layer, name) for layer in range(self.setting["layers"])]
        return [sum(values) / len(values) for values in zip(*layers, strict=True)]

    def ends(self) -> list[int]:
        """The last step of each window."""
        return sorted({int(row["step"]) for row in self.windows})

    def losses(self, arm: str) -> list[float]:
        """Means over windows."""
        values, window = [row["loss"] for row in self.steps if row["arm"] == arm], self.setting["window"]
        return [sum(values[end - window : end]) / window for end in self.ends()]

    def rate(self, arm: str) -> float:
        """Tokens a second, of the median step: on the CPU of processor time, all threads' together."""
        return self.setting["batch"] * self.setting["length"] / self.arms[arm]["step_seconds"]


def _table(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {name: value if name == "arm" else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def utilisation(results: Results) -> Any:
    """Which share of all choices fell on each expert."""
    layers = results.setting["layers"]
    figure, axes = _figure(len(ROUTED), layers, (4.6 * layers, 2.1 * len(ROUTED)))
    experts = range(results.setting["experts"])
    for row, arm in enumerate(ROUTED):
        for layer in range(layers):
            axis = axes[row][layer]
            loads = [results.column(arm, layer, f"load_{expert}") for expert in experts]
            axis.stackplot(results.ends(), loads, colors=[_shade(expert, len(experts)) for expert in experts])
            axis.set(title=f"{arm}, layer {layer + 1}", xlim=(results.ends()[0], results.ends()[-1]), ylim=(0, 1))
            axis.set(xlabel="step" if row == len(ROUTED) - 1 else "", ylabel="share of choices" if layer == 0 else "")
    return figure


def _shade(expert: int, experts: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](expert / max(1, experts - 1))


def balance(results: Results) -> Any:
    """The measures of :func:`inlay.router_stats`: means of the layers, and thin lines for each."""
    figure, axes = _figure(2, 3, (12.5, 5.8))
    for axis, (name, title) in zip([axis for row in axes for axis in row], _PANELS.items(), strict=True):
        for arm in ROUTED:
            axis.plot(results.ends(), results.mean_of_layers(arm, name), color=_COLORS[arm], linewidth=2, label=arm)
            for layer in range(results.setting["layers"]):
                axis.plot(results.ends(), results.column(arm, layer, name), color=_COLORS[arm], linewidth=0.6)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axes[0][0].legend()
    return figure


def training(results: Results) -> Any:
    """Losses, and what a second brings."""
    figure, (axes,) = _figure(1, 3, (12.5, 3.6))
    for arm, color in _COLORS.items():
        axes[0].plot(results.ends(), results.losses(arm), color=color, label=arm)
    third = max(results.losses(arm)[min(2, len(results.ends()) - 1)] for arm in _COLORS)
    axes[0].set(title="Training loss", xlabel="step")
    axes[0].set_ylim(top=third)  # before that all fall alike
    axes[0].legend()
    names = list(_COLORS)
    for axis, title, values, form in (
        (axes[1], "Validation loss", [results.arms[arm]["validation"] for arm in names], "{:.3f}"),
        (axes[2], "Tokens per second of training", [results.rate(arm) for arm in names], "{:,.0f}"),
    ):
        bars = axis.barh(names, values, color=[_COLORS[arm] for arm in names])
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.invert_yaxis()
        axis.set_title(title)
        axis.margins(x=0.2)
        axis.set_xlim(left=0.9 * min(values) if axis is axes[1] else 0)
    return figure


FIGURES = {"utilisation": utilisation, "balance": balance, "training": training}


def draw(name: str, results: Results) -> Any:
    """One of FIGURES, in the demo's style."""
    import matplotlib

    from inlay.demo.plot import STYLE

    with matplotlib.rc_context(STYLE):
        return FIGURES[name](results)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def summary(results: Results) -> str:
    """What was measured, as Markdown."""
    setting = results.setting
    lines = [
        f"{setting['layers']} layers {setting['hidden']} wide, {setting['experts']} experts "
        f"{setting['expert_width']} wide, {setting['top_k']} of them a token, weighted by their probabilities"
        f"{', which are made to add up to one' if setting['renormalize'] else ''}; {setting['steps']} steps of "
        f"{setting['batch']} x {setting['length']} tokens (bytes), AdamW, seed {setting['seed']}. "
        f"{results.machine['device']}; torch {results.machine['torch']}.",
        "",
        "| model | parameters | of them active | validation loss | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for arm, about in results.arms.items():
        lines.append(
            f"| {arm} | {about['parameters']:,} | {about['active_parameters']:,} | {about['validation']:.4f} | "
            f"{results.rate(arm):,.0f} |"
        )
    lines += [
        "",
        f"Routers in the last {setting['window']} steps, layer by layer:",
        "",
        "| model | layer | effective experts | dead | largest load / mean - 1 | entropy | of the mean | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ROUTED:
        for layer in range(setting["layers"]):
            value = {name: results.column(arm, layer, name)[-1] for name in _PANELS}
            dead = round(value["dead"] * setting["experts"])
            lines.append(
                f"| {arm} | {layer + 1} | {value['effective_experts']:.2f} | {dead} of {setting['experts']} | "
                f"{value['max_vio']:.2f} | {value['entropy']:.2f} | {value['entropy_of_mean']:.2f} | "
                f"{value['gap']:.2f} |"
            )
    lines += ["", *_findings(results), ""]
    return "\n".join(lines)


def _findings(results: Results) -> list[str]:
    """Sentences that the numbers decide."""
    experts, lines = results.setting["experts"], []
    for arm in ROUTED:
        deaths = [
            (
                layer + 1,
                next((end for end, share in zip(results.ends(), dead, strict=True) if share > 0), None),
                dead[-1],
            )
            for layer in range(results.setting["layers"])
            for dead in [results.column(arm, layer, "dead")]
        ]
        parts = [
            f"layer {layer} has its first dead expert by step {first} and {round(end * experts)} at the end"
            if first is not None
            else f"layer {layer} never has a dead expert"
            for layer, first, end in deaths
        ]
        lines.append(f"- **{arm}**: {'; '.join(parts)}.")
    base = results.arms["unbalanced"]["validation"]
    for arm in (*ROUTED[1:], *DENSE):
        difference = results.arms[arm]["validation"] - base
        word = "lower" if difference < 0 else "higher"
        lines.append(f"- The validation loss of **{arm}** is {abs(difference):.4f} {word} than unbalanced.")
    routed = max(ROUTED[1:], key=results.rate)
    for arm in DENSE:
        ratio = results.rate(routed) / results.rate(arm)
        lines.append(f"- Sparse ({routed}) trains {ratio:.2f} times as many tokens a second as **{arm}**.")
    return lines


def _renormalized(report: str) -> str:
    """What the other setting in the tree says; ``report`` is the way to its document."""
    results = Results(RENORMALIZED)
    losses = ", ".join(f"{about['validation']:.4f} {arm}" for arm, about in results.arms.items())
    layers = range(results.setting["layers"])
    used = "; ".join(
        f"{arm} " + " and ".join(f"{results.column(arm, layer, 'effective_experts')[-1]:.2f}" for layer in layers)
        for arm in ROUTED
    )
    return (
        "The same with weights that are made to add up to one, as in Mixtral (`--renormalize`, [its own report]"
        f"({report})): validation losses {losses}; effective experts at the end, by layer: {used}."
    )


_INTRODUCTION = """\
# Do experts stay in balance?

Five small decoders learn the same bytes of Python's documentation, step by step in turn. Three have a mixture of
experts: `unbalanced` has nothing that keeps a router from giving all tokens to a few of them; `losses` adds
`inlay.load_balancing_loss` and `inlay.router_z_loss`; `bias` has no loss, but a bias that only chooses, moved against
the load after every step by `inlay.update_router_bias`. Two are dense: one with the FLOPs of these, one with their
parameters.

An expert is dead with less than a tenth of the mean load. Entropies are divided by the logarithm of the number of
experts: 1 is even. The gap, entropy of the mean less mean entropy, says how much a token tells about its expert;
collapse has both entropies low. One seed of a very small model for some minutes: it shows what balancing is for, not
which kind is best; and an expert sees a fraction of so few tokens, where a dense FFN sees all. On a CPU seconds are of
processor time, all threads' together; dense FFNs are PyTorch's matrix products.

Made by `python examples/moe_study.py`; every number and figure is from the files it wrote into `examples/results`."""


def document(results: Results) -> str:
    """``moe_study.md``: the whole report, beside its figures."""
    parts = [_INTRODUCTION, summary(results).strip(), *(f"![{name}](moe_study_{name}.svg)" for name in FIGURES)]
    if not results.setting["renormalize"] and results.folder.resolve() == RESULTS.resolve():
        parts.append(_renormalized("renormalized/moe_study.md"))
    return "\n\n".join(parts) + "\n"


def notebook(results: Results) -> str:
    """The notebook's file, without outputs, as every notebook here."""
    figures = "\n\n".join(f"![{name}](../examples/results/moe_study_{name}.svg)" for name in FIGURES)
    cells: list[tuple[str, str]] = [
        ("markdown", _INTRODUCTION),
        ("markdown", f"## What was measured\n\n{summary(results).strip()}\n\n{figures}"),
        ("markdown", _renormalized("../examples/results/renormalized/moe_study.md")),
        ("markdown", "## The files behind it\n\nThe same figures, drawn here from the results in the tree."),
        ("code", _FIND),
        ("code", _IMPORT),
        ("code", 'results = moe_report.Results()\nmoe_report.draw("utilisation", results)'),
        ("code", 'moe_report.draw("balance", results)'),
        ("code", 'moe_report.draw("training", results)'),
        ("markdown", "## A run of your own\n\nA tiny one, of seconds: raise `steps`, or change what you like."),
        ("code", _OWN_RUN),
    ]
    kinds = {"code": {"execution_count": None, "outputs": []}, "markdown": {}}
    content = {
        "cells": [
            {
                "cell_type": kind,
                "id": f"cell-{index:02}",
                "metadata": {},
                **kinds[kind],
                "source": text.splitlines(keepends=True),
            }
            for index, (kind, text) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


_FIND = """\
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "examples" / "moe_study.py").exists())
sys.path.insert(0, str(root / "examples"))
%matplotlib inline"""
_IMPORT = """\
import moe_report
import moe_study"""
_OWN_RUN = """\
from dataclasses import replace
from tempfile import mkdtemp

setting = replace(moe_study.QUICK, steps=24)
folder = Path(mkdtemp())
moe_study.save(moe_study.study(setting), setting, folder)
moe_report.draw("utilisation", moe_report.Results(folder))"""


def write(folder: Path = RESULTS) -> None:
    """Figures and ``moe_study.md`` beside the results; from those in the tree the notebook as well."""
    import matplotlib

    results = Results(folder)
    for name in FIGURES:
        with matplotlib.rc_context({"svg.hashsalt": "inlay"}):  # the same file from the same results
            draw(name, results).savefig(folder / f"moe_study_{name}.svg", metadata={"Date": None})
    (folder / "moe_study.md").write_text(document(results))
    if folder.resolve() == RESULTS.resolve():
        NOTEBOOK.write_text(notebook(results))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws and writes what moe_study.py has measured.")
    parser.add_argument("folder", type=Path, nargs="?", help="default: those in the tree")
    folder = parser.parse_args(arguments).folder
    for each in (RENORMALIZED, RESULTS) if folder is None else (folder,):
        write(each)


if __name__ == "__main__":
    main()
