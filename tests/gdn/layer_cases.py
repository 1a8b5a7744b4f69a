"""Inputs of a whole layer's step."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
STATES = ("conv_state", "state")


@dataclass(frozen=True)
class LayerCase:
    tokens: int = 1
    batch: int = 2
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 32
    width: int = 4
    columns: int = 4  # of the convolution's state
    conv_bias: bool = False
    parameters: torch.dtype | None = None  # of weights and vectors; None: mixed_qkv's
    beta_scale: float = 1.0

    def __str__(self) -> str:
        own = {name: value for name, value in vars(self).items() if value != getattr(LayerCase(), name)}
        return "-".join(f"{name}_{value}" for name, value in own.items()) or "plain"

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def inputs(self, dtype: torch.dtype, device: str = "cpu", state_dtype: torch.dtype | None = None) -> Tensors:
        """In the order of the op's arguments."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=wide).to(dtype)

        rows, parameters = (self.batch, self.tokens), self.parameters or dtype
        return {
            "mixed_qkv": normal(*rows, self.channels),
            "z": normal(*rows, self.value_heads, self.value_dim),
            "a": normal(*rows, self.value_heads),
            "b": normal(*rows, self.value_heads),
            "conv_weight": normal(self.channels, self.width, dtype=parameters) / 2,
            "conv_bias": normal(self.channels, dtype=parameters) if self.conv_bias else None,
            "A_log": normal(self.value_heads, dtype=parameters),
            "dt_bias": normal(self.value_heads, dtype=parameters),
            "norm_weight": normal(self.value_dim, dtype=parameters),
            "conv_state": normal(self.batch, self.channels, self.columns),
            "state": normal(self.batch, self.value_heads, self.key_dim, self.value_dim, dtype=state_dtype or wide),
        }

    def run(self, namespace: ModuleType, tensors: Tensors, **options: Any) -> Tensor:
        """On the tensors' own states."""
        options = {"key_heads": self.key_heads, "beta_scale": self.beta_scale, **options}
        return namespace.gdn_layer_step(**tensors, **options)


def with_own_states(tensors: Tensors) -> Tensors:
    return {**tensors, **{name: tensors[name].clone() for name in STATES}}


CASES = [
    LayerCase(),
    LayerCase(key_heads=1, value_heads=3, key_dim=64, value_dim=96, columns=3),
    LayerCase(key_heads=4, conv_bias=True, width=2, columns=6, batch=1),
    LayerCase(batch=3, key_heads=1, value_heads=2, key_dim=128, value_dim=128, parameters=torch.float32),
    LayerCase(key_dim=8, value_dim=200, width=7, columns=7, batch=1, beta_scale=2.0),
    LayerCase(key_dim=256, value_dim=256, key_heads=1, value_heads=2, batch=1),
    LayerCase(key_dim=136, value_dim=8, key_heads=1, value_heads=1, width=3, columns=2),
]
