"""Long runs of the toy pair: is anything compiled again, and does anything grow?

    python scripts/long_runs.py shapes [--steps 200] [--out FOLDER] [a.b=c ...]
    python scripts/long_runs.py memory [--steps 1000] [--out FOLDER] [a.b=c ...]

`shapes`: prompts of one turn to nine and references of one sentence to seven, answered by the student, the
references and the teacher in shares that move, so that batches fall into every one of four buckets. Nothing
may be compiled again: neither by the run's own count (`recompiles`), nor by the lines that jax logs for each
program, of which none may come behind the step by which every bucket was seen.

`memory`: short prompts and responses, with an evaluation and a checkpoint every 25 steps. What the run and
its children hold is read from /proc ten times a second; the teacher is a server beside them and is not
counted. The first tenth of the steps is to warm up, the second is what the last is compared with, by medians.
The memory they have asked for (`own`) may grow by 5 % of what is resident at most. The rest of that is pages
of files, of which the system takes back and reads again what it likes: they would hide a growth. The fewest
threads and file descriptors of the last tenth, which are those that stay, may not be more than there mostly
were in the second (its fewest hang on what happened to be caught in between); the pool that writes
checkpoints, which begins its threads as it needs them, is not among them.

Settings such as rollout.max_staleness=1 replace the run's. Prints one JSON line; exit code 1 where that does
not hold.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from toy_server import ROOT, served_teacher

from jaxdistill.metrics import read_rows

TOY = ROOT / "assets/toy/train.jsonl"
BUCKETS = (64, 112, 176, 256)
FLAT = 0.05
MIB = 2**20
POOL = "ts_pool_worker"  # TensorStore's, which writes checkpoints: begun as they are needed, at most so many

MIXED = [
    "data.prompts_per_step=4", "rollout.samples_per_prompt=2", "rollout.max_prompt_tokens=192",
    "rollout.max_new_tokens=64", f"shapes.buckets={list(BUCKETS)}", "rollout.origins.student=[0.25,0.75]",
    "rollout.origins.reference=[0.5,0.25]", "rollout.origins.teacher=[0.25,0.0]", "checkpoint.every=50",
    "eval.every=50", "eval.prompts=12", "eval.references=true",
]  # fmt: skip
SMALL = [
    "data.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8",
    "checkpoint.every=25", "eval.every=25", "eval.prompts=4",
]  # fmt: skip


class Held(NamedTuple):
    """What a run and its children hold at one time; `steps` it had written by then. `own` are the bytes they
    have asked for themselves, `resident` with what is read from files as well, of which the system takes back
    and reads again what it likes."""

    steps: int
    own: int
    resident: int
    threads: int
    files: int


def written(folder: Path) -> int:
    """How many rows of metrics the run has on disk."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def held(process: int, steps: int) -> Held:
    """Of `process` and all below it. Raises `OSError` where one of them has just ended."""
    own = resident = threads = files = 0
    found = [process]
    for one in found:
        proc = Path(f"/proc/{one}")
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        own += sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
        resident += int(fields["VmRSS"].split()[0]) * 1024
        files += len(os.listdir(proc / "fd"))
        for task in (proc / "task").iterdir():
            threads += (task / "comm").read_text().strip() != POOL
            found += map(int, (task / "children").read_text().split())
    return Held(steps, own, resident, threads, files)


def run(
    folder: Path, settings: Sequence[str], said: Callable[[int, str], None], seen: Callable[[Held], None]
) -> list[dict[str, Any]]:
    """A run of the quickstart with other settings: its rows of metrics. `said` is given every line it writes
    on stderr, with the number of rows there were; `seen` what it holds, ten times a second.

    Raises `RuntimeError` with its last words where it fails."""
    command = [sys.executable, "-m", "jaxdistill.train", "--config", "configs/quickstart.yaml",
               f"run.dir={folder}", "optimizer.learning_rate=1e-4", *settings]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    last: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:

        def listen() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                last[:] = [*last[-20:], line]
                said(written(folder), line)

        listener = threading.Thread(target=listen)
        listener.start()
        while process.poll() is None:
            with suppress(OSError, KeyError):  # one has ended, or is about to
                seen(held(process.pid, written(folder)))
            time.sleep(0.1)
        listener.join()
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{''.join(last)}")
    return read_rows(folder / "metrics.jsonl")


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Chats of toy sentences with a reference each; half of them short, few as long as there is room for."""
    draw = random.Random(0)
    toy = [json.loads(line) for line in TOY.read_text().splitlines()]

    def chat() -> dict[str, Any]:
        turns = draw.choices(range(5), (12, 4, 2, 1, 1))[0]
        said = draw.choices((1, 3, 7), (6, 2, 1))[0]
        messages = []
        for one in draw.sample(toy, turns):
            messages += [*one["messages"], {"role": "assistant", "content": one["answer"]}]
        last = draw.choice(toy)
        sentences = [last["answer"], *(one["answer"] for one in draw.sample(toy, said - 1))]
        return {
            "messages": [*messages, *last["messages"]],
            "answer": last["answer"],
            "response": " ".join(sentences),
        }

    return [chat() for _ in range(count)]


def shapes(folder: Path, steps: int, more: Sequence[str]) -> dict[str, Any]:
    """See the module's text."""
    folder.mkdir(parents=True, exist_ok=True)
    data, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    rows = mixed_rows(600)
    for path, part in ((data, rows[:-12]), (heldout, rows[-12:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    programs: list[tuple[int, str]] = []

    def said(step: int, line: str) -> None:
        if "Finished XLA compilation of" in line:
            programs.append((step, line.split("Finished XLA compilation of")[1].split()[0]))

    settings = [*MIXED, f"run.steps={steps}", f"data.path={data}", f"eval.path={heldout}", *more]
    table = run(folder / "run", settings, said, lambda _: None)[:steps]
    lengths = Counter(int(row["batch_length"]) for row in table)
    first = {length: [row["batch_length"] for row in table].index(length) for length in lengths}
    # A row is written when the next step has its own: while step k goes on there are k - 1 of them, or k.
    late = Counter(name for step, name in programs if step > max(first.values()))
    recompiles = int(table[-1]["recompiles"])
    return {
        "steps": len(table),
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "all_seen_at_step": max(first.values()),
        "programs": len(programs),
        "programs_after_that": dict(late),
        "recompiles": recompiles,
        "ok": not recompiles and not late and len(lengths) == len(BUCKETS) and bool(programs),
    }


def memory(folder: Path, steps: int, more: Sequence[str]) -> dict[str, Any]:
    """See the module's text."""
    found: list[Held] = []
    settings = [*SMALL, f"run.steps={steps}", *more]
    table = run(folder / "run", settings, lambda *_: None, found.append)
    return {**judged(found, steps), "seconds": round(table[-1]["elapsed_seconds"], 1)}


def judged(found: Sequence[Held], steps: int) -> dict[str, Any]:
    """What the readings of a run of `steps` steps say; `ok` where nothing grew. See the module's text.

    Raises `RuntimeError` where there are too few of them."""
    part = steps // 10
    tenths = [[one for one in found if k * part <= one.steps < (k + 1) * part] for k in range(10)]
    early, late = tenths[1], tenths[9]
    if min(len(early), len(late)) < 10:
        raise RuntimeError(
            f"only {len(early)} and {len(late)} readings, expected at least 10 in each part of {part} steps; "
            "make more --steps"
        )

    def median(part: Sequence[Held], name: str) -> float:
        return statistics.median(getattr(one, name) for one in part)

    own = [median(part, "own") / MIB for part in (early, late)]
    resident = [median(part, "resident") / MIB for part in (early, late)]
    growth = (own[1] - own[0]) / resident[0]
    # Connections to the teacher and threads that save come and go; what stays is in every reading.
    counts = {
        name: [median(early, name), min(getattr(one, name) for one in late)] for name in ("threads", "files")
    }
    return {
        "steps": steps,
        "readings": [len(early), len(late)],
        "resident_mib": [round(value, 1) for value in resident],
        "own_mib": [round(value, 1) for value in own],
        "growth": round(growth, 4),
        "own_mib_by_tenths": [round(median(one, "own") / MIB, 1) for one in tenths],
        **counts,
        "ok": growth <= FLAT and all(before >= after for before, after in counts.values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Long runs of the toy pair.")
    parser.add_argument("what", choices=("shapes", "memory"))
    parser.add_argument("--steps", type=int, help="200 of shapes, 1000 of memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="settings that replace the run's")
    arguments = parser.parse_intermixed_args(argv)
    trial, steps = {"shapes": (shapes, 200), "memory": (memory, 1000)}[arguments.what]
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary, served_teacher() as teacher:
        folder = arguments.out or Path(temporary)
        result = trial(folder, arguments.steps or steps, [*teacher, *arguments.settings])
    print(json.dumps({"run": arguments.what, "settings": arguments.settings, **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
