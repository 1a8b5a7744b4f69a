"""Do the benchmarks run here, judge rightly, and do report tables say what the results files say?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import comparison, gdn_layer, harness, report
from benchmarks.harness import Row, Timing

ROOT = Path(__file__).resolve().parents[2]
COPY = 100e9


def measured(
    name: str, seconds: float, case: str = "norm forward 16384x4096", mode: str = "graph", peak: int = 0
) -> Row:
    return harness.row(case, mode, name, Timing(seconds, seconds, seconds), 2**30, COPY, peak=peak)


def test_a_row_states_rate_and_share():
    row = measured("inlay", 2**30 / 50e9)
    assert (row.gb_s, row.copy_share) == (50.0, 0.5)
    assert row.median_us == pytest.approx(2**30 / 50e3, abs=1e-3)


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (harness.at_least_copy(0.5), "yes"),
        (harness.at_least_copy(0.6), "no"),
        (harness.at_most_us(30_000), "yes"),
        (harness.at_most_us(20_000), "no"),
        (harness.times_faster_than(2.0, "eager"), "yes"),
        (harness.times_faster_than(5.0, "eager"), "no"),
        (harness.at_most_ms(22), "yes"),
        (harness.at_most_ms(21), "no"),
        (harness.at_most_times(0.5, "eager"), "yes"),
        (harness.at_most_times(0.2, "eager"), "no"),
        (harness.at_most_peak(0.5, "eager"), "yes"),
        (harness.at_most_peak(0.4, "eager"), "no"),
    ],
    ids=lambda value: getattr(value, "text", value),
)
def test_bars(bar, met):
    rows = [measured("inlay", 2**30 / 50e9, peak=2**20), measured("eager", 2**30 / 20e9, peak=2**21)]
    own, eager = harness.judged(rows, "inlay", [bar])
    assert (own.bar, own.met) == (bar.text, met)
    assert eager == rows[1]


def test_a_bar_without_its_baseline_is_not_judged():
    (own,) = harness.judged([measured("inlay", 1.0)], "inlay", [harness.times_faster_than(8.0, "eager")])
    assert own.met == ""


def test_a_rival_that_cannot_be_imported_is_absent(capsys):
    def missing():
        raise ImportError("no module named rival")

    patience = harness.Patience(1.0, unlimited="ours")
    assert harness.importable({"ours": dict, "rival": missing}, ["ours", "rival"], patience) == {"ours": {}}
    assert "rival: absent (ImportError: no module named rival)" in capsys.readouterr().out


def test_a_rival_is_interrupted_when_its_time_is_spent(capsys):
    patience = harness.Patience(0.2, unlimited="inlay")
    start = time.perf_counter()

    def compile_for_ever():
        while True:
            with contextlib.suppress(Exception):  # as tuners do with configurations that fail
                time.sleep(0.01)

    assert harness.importable({"rival": compile_for_ever}, ["rival"], patience) == {}
    assert time.perf_counter() - start < 5
    assert "rival: absent (OutOfTime: out of time)" in capsys.readouterr().out
    assert not patience.left("rival")
    assert patience.left("inlay")


@dataclass
class Doubling:
    """A case whose op doubles x, in place if it is careless."""

    op: str = "double"
    direction: str = "forward"
    modes: tuple[str, ...] = ("eager",)
    bars: dict = field(default_factory=lambda: {"eager": (harness.at_most_ms(1e6),)})

    def __str__(self) -> str:
        return f"{self.op} {self.direction}"

    def bytes(self) -> int:
        return 32

    def tensors(self, device: str) -> dict[str, torch.Tensor]:
        return {"x": torch.arange(4.0, device=device)}

    def call(self, op, tensors):
        return lambda: (op(tensors["x"]),)

    def exact(self, tensors):
        return (2 * tensors["x"],)

    def difference(self, results, exact):
        return comparison.differing(zip(results, exact, strict=True), 0.01)


def compared(**ops) -> dict[str, Row]:
    makers = {name: (lambda op=op: {"double": op}, ("cpu",)) for name, op in ops.items()}
    options = harness.Options(device="cpu", quick=True, rivals=None, rival_seconds=60.0, filter="", copy=COPY)
    return {row.implementation: row for row in comparison.compare(makers, options, [Doubling()])}


def test_a_wrong_rival_is_not_timed(capsys):
    rows = compared(inlay=lambda x: x + x, right=lambda x: x * 2, wrong=lambda x: x * 2.1, nan=lambda x: x / 0 * 0)
    assert list(rows) == ["inlay", "right"]
    out = capsys.readouterr().out
    assert "ArithmeticError: result 0 is off by 0.05" in out
    assert "nan: " in out


def test_every_implementation_starts_from_the_same_tensors():
    assert list(compared(inlay=lambda x: x.mul_(2), rival=lambda x: x.mul_(2))) == ["inlay", "rival"]


def test_our_own_wrong_results_are_noted_and_meet_no_bar():
    row = compared(inlay=lambda x: x * 3)["inlay"]
    assert (row.met, row.note) == ("no", "result 0 is off by 0.5")


@pytest.mark.parametrize("failure", [RuntimeError("first line\nsecond line"), harness.OutOfTime("out of time")])
def test_a_rival_that_fails_is_reported_in_one_line(failure, capsys):
    def fail(x):
        raise failure

    assert list(compared(inlay=lambda x: x + x, rival=fail)) == ["inlay"]
    assert f"rival: {Doubling()}: {harness.reason(failure)}\n" in capsys.readouterr().out
    assert "\n" not in harness.reason(failure)


def test_results_survive_their_file(tmp_path):
    path = tmp_path / "norm-cuda.csv"
    harness.write_results(path, {"device": "A GPU", "copy": "100.0 GB/s"}, [measured("inlay", 0.02)])
    about, rows = harness.read_results(path)
    assert about == {"device": "A GPU", "copy": "100.0 GB/s"}
    assert rows[0]["implementation"] == "inlay"
    assert float(rows[0]["copy_share"]) == measured("inlay", 0.02).copy_share


def test_report_writes_every_row_and_a_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    about = {"device": "A GPU", "date": "2026-01-02", "commit": "abc", "copy": "100.0 GB/s"}
    graph_rows = [measured("inlay", 0.02), measured("rival", 0.01)]
    rows = [*harness.judged(graph_rows, "inlay", [harness.at_least_copy(0.9)]), measured("inlay", 0.03, mode="eager")]
    harness.write_results(tmp_path / "norm-cuda.csv", about, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- benchmarks:norm:begin --> old <!-- benchmarks:norm:end --> after")
    monkeypatch.setattr(report, "FAMILIES", {"norm": report.FAMILIES["norm"]})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "FAMILIES", {"norm": report.FAMILIES["norm"]})
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 0
    text = readme.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert " old " not in text
    assert "| norm forward 16384x4096 | 20000.0 (0.54) | 10000.0 (1.07) | >= 0.90 of copy | no |" in text
    assert "| norm forward 16384x4096 | 30000.0 (0.36) |" in text
    assert "</svg>" in (tmp_path / "norm-cuda.svg").read_text()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0
    readme.write_text(text.replace("20000.0", "1.0"))
    assert report.main() == 1


@pytest.mark.parametrize(
    ("family", "chosen", "implementations"),
    [
        ("norm", "l2_norm", {"inlay", "hf_eager", "torch"}),
        ("gdn", "gated_delta", {"inlay", "hf_eager"}),
        ("prefill", "1x64", {"inlay", "inlay_attention", "sdpa", "eager"}),
        ("rope", "qk_norm_rope", {"inlay", "hf_eager", "torch.mul"}),
    ],
)
def test_run_writes_a_results_file(family, chosen, implementations, tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/run.py", family, "--device", "cpu", "--quick", "--filter", chosen]
    done = subprocess.run([*command, "--output", tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    _, rows = harness.read_results(tmp_path / f"{family}-cpu.csv")
    assert {row["implementation"] for row in rows} == implementations
    assert not any(row["note"] for row in rows), done.stdout


def test_a_gdn_layer_needs_less_memory_patched():
    """Its time is not judged: the machine may be shared."""
    unpatched, patched = gdn_layer.measure("cpu", 130)
    assert patched.bytes < unpatched.bytes
    assert patched.seconds > 0
