"""Kills a run at random times and has it go on, again and again: what is lost, and is the end the same?

    python scripts/kill_runs.py [--times 50] [--seed 0] [--out FOLDER]

A run of the toy pair that saves before every second step is killed (SIGKILL) at random times, often while it
saves, and started again, until there were `--times` kills; a run that ends before that is begun anew. After
each kill the newest checkpoint is at most one interval behind the rows on disk, and what a finished run has
made is that of a run that nobody killed: its rows of metrics, and the parameters bit for bit. Prints one JSON
line; exit code 1 where that does not hold.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from toy_server import ROOT, served_teacher

from jaxdistill.metrics import read_rows

STEPS, EVERY = 40, 2
# Also how often the teacher was asked: a slow answer is asked for a second time.
CLOCKS = ("seconds/", "tokens_per_second", "elapsed_seconds", "recompiles", "teacher/")


def command(folder: Path, teacher: Sequence[str]) -> list[str]:
    """The run, whose `teacher` is a server of its own: no kill touches it."""
    settings = [f"run.dir={folder}", f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "eval.every=20",
                "eval.prompts=4", "data.prompts_per_step=4", "rollout.samples_per_prompt=2",
                "run.tensorboard=false", *teacher]  # fmt: skip
    return [sys.executable, "-m", "jaxdistill.train", "--config", "configs/quickstart.yaml", *settings]


def start(folder: Path, teacher: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, teacher), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What the run has on disk, without its clocks."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def parameters(folder: Path) -> list[bytes]:
    """The trained parameters of the last checkpoint."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        state = manager.restore(STEPS, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    import jax  # after Orbax has had its say about devices

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state["params"])]


def killed(folder: Path, teacher: Sequence[str], after: float) -> bool:
    """Have the run go on and kill it `after` seconds behind its first new row; False where it was done."""
    process = start(folder, teacher)
    try:
        before = len(rows_of(folder))
        while len(rows_of(folder)) <= before and process.poll() is None:
            time.sleep(0.02)
        try:
            output, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            return True
        if process.returncode:
            raise RuntimeError(f"the run failed by itself:\n{output}")
        return False
    finally:
        process.kill()
        process.wait()


def trial(out: Path, teacher: Sequence[str], times: int, seed: int) -> dict[str, Any]:
    """Kill and resume until `times` kills; see the module's text."""
    finish = start(out / "whole", teacher)
    output, _ = finish.communicate()
    if finish.returncode:
        raise RuntimeError(f"the uninterrupted run failed:\n{output}")
    expected = rows_of(out / "whole")
    draw, kills, lost, runs, wrong = random.Random(seed), 0, [], 0, 0
    while kills < times:
        folder, runs = out / f"run-{runs}", runs + 1
        while kills < times and killed(folder, teacher, draw.uniform(0, 1.5)):
            kills += 1
            lost.append(len(rows_of(folder)) - newest(folder))
        last = start(folder, teacher)
        output, _ = last.communicate()
        same = last.returncode == 0 and rows_of(folder) == expected
        wrong += not (same and parameters(folder) == parameters(out / "whole"))
    return {
        "kills": kills,
        "runs": runs,
        "resumed": kills if not wrong else kills - wrong,
        "most_steps_lost": max(lost),
        "interval": EVERY,
        "ok": not wrong and max(lost) <= EVERY,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a run at random times and have it go on.")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary, served_teacher() as teacher:
        result = trial(arguments.out or Path(temporary), teacher, arguments.times, arguments.seed)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
