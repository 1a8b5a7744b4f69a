"""Says what ``patch`` would do to a model, from its configuration alone: the model is built without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.hf.patch import patch
from inlay.hf.report import Report


def inspect_model(model_id_or_path: str | Path) -> Report:
    """The report of patching a transformers model, a diffusers model or a diffusers pipeline, built on the meta device.

    Args:
        model_id_or_path: a folder with a ``config.json`` or a pipeline's ``model_index.json``, or an id on the Hugging
            Face Hub, from which only such files are fetched.

    Returns:
        The report; a pipeline's paths begin with the component's name.

    Raises:
        ValueError: nothing that names a model class of transformers or diffusers was found.
        ImportError: the package that has the class is not installed.
    """
    entries = []
    for prefix, model in _models(str(model_id_or_path)):
        wrapper = nn.ModuleDict({prefix: model}) if prefix else model
        entries += patch(wrapper).entries
    return Report(entries)


def _models(source: str) -> Iterator[tuple[str, nn.Module]]:
    index = _json(source, "model_index.json")
    if index is None:
        yield "", _model(source, "")
        return
    for component, value in index.items():
        if isinstance(value, list) and None not in value and _json(source, "config.json", component):
            yield component, _model(source, component)


def _model(source: str, subfolder: str) -> nn.Module:
    config = _json(source, "config.json", subfolder)
    if config is None:
        raise ValueError(f"inspect_model: {source!r} must have a config.json or a model_index.json, but has neither")
    with torch.device("meta"):
        if "_class_name" in config:
            return _diffusers_model(config)
        return _transformers_model(source, subfolder)


def _diffusers_model(config: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(config)


def _transformers_model(source: str, subfolder: str) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, subfolder=subfolder)
    for architecture in config.architectures or ():
        cls = getattr(transformers, architecture, None)
        if cls is not None:
            return cls._from_config(config)
    auto = transformers.AutoModelForCausalLM
    return (auto if type(config) in auto._model_mapping else transformers.AutoModel).from_config(config)


def _json(source: str, name: str, subfolder: str = "") -> dict[str, Any] | None:
    """A JSON file of a folder or of a repository on the Hub; None if it has no such file."""
    path = Path(source, subfolder, name)
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        found = cached_file(source, name, subfolder=subfolder, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        path = Path(found)
    return json.loads(path.read_text()) if path.is_file() else None
