"""Writes the README's benchmark tables and the plots from the results files, so that nothing in them is typed by hand.

    python benchmarks/report.py [--check]

Every case and every implementation that was measured is shown, those faster than ours too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import read_results  # noqa: E402
from benchmarks.registry import FAMILIES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
_TITLES = {
    "graph": "Device time, CUDA graph, cold L2",
    "eager": "Eager call",
    "host": "Host time of an eager call on tiny tensors",
}
_Rows = list[dict[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the README does not say what the results say")
    check = parser.parse_args().check
    text = README.read_text()
    updated = text
    for family in FAMILIES:
        updated = _replaced(updated, family, _section(family))
    if check:
        return int(updated != text)
    README.write_text(updated)
    for path in sorted(RESULTS.glob("*.csv")):
        _plot(path)
    return 0


def _replaced(text: str, family: str, section: str) -> str:
    begin, end = (f"<!-- benchmarks:{family}:{edge} -->" for edge in ("begin", "end"))
    if begin not in text or end not in text:
        raise SystemExit(f"{README.name} has no markers {begin} and {end}")
    return text[: text.index(begin) + len(begin)] + f"\n{section}\n" + text[text.index(end) :]


def _section(family: str) -> str:
    parts = [_tables(family, path) for path in sorted(RESULTS.glob(f"{family}-*.csv"), reverse=True)]
    return "\n\n".join(parts) or "No results are committed yet."


def _tables(family: str, path: Path) -> str:
    about, rows = read_results(path)
    device = path.stem.split("-")[1]  # what may follow names a part of the family that was measured by itself
    subject = FAMILIES[family].subject
    said = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("device", "date"))
    lines = [
        f"**{about['device']}**, {about['date']} ({said}). bf16; microseconds, in brackets {_unit(rows)}. "
        f"`python benchmarks/run.py {family} --device {device}`",
        "",
        f"![{family} on {about['device']}](benchmarks/results/{path.stem}.svg)",
    ]
    for mode, title in _TITLES.items():
        chosen = [row for row in rows if row["mode"] == mode]
        if chosen:
            lines += ["", f"{title}:", "", *_table(chosen, subject)]
    return "\n".join(lines)


def _unit(rows: _Rows) -> str:
    if any(float(row.get("tflop_s") or 0) for row in rows):
        return "the rate of the matrix products"
    return "the share of the bandwidth of a large copy in the same run"


def _table(rows: _Rows, subject: str) -> list[str]:
    names = _implementations(rows, subject)
    with_bars = any(row["bar"] for row in rows)
    header = ["case", *names, *(["goal", "met"] if with_bars else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for case, measured in _by_case(rows).items():
        cells = [case, *(_cell(measured.get(name)) for name in names)]
        if with_bars:
            own = measured.get(subject, {})
            cells += [own.get("bar", ""), own.get("met", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    share = f" ({float(row['copy_share']):.2f})" if int(row["bytes"]) else ""
    if float(row.get("tflop_s") or 0):
        share = f" ({float(row['tflop_s']):.3g} TFLOP/s)"
    if float(row.get("peak_mib") or 0):
        share += f" {float(row['peak_mib']):.0f} MiB"
    note = f" *{row['note']}*" if row["note"] else ""
    return f"{float(row['median_us']):.1f}{share}{note}"


def _plot(path: Path) -> None:
    """What bounds every case that moves much, one bar an implementation: the share of copy bandwidth, or a rate."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "inlay"  # the same file from the same results
    import matplotlib.pyplot as plt

    about, rows = read_results(path)
    subject = FAMILIES[path.stem.split("-")[0]].subject
    modes = {row["mode"] for row in rows}
    mode = "graph" if "graph" in modes else "eager"
    rows = [row for row in rows if row["mode"] == mode]
    column = "tflop_s" if any(float(row.get("tflop_s") or 0) for row in rows) else "copy_share"
    if column == "copy_share":  # below 32 MB a launch's own time shows more than bandwidth does
        rows = [row for row in rows if int(row["bytes"]) >= 2**25]
    names, cases = _implementations(rows, subject), _by_case(rows)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.14 * len(cases) * (len(names) + 1)))
    height = 1 / (len(names) + 1)
    for index, name in enumerate(names):
        places = [place + index * height for place, case in enumerate(cases) if name in cases[case]]
        shares = [float(case[name][column]) for case in cases.values() if name in case]
        axes.barh(places, shares, height, label=name)
    axes.set_yticks([place + height * (len(names) - 1) / 2 for place in range(len(cases))], list(cases))
    axes.invert_yaxis()
    unit = "TFLOP/s" if column == "tflop_s" else f"share of copy bandwidth ({about['copy']})"
    axes.set_xlabel(f"{unit}, {about['device']}")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _implementations(rows: _Rows, subject: str) -> list[str]:
    """Ours first, then in the order measured."""
    names = dict.fromkeys(row["implementation"] for row in rows)
    return [subject, *(name for name in names if name != subject)]


def _by_case(rows: _Rows) -> dict[str, dict[str, dict[str, str]]]:
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["implementation"]] = row
    return cases


if __name__ == "__main__":
    sys.exit(main())
