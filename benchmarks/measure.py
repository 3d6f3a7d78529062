"""What every benchmark does alike: options, seconds, a figure with its limit, and the machine it ran on."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: `--smoke` and `--out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all; judges nothing")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    return parser


class Seconds(NamedTuple):
    """Of one call."""

    cpu: float
    wall: float


def timed(work: Callable[[], object]) -> Seconds:
    """One call's seconds, all threads of this process counted."""
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - begin)


def in_turns(works: Mapping[str, Callable[[], Seconds]], *, rounds: int) -> dict[str, Seconds]:
    """The least CPU and wall seconds of each over the rounds, in each of which all take their turn: what else
    the machine does only ever adds, and a slow hour is everybody's."""
    taken: dict[str, list[Seconds]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(work())
    return {name: Seconds(*np.min(found, axis=0).tolist()) for name, found in taken.items()}


def cpu_seconds(work: Callable[[], object], *, repeats: int, rounds: int = 7) -> float:
    """The least CPU time of one call over the rounds."""

    def repeated() -> None:
        for _ in range(repeats):
            work()

    return in_turns({"": lambda: timed(repeated)}, rounds=rounds)[""].cpu / repeats


def peer_process(command: Sequence[str], stack: ExitStack) -> Callable[[], dict[str, Any]]:
    """A call that has another process do its work once and gives its answer: one JSON line for each line on
    its input. `stack` ends the process. Raises `RuntimeError` when it ends without an answer."""
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    assert process.stdin is not None and process.stdout is not None
    stack.callback(process.stdin.close)

    def call() -> dict[str, Any]:
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended without an answer; what it said is above")
        return json.loads(line)

    return call


def figure(name: str, value: float, unit: str, limit: float | None, *, least: bool = False) -> dict[str, Any]:
    """One measurement as it is printed: with a limit also whether it holds (at most, or at least)."""
    row = {"name": name, "value": float(f"{value:.4g}"), "unit": unit}
    if limit is None:
        return row
    return row | {
        "at_least" if least else "at_most": limit,
        "ok": value >= limit if least else value <= limit,
    }


class Report:
    """The measurements of one benchmark, each printed as a JSON line when it is taken. In a smoke run limits
    mean nothing: they are left out of the lines."""

    def __init__(self, benchmark: str, arguments: argparse.Namespace) -> None:
        """`arguments` are those of `options`."""
        self._benchmark = benchmark
        self._judged = not arguments.smoke
        self._out: Path | None = arguments.out
        self._rows: list[dict[str, Any]] = []
        self._began = time.perf_counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row: what `figure` gave, and whatever else belongs to it."""
        shown = {"benchmark": self._benchmark, **row}
        if not self._judged:
            shown = {key: value for key, value in shown.items() if key not in ("at_least", "at_most", "ok")}
        self._rows.append(shown)
        print(json.dumps(shown), flush=True)

    def finish(self) -> int:
        """Write the rows to `--out` where that is named, with the machine and the seconds since this report
        began; the exit code: 1 where a limit is missed."""
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            seconds = round(time.perf_counter() - self._began)
            written = {"machine": machine(), "wall_seconds": seconds, "measurements": self._rows}
            self._out.write_text(json.dumps(written, indent=1) + "\n")
        return 0 if all(row.get("ok", True) for row in self._rows) else 1


def machine() -> dict[str, Any]:
    """Where the figures were taken, and how busy it was; `accelerator` where jax computed on one."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    found = {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    jax = sys.modules.get("jax")  # not imported for this: benchmarks of the host path run without it
    if jax is not None:
        found["jax"] = jax.__version__
        if jax.default_backend() != "cpu":
            found["accelerator"] = jax.devices()[0].device_kind
    return found
