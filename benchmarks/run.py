"""Times an op family beside every importable rival, prints a table and writes a results file.

python benchmarks/run.py norm [--device cuda|cpu] [--quick] [--ours-only] [--rivals torch,liger] [--filter TEXT]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.registry import FAMILIES  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer and, on the CPU, smaller cases; writes no results")
    parser.add_argument("--ours-only", action="store_true", help="no rivals")
    parser.add_argument("--rivals", default="", help="comma-separated names; all by default")
    parser.add_argument(
        "--rival-seconds", type=float, default=60.0, help="time one rival may take altogether, with what it compiles"
    )
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file"
    )
    parser.add_argument("--commit", default="", help="what was measured, where the sources are without git")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU")

    torch.manual_seed(0)
    family = FAMILIES[arguments.family]
    rivals = [] if arguments.ours_only else [name for name in arguments.rivals.split(",") if name] or None
    options = harness.Options(
        device=arguments.device,
        quick=arguments.quick,
        rivals=rivals,
        rival_seconds=arguments.rival_seconds,
        filter=arguments.filter,
        copy=harness.copy_bandwidth(arguments.device, arguments.quick),
    )
    about = harness.environment(options.device, family.packages, options.copy, arguments.commit)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    complete = not (arguments.quick or arguments.ours_only or arguments.rivals or arguments.filter)
    keep = complete or arguments.output != parser.get_default("output")
    path = arguments.output / f"{arguments.family}-{options.device}.csv"
    rows: list[harness.Row] = []
    with harness.side_stream(options.device):
        for row in family.run(options):
            print(harness.line(row), flush=True)
            rows.append(row)
            if keep:  # after every row: a run that is cut short leaves what it measured
                harness.write_results(path, about, rows)
    if keep:
        print(f"wrote {path}")
    missed = [row for row in rows if row.met == "no"]
    print(f"{sum(row.met == 'yes' for row in rows)} bars met, {len(missed)} missed")
    for row in missed:
        print(f"  missed: {row.case} [{row.mode}] {row.bar}: {row.copy_share:.2f} of copy, {row.median_us} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
