"""Makes ``attn_implementation="inlay"`` and ``experts_implementation="inlay"`` known to transformers, whichever of the
two packages is imported first.

An attention has to be in two of transformers' registries: without a mask function under an attention's name, masks are
lost. Importing transformers' models takes seconds, so Inlay does not: it waits for someone else to.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.modeling_utils"


def register() -> None:
    """Registers attention, masks and experts. Where transformers has no registries, nothing happens."""
    from inlay.hf import experts
    from inlay.hf.attention import NAME, attention_forward
    from inlay.hf.masks import inlay_mask

    modeling_utils = sys.modules[_MODULE]
    try:
        masking_utils = importlib.import_module("transformers.masking_utils")
    except ImportError:  # an old transformers, whose import must not fail because of us
        return
    attentions = getattr(modeling_utils, "AttentionInterface", None)
    masks = getattr(masking_utils, "AttentionMaskInterface", None)
    if attentions is not None and masks is not None:
        masks.register(NAME, inlay_mask)
        attentions.register(NAME, attention_forward)
    try:
        moe = importlib.import_module("transformers.integrations.moe")
    except ImportError:
        return
    interface = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is not None and hasattr(interface, "register"):
        interface.register(experts.NAME, experts.experts_forward)


def register_when_imported() -> None:
    """Registers now if transformers' models are loaded, else as soon as they are."""
    if _MODULE in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the one module as all others would, and has it loaded by :class:`_Loader`."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader it stands for, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source and the like

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register()
