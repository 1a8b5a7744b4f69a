"""Reads transformers' mask functions: of each query the range of keys that one lets it see.

A mask function ``f(batch, head, query, key)`` is made by one of transformers' factories (``sliding_window_overlay(w)``)
or composed of others (``and_masks``, ``or_masks``). Which factory made it is told by the code object, what it was made
with by its closure. Each factory is tried out once: where what it makes hides other keys than is said here, it is not
read.

Positions are counted as the mask functions count them: from the first token of the batch row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNLIMITED = float("inf")


class Span(NamedTuple):
    """Keys [begin, end) of each query, [B or 1, Sq]; None: from the first, to the last."""

    begin: Tensor | None = None
    end: Tensor | None = None

    def __and__(self, other: Span) -> Span:
        return Span(_both(torch.maximum, self.begin, other.begin), _both(torch.minimum, self.end, other.end))

    def __or__(self, other: Span) -> Span:
        """Of two that overlap or touch."""
        begin = None if self.begin is None or other.begin is None else torch.minimum(self.begin, other.begin)
        return Span(begin, None if self.end is None or other.end is None else torch.maximum(self.end, other.end))

    def moved(self, by: Tensor) -> Span:
        return Span(*(None if bound is None else bound + by for bound in self))


@dataclass
class Values:
    """Of tensors' values, what spans depend on.

    Attributes:
        there: [B, S] bool, the padding mask; None if there is none.
        conditions: bool tensors without dimensions, which have to be True for the spans to be right.
    """

    there: Tensor | None = None
    conditions: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Pattern:
    """A mask function as it was made: by which factory, with what, out of which others."""

    kind: str
    made_with: dict[str, Any]
    parts: tuple[Pattern, ...] = ()

    @property
    def is_causal(self) -> bool:
        return "causal_mask_function" in self.kinds()

    def kinds(self) -> Iterator[str]:
        yield self.kind
        for part in self.parts:
            yield from part.kinds()

    def limit(self, from_the_start: bool) -> float:
        """The most keys among which it hides no more than causal attention, or nothing if it is not causal."""
        match self.kind:
            case "causal_mask_function" | "bidirectional_mask_function":
                return UNLIMITED
            case "and_masks":
                return min(part.limit(from_the_start) for part in self.parts)
            case "sliding_window_overlay":
                return self.made_with["sliding_window"]
            case "sliding_window_bidirectional_overlay":
                return self.made_with["sliding_window"] + 1
            case "chunked_overlay" if from_the_start:
                return self.made_with["chunk_size"]
        return 0

    def span(self, queries: Tensor, values: Values) -> Span:
        """What it lets queries at these positions [B or 1, Sq] see."""
        return _SPANS[self.kind](self, queries, values)


def read(function: Any) -> Pattern | None:
    """The function's pattern, or None if not all of it is known."""
    pattern = _read(function, _factories())
    return pattern if pattern is not None and _is_in_order(pattern) else None


def _read(function: Any, factories: dict[CodeType, str]) -> Pattern | None:
    code = getattr(function, "__code__", None)
    kind = None if code is None else factories.get(code)
    if code is None or kind is None:
        return None
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    made_with = {name: cell.cell_contents for name, cell in cells}
    parts = [_read(part, factories) for part in _parts(made_with)]
    if None in parts:
        return None
    return Pattern(kind, made_with, tuple(part for part in parts if part is not None))


def _parts(made_with: dict[str, Any]) -> tuple:
    inner = made_with.get("mask_function")
    return made_with.get("mask_functions", () if inner is None else (inner,))


def _is_in_order(pattern: Pattern, within: str = "") -> bool:
    """Positions within packed sequences mean something within these alone, and blocks see what else is seen besides."""
    kinds = [part.kind for part in pattern.parts]
    if pattern.kind == "blockwise_overlay" and within != "or_masks":
        return False
    if pattern.kind == "or_masks" and not set(kinds) - {"blockwise_overlay"}:
        return False
    if "remap_positions_for_packed_sequence" in kinds and "packed_sequence_mask_function" not in kinds:
        return False
    if pattern.kind == "remap_positions_for_packed_sequence" and within != "and_masks":
        return False
    return all(_is_in_order(part, pattern.kind) for part in pattern.parts)


def _both(choose: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)


def _causal(_: Pattern, queries: Tensor, __: Values) -> Span:
    return Span(end=queries + 1)


def _bidirectional(*_: Any) -> Span:
    return Span()


def _window(pattern: Pattern, queries: Tensor, _: Values) -> Span:
    return Span(queries + 1 - pattern.made_with["sliding_window"])


def _window_to_both_sides(pattern: Pattern, queries: Tensor, _: Values) -> Span:
    keys = pattern.made_with["sliding_window"]
    return Span(queries - keys, queries + keys + 1)


def _chunk(pattern: Pattern, queries: Tensor, _: Values) -> Span:
    size, first = pattern.made_with["chunk_size"], pattern.made_with["left_padding"].to(queries.device)[:, None]
    begin = (queries - first) // size * size + first
    return Span(begin, begin + size)


def _block(pattern: Pattern, queries: Tensor, values: Values) -> Span:
    """The run of tokens with the query's number; its own key where it has none (a number below 0)."""
    numbers = pattern.made_with["block_sequence_ids"].to(queries.device)
    if values.there is not None:  # padding may have a block's number, and is seen by nobody
        there = torch.nn.functional.pad(values.there, (0, numbers.shape[1] - values.there.shape[1]))
        numbers = numbers.masked_fill(~there, -1)
    starts = _starts(numbers)
    # Were there two runs of one number, they would see each other.
    unlike = torch.where(starts & (numbers >= 0), numbers, -1 - torch.arange(numbers.shape[1], device=numbers.device))
    in_order = unlike.sort(1).values
    values.conditions.append((in_order[:, 1:] != in_order[:, :-1]).all())
    run, in_block = _run(starts, queries), _at(numbers, queries) >= 0
    return Span(torch.where(in_block, run[0], queries), torch.where(in_block, run[1], queries + 1))


def _packed(pattern: Pattern, queries: Tensor, _: Values) -> Span:
    return Span(*_run(_starts(pattern.made_with["packed_sequence_mask"].to(queries.device)), queries))


def _within_packed(pattern: Pattern, queries: Tensor, values: Values) -> Span:
    """Counted from the start of the packed sequence, in which positions rise by one."""
    positions = _at(pattern.made_with["position_ids"].to(queries.device), queries)
    return pattern.parts[0].span(positions, values).moved(queries - positions)


def _and(pattern: Pattern, queries: Tensor, values: Values) -> Span:
    return functools.reduce(Span.__and__, (part.span(queries, values) for part in pattern.parts))


def _or(pattern: Pattern, queries: Tensor, values: Values) -> Span:
    """Everything that is read lets a query see its own key, so that the parts overlap."""
    return functools.reduce(Span.__or__, (part.span(queries, values) for part in pattern.parts))


_SPANS: dict[str, Callable[[Pattern, Tensor, Values], Span]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _bidirectional,
    "sliding_window_overlay": _window,
    "sliding_window_bidirectional_overlay": _window_to_both_sides,
    "chunked_overlay": _chunk,
    "blockwise_overlay": _block,
    "packed_sequence_mask_function": _packed,
    "remap_positions_for_packed_sequence": _within_packed,
    "and_masks": _and,
    "or_masks": _or,
}


def _starts(numbers: Tensor) -> Tensor:
    """Where a run of equal numbers begins, [B, S]."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return starts


def _run(starts: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the run that each query is in."""
    tokens, count = torch.arange(starts.shape[1], device=starts.device), starts.shape[1]
    begins = torch.where(starts, tokens, 0).cummax(1).values
    following = torch.where(starts, tokens, count).roll(-1, 1)
    following[:, -1:] = count
    ends = following.flip(1).cummin(1).values.flip(1)
    return _at(begins, queries), _at(ends, queries)


def _at(values: Tensor, queries: Tensor) -> Tensor:
    """Values [B, S] of the tokens at these positions [B or 1, Sq]."""
    return values.gather(1, queries.expand(values.shape[0], -1))


@functools.cache
def _factories() -> dict[CodeType, str]:
    """By the code of the functions that transformers' factories make: the factories' names."""
    from transformers import masking_utils

    found = {}
    for kind in _SPANS:
        factory = getattr(masking_utils, kind, None)
        code = getattr(factory, "__code__", None)
        if not isinstance(code, CodeType):
            continue
        inner = [const for const in code.co_consts if isinstance(const, CodeType) and not const.co_name.startswith("<")]
        if len(inner) <= 1:  # none: it is a mask function itself
            found[inner[0] if inner else code] = kind
    return {code: kind for code, kind in found.items() if _does_what_is_said(kind, masking_utils, found)}


def _does_what_is_said(kind: str, factory: Any, factories: dict[CodeType, str]) -> bool:
    numbers = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2], [0, 0, 1, 1, 1, -1, -1, -1, 4, 4, 4, 4]])
    packed = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    examples: dict[str, Callable[[], Any]] = {
        "causal_mask_function": lambda: factory.causal_mask_function,
        "bidirectional_mask_function": lambda: factory.bidirectional_mask_function,
        "sliding_window_overlay": lambda: factory.sliding_window_overlay(3),
        "sliding_window_bidirectional_overlay": lambda: factory.sliding_window_bidirectional_overlay(3),
        "chunked_overlay": lambda: factory.chunked_overlay(4, torch.tensor([0, 3])),
        "blockwise_overlay": lambda: factory.or_masks(factory.causal_mask_function, factory.blockwise_overlay(numbers)),
        "packed_sequence_mask_function": lambda: factory.packed_sequence_mask_function(packed),
        "remap_positions_for_packed_sequence": lambda: factory.and_masks(
            factory.packed_sequence_mask_function(packed),
            factory.remap_positions_for_packed_sequence(factory.sliding_window_overlay(2), positions),
        ),
        "and_masks": lambda: factory.and_masks(factory.causal_mask_function, factory.sliding_window_overlay(4)),
        "or_masks": lambda: factory.or_masks(factory.causal_mask_function, factory.sliding_window_overlay(4)),
    }
    with torch.device("cpu"):
        try:
            function = examples[kind]()
            pattern = _read(function, factories)
            if pattern is None:
                return False
            tokens = torch.arange(12)
            batch = torch.arange(2)[:, None, None, None]
            expected = function(batch, torch.zeros_like(batch), tokens[:, None], tokens).expand(2, 1, 12, 12)
            begin, end = pattern.span(tokens[None], Values())
            seen = torch.ones(2, 12, 12, dtype=torch.bool)
            if begin is not None:
                seen &= tokens >= begin[..., None]
            if end is not None:
                seen &= tokens < end[..., None]
            return torch.equal(seen[:, None], expected)
        except Exception:  # whatever another release's function raises, it is not the one known
            return False
