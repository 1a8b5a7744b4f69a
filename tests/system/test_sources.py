"""Rules that every source file keeps."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.system.environment import ROOT, interpreter

_PARSE = "import ast, sys; [ast.parse(open(name).read(), name) for name in sys.argv[1:]]"


def _sources(*folders: str, suffixes: tuple[str, ...]) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return [path for path in files if "lib" not in path.relative_to(ROOT).parts]


def test_python_3_10_can_read_every_file() -> None:
    """By a Python 3.10 where there is one, else by this Python's parser in its mode for 3.10, which is less strict."""
    files = _sources("python", "tests", "benchmarks", "examples", suffixes=(".py",))
    assert len(files) > 10
    python = interpreter("3.10")
    if sys.version_info[:2] == (3, 10) or python is None:
        for path in files:
            ast.parse(path.read_text(), str(path), feature_version=(3, 10))
    else:
        parsed = subprocess.run([python, "-c", _PARSE, *map(str, files)], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr


def test_only_bindings_see_torch() -> None:
    """Kernels take params structs, pointers and a stream: no torch header but the header-only number types."""
    allowed = re.compile(r"torch/(headeronly/util/(BFloat16|Half)\.h|csrc/stable/ops\.h)")
    offenders = []
    for path in _sources("csrc", suffixes=(".h", ".cuh", ".cu", ".cpp")):
        if {"cpu", "cuda"} & set(path.relative_to(ROOT).parts):
            for include in re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
                if not allowed.fullmatch(include):
                    offenders.append(f"{path.relative_to(ROOT)}: {include}")
    assert offenders == []


def test_bindings_use_the_stable_abi_only() -> None:
    offenders = []
    for path in _sources("csrc", suffixes=(".h", ".cuh", ".cu", ".cpp")):
        for include in re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
            if not include.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")):
                offenders.append(f"{path.relative_to(ROOT)}: {include}")
    assert offenders == []


def test_params_headers_are_plain() -> None:
    """What host and kernel share includes neither torch nor CUDA."""
    headers = list((ROOT / "csrc").glob("*/params.h"))
    assert headers
    for path in headers:
        assert re.findall(r"#include [<\"](?:torch|ATen|c10|cuda)", path.read_text()) == [], path
