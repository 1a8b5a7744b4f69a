"""Text for people at a terminal: tables, units, progress, and errors that need no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from shutil import get_terminal_size
from textwrap import indent as _indent
from typing import Any


class CommandError(Exception):
    """Something the user can put right. The command line prints the message and the hint, and exits with status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def heading(text: str) -> None:
    """Print a section title with air around it."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def indent(text: str) -> str:
    return _indent(text, "  ")


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what there is to say about each, in two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Underlined titles over aligned columns: the first to the left, the others, which hold numbers, to the right."""
    widths = [max(len(row[column]) for row in [title, *rows]) for column in range(len(title))]
    underline = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in [title, underline, *rows]
    )


def bytes_text(count: float) -> str:
    """A size in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


class Progress:
    """Iterates over range(total) with a progress bar: tqdm's if there is a terminal and tqdm, else ten plain lines."""

    def __init__(self, title: str, unit: str, total: int) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._note = ""
        self._bar: Any = None
        if sys.stderr.isatty() and find_spec("tqdm"):
            self._bar = import_module("tqdm").tqdm(
                total=total, desc=f"  {title}", unit=f" {unit}s", ncols=min(get_terminal_size().columns, 120)
            )

    def note(self, text: str) -> None:
        """What to show beside the bar."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)  # drawn by the next update

    def __iter__(self) -> Iterator[int]:
        lines = set(spread(self._total, 10))
        for index in range(self._total):
            yield index
            if self._bar is not None:
                self._bar.update()
            elif index in lines:
                print(f"  {self._title}: {self._unit} {index + 1} of {self._total}, {self._note}", flush=True)
        if self._bar is not None:
            self._bar.close()


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices spread evenly over range(total), the first and the last among them."""
    if total <= count:
        return list(range(total))
    return [round(part * (total - 1) / (count - 1)) for part in range(count)]
