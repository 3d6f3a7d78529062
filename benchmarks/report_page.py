"""report.html of a long run: its bytes, and how long a headless browser takes to show it.

`python benchmarks/report_page.py [--smoke] [--out FILE]`

10,000 steps, an evaluation every 25, and 200 samples (100 prompts at the first and the last step, each
response 4,000 characters in 1,000 pieces with credit). The seconds are those of a whole call of Chromium on
the wall, its start included, the least of five, dark and light. At most 5 MB and 2 s.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import Report, figure, options

from jaxdistill.metrics import RowFile, Sample, SampleLog
from jaxdistill.report import write_report

MOST_BYTES, MOST_SECONDS = 5_000_000, 2.0
TRAINING = (
    "loss", "reverse_kl_per_byte", "coverage", "exact_fraction", "tokens_per_second", "grad_norm",
    "learning_rate", "entropy", "teacher/requests", "teacher/retries", "teacher/hedges",
    *(f"seconds/{stage}" for stage in ("rollout", "teacher", "align", "pack", "train", "wait", "save")),
)  # fmt: skip
HELDOUT = ("accuracy", "reverse_kl_per_byte", "coverage", "teacher_logprob_per_byte", "response_tokens")
KINDS = ("exact", "chunk", "unaligned")


def rows(steps: int, every: int) -> Iterator[dict[str, Any]]:
    """Metrics that wander, so that no curve is a straight line that would take no room."""
    draw = np.random.default_rng(0)
    for step in range(steps + 1):
        row: dict[str, Any] = {"step": step, "elapsed_seconds": 0.5 * step, "recompiles": 0}
        if step < steps:
            row |= dict(zip(TRAINING, draw.lognormal(0, 0.5, len(TRAINING)).tolist(), strict=True))
        if step % every == 0:
            values = draw.uniform(0, 1, len(HELDOUT)).tolist()
            row |= {f"eval/{name}": value for name, value in zip(HELDOUT, values, strict=True)}
        yield row


def samples(count: int) -> list[Sample]:
    """Long answers to as many different prompts, each cut into pieces with credit."""
    draw = np.random.default_rng(1)
    found = []
    for number in range(count):
        credit = draw.normal(0, 2, 1000).tolist()
        pieces = [[f"{number:03d} ", KINDS[place % 3], value] for place, value in enumerate(credit)]
        found.append(
            Sample(
                [{"role": "user", "content": f"Question {number}: {'why ' * 500}"}],
                "".join(text for text, *_ in pieces),
                "because",
                float(number % 2),
                0.1,
                {"pieces": pieces},
            )
        )
    return found


def opened(chromium: str, page: Path, scheme: str, home: Path) -> float:
    """Wall seconds from starting the browser to its picture of the page."""
    preferred = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={home / 'profile'}", "--window-size=1240,2700",
        preferred, f"--screenshot={home / 'shot.png'}", page.as_uri(),
    ]  # fmt: skip
    began = time.perf_counter()
    environment = {**os.environ, "HOME": str(home)}
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    arguments = options(__doc__).parse_args(argv)
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        print(f"report_page: none of {', '.join(names)} is here; install one", file=sys.stderr)
        return 2
    steps, prompts, rounds = (100, 4, 1) if arguments.smoke else (10_000, 100, 5)
    report = Report("report_page", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        RowFile(run / "metrics.jsonl").append(list(rows(steps, every=25)))
        log = SampleLog(run)
        for step in (0, steps):
            log.log(step, samples(prompts))
        page = write_report(run)
        report.add(figure("size", page.stat().st_size, "bytes", MOST_BYTES))
        for scheme in ("dark", "light"):
            taken = [opened(chromium, page, scheme, Path(temporary)) for _ in range(rounds)]
            report.add(figure(scheme, min(taken), "seconds to open", MOST_SECONDS))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
