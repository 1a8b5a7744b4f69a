"""Every op family that can be benchmarked, by the name given to run.py."""

from __future__ import annotations

from benchmarks import bench_gdn, bench_norm
from benchmarks.harness import Family

FAMILIES: dict[str, Family] = {"norm": bench_norm.FAMILY, "gdn": bench_gdn.FAMILY}
