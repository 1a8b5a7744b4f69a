"""Every op family's benchmark module. A module has OPS (the native ops it times), PACKAGES (whose versions its results
name), SUBJECT (our implementation's name) and run(options), which yields rows."""

from __future__ import annotations

from types import ModuleType

from benchmarks import bench_norm

FAMILIES: dict[str, ModuleType] = {"norm": bench_norm}
