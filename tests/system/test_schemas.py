"""Schemas are a promise: exported programs and compiled models name them.

`schemas.txt` holds every schema ever released, one a line. A change must accept what each of them accepted, so
arguments are only added at the end, with defaults. A new op adds its line: `python -m tests.system.test_schemas` prints
those that are missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.system import ops

_FILE = Path(__file__).with_name("schemas.txt")
_PROMISED = _FILE.read_text().splitlines()


@pytest.mark.parametrize("promised", _PROMISED, ids=lambda line: line.split("(")[0])
def test_backward_compatible(promised: str) -> None:
    old = torch._C.parse_schema(promised)
    new = ops.schema(old.name.removeprefix("inlay::"))
    assert new.is_backward_compatible_with(old), f"promised: {promised}\nnow:      {new}"


def test_every_op_is_promised() -> None:
    assert _missing() == [], f"add these lines to {_FILE.name}"


def test_an_incompatible_change_is_noticed() -> None:
    """A new argument in the middle breaks callers; at the end, with a default, it does not."""
    old = torch._C.parse_schema("inlay::f(Tensor x, int n) -> Tensor")
    middle = torch._C.parse_schema("inlay::f(Tensor x, float eps, int n) -> Tensor")
    end = torch._C.parse_schema("inlay::f(Tensor x, int n, float eps=0.) -> Tensor")
    assert not middle.is_backward_compatible_with(old)
    assert end.is_backward_compatible_with(old)


def _missing() -> list[str]:
    promised = {line.split("(")[0] for line in _PROMISED}
    return [str(ops.schema(op)) for op in ops.registered() if f"inlay::{op}" not in promised]


if __name__ == "__main__":
    print("\n".join(_missing()))
