"""The report: what it counts and how it reads. And what ``inspect_model`` says without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import inlay
from inlay.hf.inspect import inspect_model
from tests.hf.models import LANGUAGE_MODELS, language_model, tokens


def _mixed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8))


def test_counts_calls_and_fallbacks() -> None:
    model = _mixed()
    before = inlay.report(model)
    assert [entry.reason for entry in before.entries][:2] == ["not patched (op layer_norm)"] * 2
    assert inlay.patch(model).calls == 0
    model(torch.randn(3, 8))
    model[0](torch.randn(3, 8))
    with torch.device("meta"):
        model[0].to("meta")(torch.randn(3, 8))
    report = inlay.report(model)
    first, second, group = report.entries
    assert (first.path, first.cls, first.op, first.backend) == ("0", "LayerNorm", "layer_norm", "cpu")
    assert (first.calls, second.calls, report.calls) == (2, 1, 3)
    assert first.fallbacks == report.fallbacks == {"no kernels for device meta": 1}
    assert group.op == ""
    assert group.reason == "it computes something else than Inlay's norms"
    assert report.patched == [first, second]
    assert report.unpatched == [group]


def test_text_has_a_line_per_class_and_op() -> None:
    model = _mixed()
    inlay.patch(model)
    model(torch.randn(3, 8))
    assert str(inlay.report(model)).splitlines() == [
        "Patched",
        "  class      op          modules  backend  calls  fallbacks",
        "  LayerNorm  layer_norm        2  cpu          2          0",
        "",
        "Left alone",
        "  class      modules  reason",
        "  GroupNorm        1  it computes something else than Inlay's norms",
    ]
    assert str(inlay.report(nn.Linear(2, 2))) == "Nothing to patch."


def test_text_gives_reasons_for_fallbacks() -> None:
    model = _mixed()
    inlay.patch(model)
    model[0].to("meta")(torch.randn(3, 8, device="meta"))
    text = str(inlay.report(model))
    assert "Fallbacks: calls that ran the module's own code\n" in text
    assert "  LayerNorm      1  no kernels for device meta" in text


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_inspect_a_language_model(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    report = inspect_model(tmp_path)
    expected = inlay.patch(model)
    assert [(e.path, e.cls, e.op) for e in report.entries] == [(e.path, e.cls, e.op) for e in expected.entries]
    assert {entry.backend for entry in report.patched} == {"meta"}


def test_inspect_a_config_that_names_no_class(tmp_path: Path) -> None:
    language_model("llama").config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("architectures", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert len(inspect_model(tmp_path).patched) == sum(LANGUAGE_MODELS["llama"][2].values())


def test_inspect_a_diffusers_model_and_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.hf.test_diffusion_models import DENOISERS

    build, found = DENOISERS["stable_diffusion"]
    model, _ = build()
    model.save_config(tmp_path / "unet")
    assert len(inspect_model(tmp_path / "unet").patched) == sum(found.values())
    text = language_model("llama")
    text.config.architectures = ["LlamaForCausalLM"]
    text.config.save_pretrained(tmp_path / "text_encoder")
    index = {
        "_class_name": "AnyPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "LlamaForCausalLM"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    report = inspect_model(str(tmp_path))
    assert {entry.path.split(".")[0] for entry in report.patched} == {"text_encoder", "unet"}


def test_inspect_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have a config.json or a model_index.json"):
        inspect_model(tmp_path)


def test_inlay_needs_only_torch() -> None:
    code = (
        "import sys, torch, inlay; inlay.patch(torch.nn.LayerNorm(4));"
        "assert not {'transformers', 'diffusers', 'accelerate', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_calls_are_not_counted_but_eager_ones_are() -> None:
    model = language_model("llama")
    inlay.patch(model)
    model(tokens(model))
    calls = inlay.report(model).calls
    assert calls == 7
    torch.compile(model, backend="eager")(tokens(model))
    assert inlay.report(model).calls == calls
