"""The demo's text: the language reference that every CPython carries with it, as bytes."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

import torch
from torch import Tensor


class ByteTokenizer:
    """One token a byte of UTF-8, plus one that ends a text."""

    eos_token_id = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def documentation() -> str:
    """All topics of ``pydoc_data.topics`` in alphabetical order, about half a megabyte of English."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def training_batches(steps: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """[steps, batch_size, sequence_length] int64: passages of the documentation that start at random places."""
    text = torch.tensor(ByteTokenizer().encode(documentation()))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - sequence_length, (steps, batch_size, 1), generator=generator)
    return text[starts + torch.arange(sequence_length)]


def prompt_text(length: int) -> str:
    """The first ``length`` characters of the documentation's page on the ``if`` statement and what follows it."""
    text = documentation()
    start = text.index('The "if" statement')
    return text[start : start + length]
