"""What `import inlay` does when a native part is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.system.environment import PACKAGE, SMOKE_TEST, make_environment, run_python


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "plain")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may take things from."""
    return shutil.copytree(PACKAGE, tmp_path / "inlay", ignore=shutil.ignore_patterns("__pycache__"))


def test_whole(python: Path, package: Path) -> None:
    ran = run_python(python, SMOKE_TEST, cwd=package.parent, path=package.parent)
    assert ran.returncode == 0, ran.stderr
    assert str(package) in ran.stdout


def test_without_the_cuda_library(python: Path, package: Path) -> None:
    (package / "lib" / "libinlay_cuda.so").unlink(missing_ok=True)
    script = SMOKE_TEST + "from inlay import _load; print(_load.cuda_library())"
    ran = run_python(python, script, cwd=package.parent, path=package.parent)
    assert ran.returncode == 0, ran.stderr
    assert "loaded=False" in ran.stdout
    assert "nvcc was not found when inlay was installed" in ran.stdout


def test_with_a_broken_cuda_library(python: Path, package: Path) -> None:
    """A library that does not load is reported, and the CPU ops work on."""
    (package / "lib" / "libinlay_cuda.so").write_bytes(b"not an ELF file")
    pretend_cuda = "import torch; torch.version.cuda = torch.version.cuda or '13.0'\n"
    script = pretend_cuda + SMOKE_TEST + "from inlay import _load; print(_load.cuda_library())"
    ran = run_python(python, script, cwd=package.parent, path=package.parent)
    assert ran.returncode == 0, ran.stderr
    assert "loaded=False" in ran.stdout
    assert "does not load with torch" in ran.stdout


def test_without_the_python_module(python: Path, package: Path) -> None:
    """A wheel of another Python version carries a `_native` that this one does not see."""
    for path in package.glob("_native*.so"):
        path.unlink()
    ran = run_python(python, SMOKE_TEST, cwd=package.parent, path=package.parent)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_without_the_cpu_library(python: Path, package: Path, damage: str) -> None:
    library = package / "lib" / "libinlay.so"
    library.unlink()
    if damage == "broken":
        library.write_bytes(b"not an ELF file")
    ran = run_python(python, "import inlay", cwd=package.parent, path=package.parent)
    assert ran.returncode != 0
    expected = {
        "missing": "native library libinlay.so is missing from",
        "broken": "libinlay.so does not load with torch",
    }
    assert f"ImportError: inlay: {expected[damage]}" in ran.stderr


def test_import_is_light(python: Path, package: Path) -> None:
    """`import inlay` brings in torch, and neither transformers nor diffusers: those come with the first patch."""
    script = "import sys, inlay; print(sorted({'transformers', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    ran = run_python(python, script, cwd=package.parent, path=package.parent)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_supported_python() -> None:
    assert (3, 10) <= sys.version_info[:2] < (3, 14)
