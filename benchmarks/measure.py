"""What every benchmark does alike: CPU time, a measurement with its limit, and the machine it ran on."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def cpu_seconds(work: Callable[[], object], *, repeats: int, rounds: int = 7) -> float:
    """The least CPU time of one call over the rounds; others on the machine only ever add to it."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.process_time() - begin) / repeats)
    return best


def figure(name: str, value: float, unit: str, limit: float | None, *, least: bool = False) -> dict[str, Any]:
    """One measurement as it is printed: with a limit also whether it holds (at most, or at least)."""
    shown = float(f"{value:.4g}")
    if limit is None:
        return {"name": name, "value": shown, "unit": unit}
    holds = value >= limit if least else value <= limit
    return {
        "name": name,
        "value": shown,
        "unit": unit,
        "at_least" if least else "at_most": limit,
        "ok": holds,
    }


def finish(rows: Sequence[dict[str, Any]], out: Path | None) -> int:
    """Write the rows to `out` where one is named; the exit code: 1 where a limit is missed."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "measurements": rows}, indent=1) + "\n")
    return 0 if all(row.get("ok", True) for row in rows) else 1


def machine() -> dict[str, Any]:
    """Where the figures were taken, and how busy it was."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
