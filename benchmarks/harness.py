"""Timing, ceilings and results, the same for every op family.

CUDA, "graph": a CUDA graph of launches that rotate over enough buffer sets to keep L2 cold; time of a replay over its
launches. "eager": events around one call, L2 flushed before it; host time shows once it exceeds the flush.
"host": wall time per call on tiny tensors, no synchronisation. CPU, "eager": wall time per call.
"""

from __future__ import annotations

import csv
import gc
import platform
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
_Made = TypeVar("_Made")
MICRO = 1e-6

_L2_BYTES = 60 * 2**20
_COLD_BYTES = 8 * _L2_BYTES
_GRAPH_SECONDS = 1e-3  # a replay lasts at least about this long, so that events resolve it
_MAX_LAUNCHES = 200
_MEASURE_SECONDS = 1.0  # about as long as slow calls are timed, five of them at least
_WARM_SECONDS = 0.03  # of work before anything is timed: clocks fall while the GPU waits for Python or a compiler


@dataclass(frozen=True)
class Options:
    """What a run was asked for, and the ceiling it measured."""

    device: str
    quick: bool
    rivals: list[str] | None  # None: all
    rival_seconds: float
    filter: str
    copy: float  # bytes a second

    def chosen(self, names: Iterable[str], subject: str) -> list[str]:
        return [name for name in names if name == subject or self.rivals is None or name in self.rivals]


@dataclass(frozen=True)
class Family:
    """What the registry knows of an op family's benchmarks."""

    functions: tuple[str, ...]  # public functions that are timed
    subject: str  # our implementation's name in the rows
    packages: tuple[str, ...]  # whose versions a results file names
    run: Callable[[Options], Iterator[Row]]


class OutOfTime(BaseException):
    """A rival's time is spent. No ``Exception``: rivals catch those while they try configurations."""


class Patience:
    """How long each rival may still take, its import and its compilations included.

    Rivals that compile at run time would otherwise decide how long a run is. One in its stretch of time is interrupted
    where it next runs Python, so that a long call into a library delays the end.
    """

    def __init__(self, seconds: float, unlimited: str):
        self._seconds = seconds
        self._unlimited = unlimited
        self._spent: dict[str, float] = {}

    def left(self, name: str) -> bool:
        return name == self._unlimited or self._spent.get(name, 0.0) < self._seconds

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Counts the block's time, and raises ``OutOfTime`` in it once none is left."""
        if name == self._unlimited:
            yield
            return
        start = time.perf_counter()
        try:
            with _interrupted_after(self._seconds - self._spent.get(name, 0.0)):
                yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - start
            if not self.left(name):
                print(f"{name}: {self._seconds:g} s are spent, its other cases are left out", flush=True)


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[1], deciles[7])


@dataclass(frozen=True)
class Row:
    """One line of a results file. Times in microseconds; copy_share: of the copy bandwidth of the same run."""

    case: str
    mode: str
    implementation: str
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    gb_s: float
    copy_share: float
    bar: str = ""
    met: str = ""
    note: str = ""
    tflop_s: float = 0.0  # of ops that matrix products bound
    peak_mib: float = 0.0  # most memory in use at one time, beyond what a call finds; 0: not measured


@dataclass(frozen=True)
class Bar:
    """A speed the project promises, judged on a row and, where it names a baseline, that implementation's row."""

    text: str
    met: Callable[[Row, Row], bool]
    baseline: str | None = None


def at_least_copy(share: float) -> Bar:
    return Bar(f">= {share:.2f} of copy", lambda row, _: row.copy_share >= share)


def at_most_us(limit: float) -> Bar:
    return Bar(f"<= {limit} us", lambda row, _: row.median_us <= limit)


def at_most_ms(limit: float) -> Bar:
    return Bar(f"<= {limit:g} ms", lambda row, _: row.median_us <= limit * 1e3)


def at_least_tflops(rate: float) -> Bar:
    return Bar(f">= {rate:g} TFLOP/s", lambda row, _: row.tflop_s >= rate)


def at_most_times(factor: float, baseline: str) -> Bar:
    return Bar(f"<= {factor:g} x {baseline}", lambda row, base: row.median_us <= factor * base.median_us, baseline)


def times_faster_than(factor: float, baseline: str) -> Bar:
    return Bar(f">= {factor:g} x {baseline}", lambda row, base: factor * row.median_us <= base.median_us, baseline)


def at_most_peak(factor: float, baseline: str) -> Bar:
    return Bar(f"peak <= {factor:g} x {baseline}", lambda row, base: row.peak_mib <= factor * base.peak_mib, baseline)


def judged(rows: Sequence[Row], subject: str, bars: Sequence[Bar]) -> list[Row]:
    """The rows of one case and mode; the subject's says which bars it has, and whether it is right and meets all."""
    by_name = {row.implementation: row for row in rows}
    own = by_name.get(subject)
    bars = [bar for bar in bars if bar.baseline is None or bar.baseline in by_name]
    if own is None or not bars:
        return list(rows)
    met = not own.note and all(bar.met(own, by_name.get(bar.baseline or subject, own)) for bar in bars)
    marked = replace(own, bar="; ".join(bar.text for bar in bars), met="yes" if met else "no")
    return [marked if row is own else row for row in rows]


def row(
    case: str,
    mode: str,
    implementation: str,
    timing: Timing,
    moved: int,
    copy: float,
    note: str = "",
    flops: float = 0,
    peak: int = 0,
) -> Row:
    rate = moved / timing.median
    return Row(
        case=case,
        mode=mode,
        implementation=implementation,
        median_us=round(timing.median / MICRO, 3),
        p20_us=round(timing.p20 / MICRO, 3),
        p80_us=round(timing.p80 / MICRO, 3),
        bytes=moved,
        gb_s=round(rate / 1e9, 1),
        copy_share=round(rate / copy, 4),
        note=note,
        tflop_s=round(flops / timing.median / 1e12, 4),
        peak_mib=round(peak / 2**20, 2),
    )


def buffer_sets(bytes_per_call: int) -> int:
    """How many sets of buffers keep L2 cold when calls rotate over them; tiny tensors stay in it, as in decoding."""
    return max(1, min(64, -(-_COLD_BYTES // max(1, bytes_per_call))))


def time_graph(calls: Sequence[Call], replays: int = 15) -> Timing:
    """Per-launch time of the calls, one buffer set each, repeated in one CUDA graph.

    Results stay alive until every set was visited, so that outputs rotate through memory as the inputs do. Backward
    calls must have run their forward on the current stream, which must not be the default one.
    """
    for call in (calls[0], calls[-1]):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    calls[0]()
    end.record()
    end.synchronize()
    rounds = int(_GRAPH_SECONDS / (begin.elapsed_time(end) * 1e-3) / len(calls))
    rounds = max(1, min(rounds, _MAX_LAUNCHES // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rounds):
            results = [call() for call in calls]
            del results
    launches = rounds * len(calls)
    samples = []
    for _ in range(_repeats(_warm_up(graph.replay), replays)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3 / launches)
    del graph
    return Timing.of(samples)


def time_events(call: Call, repeats: int = 30) -> Timing:
    """One eager call at a time between events, L2 flushed before each."""
    flush = torch.empty(_COLD_BYTES // 4, dtype=torch.int32, device="cuda")
    pairs = []
    for _ in range(_repeats(_warm_up(lambda: (flush.zero_(), call())), repeats)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return Timing.of([begin.elapsed_time(end) * 1e-3 for begin, end in pairs])


def time_host(calls: dict[str, Call], per_block: int = 100, blocks: int = 20) -> dict[str, Timing]:
    """Host seconds per call, blocks of each call interleaved so that all see the same machine."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(blocks + 2):
        for name, call in calls.items():
            _synchronise()
            start = time.perf_counter()
            for _ in range(per_block):
                call()
            seconds = (time.perf_counter() - start) / per_block
            _synchronise()
            if index >= 2:
                samples[name].append(seconds)
    return {name: Timing.of(values) for name, values in samples.items()}


def time_cpu(call: Call, seconds: float) -> Timing:
    """Wall time of repeated calls: three at least, then for about as long as given."""
    call()
    samples = []
    begin = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return Timing.of(samples)


def copy_bandwidth(device: str, quick: bool = False) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    size = 2**31 if device == "cuda" else 2**26 if quick else 2**28
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    timing = (
        time_events(lambda: target.copy_(source), 20)
        if device == "cuda"
        else time_cpu(lambda: target.copy_(source), 0.2 if quick else 1.0)
    )
    return 2 * size / timing.median


def environment(device: str, packages: Iterable[str], copy: float, commit: str) -> dict[str, str]:
    """What a results file says about where it was measured."""
    about = {
        "date": date.today().isoformat(),
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _driver() if device == "cuda" else "",
        "copy": f"{copy / 1e9:.1f} GB/s",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in packages:
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "absent"
    return {name: value for name, value in about.items() if value}


def importable(makers: dict[str, Callable[[], _Made]], chosen: Iterable[str], patience: Patience) -> dict[str, _Made]:
    """What the chosen makers make; what cannot be imported is absent, its reason printed once."""
    made = {}
    for name in chosen:
        try:
            with patience.spending(name):
                made[name] = makers[name]()
        except (Exception, OutOfTime) as error:  # packages that compile at import fail in many ways
            print(f"{name}: absent ({reason(error)})", flush=True)
    return made


def reason(error: BaseException) -> str:
    """An error in one line; those of compilers have hundreds."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}"


def side_stream(device: str) -> AbstractContextManager:
    """A stream that CUDA graphs can capture; backward passes run where their forward ran."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def line(row: Row) -> str:
    bar = f"  {row.bar}: {'met' if row.met == 'yes' else 'MISSED'}" if row.bar else ""
    rate = f"{row.gb_s:8.0f} GB/s {row.copy_share:6.1%}" if row.bytes else " " * 20
    if row.tflop_s:
        rate = f"{row.tflop_s:8.3g} TFLOP/s    "
    if row.peak_mib:
        rate += f"{row.peak_mib:8.1f} MiB"
    return (
        f"{row.case:48} {row.mode:6} {row.implementation:13} {row.median_us:10.2f} us {rate}{bar} {row.note}".rstrip()
    )


def write_results(path: Path, about: dict[str, str], rows: Sequence[Row]) -> None:
    """A CSV whose leading `# name: value` lines are the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in about.items())
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_results(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return dict(comments), list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warm_up(call: Call) -> float:
    """Seconds that the last call took."""
    start = last = time.perf_counter()
    while last - start < _WARM_SECONDS:
        begin = last
        call()
        torch.cuda.synchronize()
        last = time.perf_counter()
    return last - begin


def _repeats(seconds: float, most: int) -> int:
    return max(5, min(most, int(_MEASURE_SECONDS / seconds)))


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raises ``OutOfTime`` in the block after so long, where the platform has the timer and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime("out of time")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
