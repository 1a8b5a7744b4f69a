"""Stand-ins: instances of a model's classes that are tried out in the place of its modules."""

from __future__ import annotations

from typing import Any


def uninitialised(cls: type) -> Any:
    """An instance that no constructor has seen.

    Not ``cls.__new__(cls)``: that of the classes which FSDP2 derives calls the original class's ``__init__``.
    """
    return object.__new__(cls)
