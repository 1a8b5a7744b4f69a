"""A wheel holds what it should, and works in another environment, away from the source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.system.environment import (
    PACKAGE,
    ROOT,
    SMOKE_TEST,
    make_environment,
    other_pythons_with_torch,
    run_python,
)

pytest.importorskip("scikit_build_core")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPU wheel, not optimised, and with a build folder that stays: compiling is not what is tested here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ROOT / "build" / "test-wheel"
    settings = (f"build-dir={build}", "cmake.build-type=Debug", "cmake.define.INLAY_CUDA=OFF")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    for setting in settings:
        command += ["--config-settings", setting]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=1200)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("inlay-*.whl")
    return path


def test_contents(wheel: Path) -> None:
    """Every Python file of the package, the native libraries, the licence; nothing else."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"inlay/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    native = {name for name in names if name.endswith(".so")}
    assert names - native == sources | {"inlay/py.typed"}
    assert "inlay/lib/libinlay.so" in native
    assert {name.split(".")[0] for name in native - {"inlay/lib/libinlay.so"}} == {"inlay/_native"}


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "Requires-Dist: torch>=2.11" in read["METADATA"].splitlines()
    assert "License-Expression: Apache-2.0" in read["METADATA"].splitlines() or "LICENSE" in read
    assert "inlay = inlay.cli:main" in read["entry_points.txt"].splitlines()


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip into a second environment of this Python, with this torch."""
    python = make_environment(tmp_path / "second")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    ran = run_python(python, SMOKE_TEST, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "second") in ran.stdout, "another copy of inlay was imported"


def test_libraries_run_with_another_python_and_torch(wheel: Path, tmp_path: Path) -> None:
    """The op libraries know neither Python's version nor torch's; only the optional pybind11 module does."""
    if not other_pythons_with_torch():
        pytest.skip("no other Python from 3.10 to 3.13 with torch 2.11 or later is on PATH")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if not name.startswith("inlay/_native")])
    for python in other_pythons_with_torch():
        ran = run_python(python, SMOKE_TEST, cwd=tmp_path, path=tmp_path)
        assert ran.returncode == 0, f"{python}: {ran.stderr}"
