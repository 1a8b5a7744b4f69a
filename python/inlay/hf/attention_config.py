"""Has transformers make Inlay's masks for a model whose attention layers are patched, and takes that back.

Which function makes a model's masks is told by the name of an attention implementation in its configuration, which all
its layers share. While layers are patched that name is ``"inlay"``, and remembers what it stands for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.hf.attention import NAME

_ATTRIBUTE = "_attn_implementation_internal"
_REPLACEABLE = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class Switched(str):
    """The name "inlay", in place of another. Copies are the same; pickled, it is the other name."""

    previous: str

    def __new__(cls, previous: str) -> Switched:
        name = super().__new__(cls, NAME)
        name.previous = previous
        return name

    def __copy__(self) -> Switched:
        return self

    def __deepcopy__(self, memo: dict) -> Switched:
        return self

    def __reduce__(self) -> tuple:
        return str, (self.previous,)


def switch(layer: nn.Module) -> None:
    """Names Inlay's attention in the layer's configuration, if one of transformers' own is named there."""
    config: Any = getattr(layer, "config", None)
    previous = getattr(config, _ATTRIBUTE, None)
    if previous in _REPLACEABLE and not getattr(config, "output_attentions", False):
        setattr(config, _ATTRIBUTE, Switched(previous))


def restore(layer: nn.Module) -> None:
    """Names again what :func:`switch` replaced; another name that was set since stays."""
    config: Any = getattr(layer, "config", None)
    name = getattr(config, _ATTRIBUTE, None)
    if isinstance(name, Switched):
        setattr(config, _ATTRIBUTE, name.previous)
