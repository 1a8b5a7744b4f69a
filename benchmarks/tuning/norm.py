"""Tries shapes for the norm kernels' tables in csrc/norm/cuda/config.h: builds and times each candidate.

    python benchmarks/tuning/norm.py [--filter backward] [--jobs 16]

Needs nvcc and a GPU of compute capability 9.0. A candidate is (group, vectors, threads, blocks), see ``Shape`` there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CONFIG = Path("norm/cuda/config.h")
FORWARD_TABLES = ("kPlainForwardShapes", "kResidualForwardShapes", "kGatedForwardShapes")
ROWS = {128: 131072, 256: 131072, 1024: 32768, 2048: 16384, 3072: 16384, 4096: 16384, 5120: 8192, 8192: 8192}
GATED_ROWS = 524288
CANDIDATES_A_BUILD = 6
ELEMENTS_A_VECTOR = 8  # of bfloat16

Candidate = tuple[int, int, int, int]


@dataclass(frozen=True)
class Job:
    """Candidates for one kernel and width, compiled together."""

    direction: str
    role: str
    width: int
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        return f"{self.direction} {self.role} {self.width}"

    @property
    def rows(self) -> int:
        return GATED_ROWS if self.role == "gated" else ROWS[self.width]

    def config(self) -> str:
        """The project's config.h with this job's candidates in every table."""
        text = (CSRC / CONFIG).read_text()
        entries = ", ".join(f"{{{g * v}, {g}, {v}, {t}, {b}}}" for g, v, t, b in self.candidates)
        for table in (*FORWARD_TABLES, "kBackwardShapes"):
            start = text.index(f"inline constexpr Shape {table}[]")
            end = text.index("};", text.index("\n", start)) + len("};")
            checked = text.index(");", end) + len(");")  # tables of candidates need not be in order of width
            text = text[:start] + f"inline constexpr Shape {table}[] = {{{entries}}};" + text[checked:]
        return text

    def cases(self) -> str:
        sizes = f'buffers, "{self.direction} {self.role}", {self.rows}, {self.width}'
        calls = []
        for index in range(len(self.candidates)):
            if self.direction == "backward":
                calls.append(f"backward_case<Role::{self.role}, {index}>({sizes});")
            else:
                rounding = "stepwise" if self.role == "gated" else "once"
                calls.append(f"forward_case<Role::{self.role}, {index}>({sizes}, Rounding::{rounding});")
        return " ".join(calls)

    def build(self, folder: Path) -> Path:
        (folder / CONFIG).parent.mkdir(parents=True)
        (folder / CONFIG).write_text(self.config())
        (folder / "cases.h").write_text(f"#define CASES {self.cases()}\n")
        program = folder / "tune"
        command = ["nvcc", "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]
        command += [f"-I{folder}", f"-I{CSRC}", str(HERE / "norm.cu"), str(CSRC / "common/cuda/runtime.cpp")]
        command += ["-o", str(program)]
        subprocess.run(command, check=True)
        return program


def jobs() -> Iterator[Job]:
    """Shapes whose threads hold the row with no more than a quarter to spare, at several occupancies."""
    for direction, role in itertools.product(("forward", "backward"), ("plain", "residual", "gated")):
        for width in (128,) if role == "gated" else ROWS:
            candidates = tuple(_candidates(width // ELEMENTS_A_VECTOR, resident=direction == "backward"))
            for first in range(0, len(candidates), CANDIDATES_A_BUILD):
                yield Job(direction, role, width, candidates[first : first + CANDIDATES_A_BUILD])


def _candidates(vectors: int, resident: bool) -> Iterator[Candidate]:
    for each in (1, 2, 4, 5):
        group = -(-vectors // each)
        if group * each > 1.25 * vectors or (group % 32 if group > 32 else 32 % group) or group > 640:
            continue
        for threads in sorted({max(group, t // group * group) for t in (64, 128, 256, 640)}):
            for resident_threads in (512, 640) if resident else (1024, 1536):
                if threads <= resident_threads:
                    yield group, each, threads, resident_threads // threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only jobs whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    arguments = parser.parse_args()
    chosen = [job for job in jobs() if arguments.filter in str(job)]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.jobs) as pool:
        programs = list(pool.map(lambda item: item[1].build(Path(root, str(item[0]))), enumerate(chosen)))
        lines = []
        for program in programs:
            lines += subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    for line in sorted(lines, key=lambda line: (line.split(" group")[0], -float(line.split()[-3]))):
        print(line)


if __name__ == "__main__":
    main()
