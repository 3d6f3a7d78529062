"""Steps whose teacher scores beside them: wall seconds of a step beside those of its slowest stage.

`python benchmarks/overlap.py [--ahead 2] [--jitter 0.5] [--smoke] [--out FILE]`

The toy pair of configs/quickstart.yaml, whole runs by `jaxdistill.loop`, `rollout.max_staleness` --ahead. The
stages are what the trainer's thread does (sampling and training, which share the devices) and what happens
beside it (the teacher, alignment, packing). The teacher replays what a run before recorded, and takes 0.5, 1
or 2 times as long as the trainer's stage by sleeping, which uses no core, as a teacher elsewhere would not;
each answer takes up to --jitter of that more or less. The mean step may take at most 1.1 times the mean of
the slower stage. Beside it stands what the same run takes without staleness.
"""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import Report, figure, options

from jaxdistill.assemble import assemble
from jaxdistill.config import load
from jaxdistill.loop import train
from jaxdistill.metrics import read_rows
from jaxdistill.records import Rollout, TeacherScores
from jaxdistill.run_config import RunConfig

SLOWER = 1.1
LATENCIES = (0.5, 1.0, 2.0)  # of the trainer's stage
CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
WARM_UP = 8
SIZE = ["eval.path=null", "run.tensorboard=false", "checkpoint.every=100000"]
SMOKE = ["data.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8"]
TRAINER, BEHIND = ("rollout", "train"), ("teacher", "align", "pack")


class Steps(NamedTuple):
    """Mean wall seconds after warm-up: of a whole step, and of the work of each stage in it."""

    step: float
    trainer: float
    behind: float


def steps_of(config: RunConfig, latency: float, jitter: float) -> Steps:
    """A whole run whose teacher takes `latency` seconds an answer, up to the share `jitter` more or less."""
    draw = random.Random(0)
    with assemble(config) as run:
        assert run.teachers is not None
        score = run.teachers.score

        def slowly(rollouts: Sequence[Rollout]) -> list[TeacherScores]:
            ends = time.perf_counter() + latency * draw.uniform(1 - jitter, 1 + jitter)
            scores = score(rollouts)
            time.sleep(max(0.0, ends - time.perf_counter()))
            return scores

        run.teachers.score = slowly
        train(run)
    # The last steps have nothing more to sample.
    steady = slice(WARM_UP, config.run.steps - config.rollout.max_staleness)
    rows = read_rows(config.run.dir / "metrics.jsonl")[steady]

    def spent(stages: Sequence[str]) -> float:
        # A stage of the thread behind may end twice in one step's row and not at all in the next one's.
        return float(np.mean([sum(row.get(f"seconds/{name}", 0.0) for name in stages) for row in rows[1:]]))

    clock = np.diff([row["elapsed_seconds"] for row in rows])
    return Steps(float(clock.mean()), spent(TRAINER), spent(BEHIND))


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--ahead", type=int, default=2, help="rollout.max_staleness")
    parser.add_argument("--jitter", type=float, default=0.5, help="share of the latency")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.steps = WARM_UP + 4
    report = Report("overlap", arguments)
    with tempfile.TemporaryDirectory() as folder:

        def config(name: str, ahead: int, *settings: str) -> RunConfig:
            sizes = [*SIZE, *(SMOKE if arguments.smoke else [])]
            own = [
                f"run.dir={folder}/{name}",
                f"run.steps={arguments.steps}",
                f"rollout.max_staleness={ahead}",
            ]
            return load(CONFIG, [*sizes, *own, *settings], RunConfig)

        def replayed(name: str, ahead: int) -> RunConfig:
            teacher = [f"teacher.path={folder}/scores-{ahead}", "teacher.tokenizer=assets/toy/teacher"]
            return config(name, ahead, "teacher=null", "teacher.kind=replay", *teacher)

        for ahead in (0, arguments.ahead):
            steps_of(config(f"record-{ahead}", ahead, f"teacher.record={folder}/scores-{ahead}"), 0.0, 0.0)
        alone = steps_of(replayed("alone", 0), 0.0, 0.0)
        for share in LATENCIES[:1] if arguments.smoke else LATENCIES:
            latency = share * alone.trainer
            found = steps_of(replayed(f"overlapped-{share}", arguments.ahead), latency, arguments.jitter)
            after = steps_of(replayed(f"in-turn-{share}", 0), latency, arguments.jitter)
            slowest = max(found.trainer, found.behind)
            row = figure(f"teacher_{share:g}", found.step / slowest, "times the slowest stage", SLOWER)
            report.add(
                row
                | {"ahead": arguments.ahead, "jitter": arguments.jitter}
                | {name: round(value, 4) for name, value in found._asdict().items()}
                | {"step_without_staleness": round(after.step, 4)}
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
