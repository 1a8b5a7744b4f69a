"""``inlay.info()``: what is installed, what was loaded and why not, and which op runs where."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from inlay import _load
from inlay._console import bytes_text, facts, indent, table

_PARTNERS = ("transformers", "diffusers", "accelerate", "peft")
_DEVICES = ("CPU", "CUDA")


@dataclass(frozen=True)
class Info:
    """Facts about this installation; ``str()`` gives them as a page to read, or to paste into a bug report."""

    version: str
    python: str
    torch: str
    packages: dict[str, str]
    """Versions of the packages Inlay works with, those that are installed."""
    libraries: tuple[_load.Library, ...]
    build: dict[str, str] | None
    """How the native libraries were built; None without the optional ``inlay._native`` module."""
    cpu: str
    gpus: tuple[str, ...]
    ops: dict[str, tuple[str, ...]]
    """Native op -> devices that have a kernel loaded, of "CPU" and "CUDA"."""

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        parts = [
            ("Python", self.python),
            ("torch", self.torch),
            ("works with", packages or "no transformers or diffusers installed"),
            *((library.name, _library_text(library)) for library in self.libraries),
            ("built", _build_text(self.build)),
            ("CPU", self.cpu),
            *(("GPU", gpu) for gpu in self.gpus or ("none",)),
        ]
        ops = [(name, *("yes" if device in on else "-" for device in _DEVICES)) for name, on in self.ops.items()]
        return f"Inlay {self.version}\n\n{indent(facts(parts))}\n\n{indent(table(('op', *_DEVICES), ops))}"


def info() -> Info:
    """What is installed and loaded: versions, native libraries, build, CPU kernels, GPUs, ops per device.

    Never raises for a missing part: a library that does not load, or a GPU that torch cannot use, is named in the
    result together with the reason. ``print(inlay.info())`` shows everything.
    """
    native = _native()
    build = dict(native.build_config()) if native else None
    return Info(
        version=_version("inlay") or (build or {}).get("version", "unknown"),
        python=platform.python_version(),
        torch=torch.__version__,
        packages={name: number for name in _PARTNERS if (number := _version(name))},
        libraries=(_load.cpu_library(), _load.cuda_library()),
        build=build,
        cpu=_cpu_text(native),
        gpus=_gpus(),
        ops=_ops(),
    )


def _native() -> ModuleType | None:
    """The introspection module, which exists for one Python version only and is never needed for the ops."""
    try:
        return import_module("inlay._native")
    except ImportError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _library_text(library: _load.Library) -> str:
    return "loaded" if library.loaded else f"not loaded: {library.reason}"


def _build_text(build: dict[str, str] | None) -> str:
    if build is None:
        return f"unknown: no introspection module for Python {platform.python_version()} (the ops work without it)"
    text = f"{build['build_type']}, {build['compiler']}"
    if build["cuda_compiler"]:
        text += f", CUDA {build['cuda_compiler']} for {build['cuda_architectures'].replace(' ', ', ')}"
    return text


def _cpu_text(native: ModuleType | None) -> str:
    cores = os.cpu_count() or 1
    text = f"{platform.machine()}, {cores} logical cores, torch uses {torch.get_num_threads()}"
    cpu_isa = getattr(native, "cpu_isa", None)
    if cpu_isa is not None:
        text += f", kernels for {cpu_isa()}"
    return text


def _gpus() -> tuple[str, ...]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {bytes_text(gpu.total_memory)}")
    return tuple(found)


def _ops() -> dict[str, tuple[str, ...]]:
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("inlay::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: tuple(device for device in _DEVICES if has_kernel(name, device)) for name in names}
