"""Second environments for the packaging tests: what a user has who installs a wheel, away from this source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "inlay"

# Forward and backward of two ops, checked against the reference; prints what it ran with.
SMOKE_TEST = """
import torch, inlay, inlay.reference
x = torch.randn(5, 96, requires_grad=True)
w = torch.randn(96, requires_grad=True)
y, h = inlay.add_rms_norm(inlay.rms_norm(x, w), x, w)
(y.sum() + h.sum()).backward()
grads, x.grad, w.grad = (x.grad, w.grad), None, None
y, h = inlay.reference.add_rms_norm(inlay.reference.rms_norm(x, w), x, w)
(y.sum() + h.sum()).backward()
torch.testing.assert_close(grads, (x.grad, w.grad))
print("ran", inlay.__file__, "with torch", torch.__version__)
"""


def make_environment(folder: Path) -> Path:
    """A new virtual environment with this Python and, through a .pth file, this torch. Returns its interpreter.

    It sees every other package of this environment as well, but not an editable install of inlay: .pth files in a
    folder that a .pth file names are not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "bin" / "python"


@cache
def other_pythons_with_torch() -> tuple[str, ...]:
    """Interpreters on PATH of other supported Python versions, that have a torch to run with."""
    names = (f"python3.{minor}" for minor in range(10, 14) if minor != sys.version_info.minor)
    script = "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)"
    return tuple(name for name in names if shutil.which(name) and _runs([name, "-c", script]))


def interpreter(version: str) -> str | None:
    """``python<version>`` from PATH, if it works."""
    name = f"python{version}"
    return name if shutil.which(name) and _runs([name, "-c", ""]) else None


def run_python(
    python: str | Path, script: str, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script with ``cwd`` as working directory and ``path``, if given, first on the module path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run([python, "-c", script], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
