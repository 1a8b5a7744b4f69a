"""One picture of a run: the loss curves, their difference against what rounding does, and throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inlay.demo.generate import Generation
from inlay.demo.train import Training

_UNPATCHED, _PATCHED, _NOISE, _INK, _FAINT = "#8a94a6", "#d1495b", "#c9ced6", "#22272e", "#e6e8ec"
_SMALLEST = 1e-7
"""Where equal losses are drawn on the logarithmic axis: below one unit in the last place of any loss above 1."""
STYLE: Any = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _NOISE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def draw(training: Training | None, generation: Generation, title: str, path: Path) -> None:
    """Write the picture to ``path``. Needs matplotlib."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        panels = 3 if training else 1
        figure = Figure(figsize=(4.4 * panels, 3.9), dpi=160, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if training:
            _losses(axes[0], training)
            _differences(axes[1], training)
        _throughput(axes[-1], training, generation)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="#5b6472")
        figure.savefig(path)


def _losses(axis: Any, training: Training) -> None:
    steps = range(1, len(training.unpatched.losses) + 1)
    axis.plot(steps, training.unpatched.losses, color=_UNPATCHED, linewidth=4.5, label="unpatched")
    axis.plot(steps, training.patched.losses, color=_PATCHED, linewidth=1.5, label="patched")
    axis.set(title="Training loss", xlabel="step")
    axis.grid(axis="y", color=_FAINT)
    axis.legend()


def _differences(axis: Any, training: Training) -> None:
    reference = training.unpatched.losses
    steps = range(1, len(reference) + 1)
    for run, color, label in (
        (training.nudged, _UNPATCHED, "unpatched, weights nudged by\none unit in the last place"),
        (training.patched, _PATCHED, "patched"),
    ):
        distances = [max(abs(a - b), _SMALLEST) for a, b in zip(run.losses, reference, strict=True)]
        axis.plot(steps, distances, color=color, label=label)
    axis.set(title="Distance from the unpatched loss", xlabel="step", yscale="log")
    axis.set_ylim(_SMALLEST / 2, axis.get_ylim()[1] * 30)  # room for the legend
    axis.grid(axis="y", color=_FAINT)
    axis.legend(loc="upper left")


def _throughput(axis: Any, training: Training | None, generation: Generation) -> None:
    decoded = max(1, len(generation.unpatched.tokens) - 1)
    before, after = generation.unpatched, generation.patched
    kinds = [
        (
            "prefill",
            generation.prompt_length / before.prefill_seconds,
            generation.prompt_length / after.prefill_seconds,
        ),
        ("decode", decoded / before.decode_seconds, decoded / after.decode_seconds),
    ]
    if training:
        tokens = training.tokens_per_step
        kinds.insert(0, ("training", tokens / training.unpatched.step_seconds, tokens / training.patched.step_seconds))
    for place, (_, unpatched, patched) in enumerate(kinds):
        ratio = patched / unpatched
        axis.bar(place - 0.19, 1.0, 0.36, color=_UNPATCHED)
        axis.bar(place + 0.19, ratio, 0.36, color=_PATCHED)
        axis.annotate(f"{unpatched:,.0f}", (place - 0.19, 1.0), (0, 3), textcoords="offset points", ha="center")
        axis.annotate(f"{patched:,.0f}", (place + 0.19, ratio), (0, 3), textcoords="offset points", ha="center")
    labels = [f"{name}\n{patched / unpatched:.2f}x" for name, unpatched, patched in kinds]
    axis.set_xticks(range(len(kinds)), labels)
    axis.set(title="Tokens per second", ylabel="relative to unpatched")
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.15)
