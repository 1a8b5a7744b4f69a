"""Every op family that can be benchmarked, by the name given to run.py."""

from __future__ import annotations

from benchmarks import bench_attention, bench_conv, bench_gdn, bench_moe, bench_norm, bench_prefill, bench_rope
from benchmarks.harness import Family

FAMILIES: dict[str, Family] = {
    "attention": bench_attention.FAMILY,
    "conv": bench_conv.FAMILY,
    "gdn": bench_gdn.FAMILY,
    "moe": bench_moe.FAMILY,
    "norm": bench_norm.FAMILY,
    "prefill": bench_prefill.FAMILY,
    "rope": bench_rope.FAMILY,
}
