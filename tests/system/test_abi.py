"""The native libraries ask of other libraries only what torch 2.11 offers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.environment import PACKAGE

_SHIMS = Path(__file__).with_name("torch_2_11_shims.txt")
_SCHEMAS = Path(__file__).with_name("schemas.txt")
_SYSTEM_LIBRARY = r"(libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux[\w-]*)\.so"

pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")


@pytest.fixture(params=["libinlay.so", "libinlay_cuda.so"])
def library(request: pytest.FixtureRequest) -> Path:
    path = PACKAGE / "lib" / request.param
    if not path.is_file():
        pytest.skip(f"{path.name} was not built")
    return path


def test_undefined_symbols(library: Path) -> None:
    """Symbols of libc and libstdc++ carry a version; all others must be torch 2.11's C functions.

    So no C++ symbol of torch, c10 or ATen can slip in, whose name or layout may change with any release.
    """
    allowed = {line for line in _SHIMS.read_text().splitlines() if not line.startswith("#")}
    unversioned = {name for name in _undefined(library) if "@" not in name}
    assert unversioned, "no symbol of torch at all: readelf's output was not understood"
    assert sorted(unversioned - allowed) == []


def test_every_op_is_registered(library: Path) -> None:
    """A binding that is left out of one library's sources is an op that one device lacks."""
    content = library.read_bytes()
    names = [line.split("(")[0].removeprefix("inlay::") for line in _SCHEMAS.read_text().splitlines()]
    assert names
    # Without the zero before it: linkers put a name that ends another one, as norm does add_norm, into its place.
    assert [name for name in names if f"{name}\0".encode() not in content] == []


def test_needed_libraries(library: Path) -> None:
    """No second OpenMP runtime, no CUDA runtime to be found, no path of the machine that built it."""
    dynamic = _readelf("--dynamic", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    system = {name for name in needed if re.match(_SYSTEM_LIBRARY, name)}
    expected = {"libtorch_cpu.so"}
    if library.name == "libinlay_cuda.so":
        # Recorded even where torch has no such library to link, so that the loader finds the current stream in it.
        expected.add("libtorch_cuda.so")
    assert needed - system == expected
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_libraries_share_no_names() -> None:
    """Both hold the same bindings, compiled for different devices. If both exported a function, the loader could bind
    one library's call to the other's code.
    """
    exports = [
        {name for section, name in _symbols(path) if section != "UND" and "inlay" in name}
        for path in sorted((PACKAGE / "lib").glob("libinlay*.so"))
    ]
    if len(exports) < 2:
        pytest.skip("libinlay_cuda.so was not built")
    assert exports[0] & exports[1] == set()


def _undefined(library: Path) -> set[str]:
    return {name for section, name in _symbols(library, weak=False) if section == "UND"}


def _symbols(library: Path, weak: bool = True) -> list[tuple[str, str]]:
    """(section, name) of every dynamic symbol; undefined ones have the section UND."""
    rows = []
    for line in _readelf("--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0].rstrip(":").isdigit() and (weak or fields[4] == "GLOBAL"):
            rows.append((fields[6], fields[7]))
    return rows


def _readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
