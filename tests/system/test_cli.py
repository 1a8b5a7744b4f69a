"""The ``inlay`` command: what it prints, and that a mistake costs one clear line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

import inlay
from inlay import _info, _load, cli


def run_with_mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says to a call that it must refuse: one line, and a hint."""
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith(f"inlay {arguments[0]}: ")
    assert said[1].startswith("  hint: ")
    return said[0]


def test_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "inlay", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Inlay {inlay.info().version}\n")
    assert "inlay::norm" in done.stdout


def test_info_knows_what_is_loaded() -> None:
    info = inlay.info()
    text = str(info)
    assert info.torch == torch.__version__
    assert info.libraries[0] == _load.Library("libinlay.so", True)
    assert all("CPU" in devices for devices in info.ops.values())
    assert {"inlay::norm", "inlay::norm_bwd", "inlay::add_norm"} <= set(info.ops)
    for part in (info.version, info.python, "libinlay.so", "libinlay_cuda.so", "transformers", *info.ops):
        assert part in text


def test_info_says_why_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _load.Library("libinlay_cuda.so", False, "not built: nvcc was not found")
    monkeypatch.setattr(_load, "cuda_library", lambda: missing)
    assert "libinlay_cuda.so  not loaded: not built: nvcc was not found" in str(inlay.info())


def test_info_works_without_the_introspection_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inlay._native", None)
    info = inlay.info()
    assert info.build is None
    assert "no introspection module" in str(info)


def test_info_names_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_info, "_gpus", lambda: ("NVIDIA H200, compute capability 9.0, 139.8 GiB",))
    assert "GPU               NVIDIA H200" in str(inlay.info())


def test_inspect_shows_what_would_be_patched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    config.save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "Qwen3RMSNorm" in line)
    norms_per_layer, final = 4, 1
    assert row[:4] == ["Qwen3RMSNorm", "rms_norm", str(2 * norms_per_layer + final), "meta"]


def test_inspect_of_an_absent_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no folder" in run_with_mistake(capsys, "inspect", str(tmp_path / "absent"))


def test_inspect_of_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.json" in run_with_mistake(capsys, "inspect", str(tmp_path))


def test_demo_of_an_absent_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no folder" in run_with_mistake(capsys, "demo", "--device", "cpu", "--model", str(tmp_path / "absent"))


def test_demo_of_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    arguments = ("--device", "cpu", "--output", str(tmp_path), "--model", str(tmp_path / "model"))
    assert "--model" in run_with_mistake(capsys, "demo", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_demo_without_the_gpu_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "finds no GPU" in run_with_mistake(capsys, "demo", "--device", "cuda")


def test_demo_with_a_file_as_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "File exists" in run_with_mistake(capsys, "demo", "--device", "cpu", "--output", str(tmp_path / "file"))


def test_demo_with_too_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps 2" in run_with_mistake(capsys, "demo", "--steps", "2")


def test_demo_with_an_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no op flash" in run_with_mistake(capsys, "demo", "--ops", "rms_norm,flash")


@pytest.mark.parametrize("arguments", [("demo",), ("inspect", "model")])
def test_without_transformers(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "transformers is not installed" in run_with_mistake(capsys, *arguments)


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--steps", "0"], ["demo", "--device", "tpu"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: inlay" in capsys.readouterr().err
