"""What ``patch`` did to a model, and how its modules have run since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from inlay.hf.binding import Binding, Plan

# The op of attention that is not patched, but whose model was told attn_implementation="inlay".
REGISTRY_OP = "attention"


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        path: its name in the model ("model.layers.0.input_layernorm").
        cls: its class's name.
        op: the op it is patched with; "" if none.
        backend: device type its weights are on, or those its patched calls ran on ("cpu", "cuda").
        calls: calls that ran Inlay's op.
        fallbacks: calls that ran the module's own code, by reason.
        reason: why it is not patched; "" if it is.
    """

    path: str
    cls: str
    op: str = ""
    backend: str = ""
    calls: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def patched(cls, path: str, module: nn.Module, binding: Binding) -> Entry:
        devices = binding.calls or [parameter.device for parameter in module.parameters()]
        return cls(
            path,
            type(module).__name__,
            binding.plan.op,
            "+".join(sorted({device.type for device in devices})),
            sum(binding.calls.values()),
            dict(binding.fallbacks),
        )

    @classmethod
    def registered(
        cls, path: str, module: nn.Module, op: str, calls: Counter[torch.device], fallbacks: Counter[str]
    ) -> Entry:
        """A module that has called Inlay's function in one of transformers' registries."""
        devices = sorted({device.type for device in calls})
        return cls(path, type(module).__name__, op, "+".join(devices), calls.total(), dict(fallbacks))

    @classmethod
    def unpatched(cls, path: str, module: nn.Module, plan: Plan | str) -> Entry:
        reason = plan if isinstance(plan, str) else f"not patched (op {plan.op})"
        return cls(path, type(module).__name__, reason=reason)


@dataclass(frozen=True)
class Report:
    """Entries for every patched module, for attention and experts that ``attn_implementation="inlay"`` and
    ``experts_implementation="inlay"`` have run, and for every module that looks as if it could be patched.

    ``str(report)`` is a table with a line per class and op.
    """

    entries: list[Entry]

    @property
    def patched(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.op]

    @property
    def unpatched(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.op]

    @property
    def calls(self) -> int:
        return sum(entry.calls for entry in self.entries)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that ran a module's own code, by reason."""
        total: Counter[str] = Counter()
        for entry in self.entries:
            total.update(entry.fallbacks)
        return dict(total)

    def __str__(self) -> str:
        sections = [
            ("Patched", ("class", "op", "modules", "backend", "calls", "fallbacks"), self._patched_rows()),
            ("Fallbacks: calls that ran the module's own code", ("class", "calls", "reason"), self._fallback_rows()),
            ("Left alone", ("class", "modules", "reason"), self._unpatched_rows()),
        ]
        tables = [f"{title}\n{_table(header, rows)}" for title, header, rows in sections if rows]
        return "\n\n".join(tables) or "Nothing to patch."

    def _patched_rows(self) -> list[tuple]:
        rows = []
        for (cls, op), entries in _grouped(self.patched, lambda entry: (entry.cls, entry.op)):
            backends = sorted({entry.backend for entry in entries})
            fallbacks = sum(sum(entry.fallbacks.values()) for entry in entries)
            rows.append((cls, op, len(entries), " ".join(backends), sum(entry.calls for entry in entries), fallbacks))
        return rows

    def _fallback_rows(self) -> list[tuple]:
        counts: Counter[tuple[str, str]] = Counter()
        for entry in self.patched:
            for reason, count in entry.fallbacks.items():
                counts[entry.cls, reason] += count
        return [(cls, count, reason) for (cls, reason), count in counts.items()]

    def _unpatched_rows(self) -> list[tuple]:
        groups = _grouped(self.unpatched, lambda entry: (entry.cls, entry.reason))
        return [(cls, len(entries), reason) for (cls, reason), entries in groups]


def _grouped(
    entries: Iterable[Entry], key: Callable[[Entry], tuple[str, str]]
) -> list[tuple[tuple[str, str], list[Entry]]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.items())


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Columns of text to the left, of numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(header))]
    numeric = [isinstance(rows[0][column], int) for column in range(len(header))]
    return "\n".join(
        "  "
        + "  ".join(
            str(cell).rjust(width) if number else str(cell).ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
