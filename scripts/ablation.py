"""Objectives, signals and credits side by side on the toy pair: equal budget, three seeds, one picture.

    python scripts/ablation.py run [--out runs/ablation] [--seeds 0 1 2] [--jobs 1] [CASE ...]
    python scripts/ablation.py report [--out runs/ablation] [--svg docs/images/ablation.svg]
    python scripts/ablation.py time [--out runs/ablation]

`run` trains every case (or those named) by the quickstart's config, `--jobs` at a time, and may be
stopped and started again: a run that is done is not made again. `report` reads the runs that are there.
`time` makes a short run of every case, one at a time, for what a step takes: on a machine that does nothing
else, which the long runs may share.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from jaxdistill.config import dump, load
from jaxdistill.errors import DataError, JaxDistillError
from jaxdistill.metrics.rows import write_atomically
from jaxdistill.report.plots import dot_plot, standalone
from jaxdistill.report.run_data import RunData, read_run
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import config_difference

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
STEPS, TIMED = 80, 20  # steps of a run, and of one that is only timed
WARM_UP = 4  # steps that compile
ACCURACY, REVERSE_KL = "eval/accuracy", "eval/reverse_kl_per_byte"
TOP_K = ["teacher.top_k=16"]


def _objective(kind: str, **settings: object) -> list[str]:
    """Overrides that put another objective in the place of the config's, none of whose settings is kept."""
    values = {"kind": kind, **settings}
    return ["objective=null", *(f"objective.{name}={value}" for name, value in values.items())]


# Every case differs from the quickstart in these settings alone.
CASES: Mapping[str, list[str]] = {
    "reverse_kl, projected": [*_objective("reverse_kl", credit="projected"), *TOP_K],
    "reverse_kl, lookahead": _objective("reverse_kl", credit="lookahead"),
    "reverse_kl, broadcast": _objective("reverse_kl", credit="broadcast"),
    "reverse_kl, uniform": _objective("reverse_kl", credit="uniform"),
    "reverse_kl, proportional": _objective("reverse_kl", credit="proportional"),
    "reverse_kl, exact tokens alone": _objective("reverse_kl", credit="broadcast", signal="exact"),
    "reverse_kl, exact tokens and the next": _objective("reverse_kl", credit="lookahead", signal="exact"),
    "gkd, beta 0 (forward KL)": [*_objective("gkd", beta=0.0), *TOP_K],
    "gkd, beta 0.5": [*_objective("gkd", beta=0.5), *TOP_K],
    "gkd, beta 1 (reverse KL)": [*_objective("gkd", beta=1.0), *TOP_K],
    "minillm, projected": [*_objective("minillm", credit="projected"), *TOP_K],
    "minillm, chunk": _objective("minillm", credit="chunk"),
    "uld": [*_objective("uld"), *TOP_K],
    "gold": [*_objective("gold"), *TOP_K],
    "xtoken": [*_objective("xtoken"), *TOP_K],
    "alm": _objective("alm"),
    "sum of gkd, beta 0.5, and end_of_turn": [
        *_objective("sum", terms="[{objective: {kind: gkd}}, {objective: {kind: end_of_turn}, weight: 0.1}]"),
        "teacher.end_logprobs=true",
        *TOP_K,
    ],
}


def folder_of(out: Path, case: str, seed: int) -> Path:
    """Where a case's run lies."""
    return out / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in case).split())}-{seed}"


def last_evaluation(run: RunData) -> int:
    """The step of the last evaluation, -1 without any."""
    steps = run.series(REVERSE_KL).finite().steps
    return int(steps[-1]) if len(steps) else -1


def overrides_of(out: Path, case: str, seed: int) -> list[str]:
    """What a run's config says in place of the quickstart's."""
    settings = [f"run.dir={folder_of(out, case, seed)}", f"run.seed={seed}", f"run.steps={STEPS}"]
    return [*settings, "run.tensorboard=false", *CASES[case]]


def is_done(out: Path, case: str, seed: int) -> bool:
    """Whether a run is there and was evaluated after its last step. Raises DataError for one that was made by
    another config, an older default among them: its figures are not those of the case."""
    folder = folder_of(out, case, seed)
    if not (folder / "metrics.jsonl").is_file() or last_evaluation(read_run(folder)) != STEPS:
        return False
    config = load(CONFIG, overrides_of(out, case, seed), RunConfig)
    if said := config_difference(folder, dump(config)):
        raise DataError(f"{folder} was made by another config ({said}); remove it, or use another --out")
    return True


def train(out: Path, case: str, seed: int) -> None:
    """Make one run, on the calling thread's processors. Raises DataError if it fails, with the command."""
    if is_done(out, case, seed):
        return
    print(f"{case}, seed {seed}", flush=True)
    start(overrides_of(out, case, seed))


def start(overrides: Sequence[str]) -> None:
    """One run, to its end. Raises DataError if it fails, with the command."""
    command = [sys.executable, "-m", "jaxdistill.train", "--config", str(CONFIG), *overrides]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise DataError(f"exit code {code} from: {' '.join(command)}")


def train_all(out: Path, cases: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
    """Make the runs that are missing, `jobs` at a time, each on its share of the processors: a run and its
    teacher then stay out of the others' way, and all are timed alike. Raises DataError."""
    processors = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(processors):
        raise DataError(f"got --jobs {jobs}, expected 1 to {len(processors)}, the processors here")
    shares: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(jobs):
        shares.put(processors[job::jobs])
    # A process inherits the processors of the thread that starts it.
    with ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
        runs = [pool.submit(train, out, case, seed) for seed in seeds for case in cases]
        try:
            for run in runs:
                run.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_cases(out: Path) -> dict[str, list[RunData]]:
    """The finished runs of each case. Raises DataError where there are none at all, or one of another
    config."""
    runs: dict[str, list[RunData]] = {}
    for case in CASES:
        first = folder_of(out, case, 0).name.removesuffix("0")
        for folder in sorted(out.glob(f"{first}[0-9]*")):
            if is_done(out, case, int(folder.name.removeprefix(first))):
                runs.setdefault(case, []).append(read_run(folder))
    if not runs:
        raise DataError(f"{out} holds no finished run; make them with: python scripts/ablation.py run")
    return runs


def seconds(run: RunData) -> dict[str, float]:
    """Median wall time of each stage of a step, once everything is compiled."""
    stages = [key for key in run.keys("seconds/") if key != "seconds/evaluate"]
    return {key: float(np.median(run.series(key).finite().values[WARM_UP:])) for key in stages}


def time_all(out: Path, cases: Sequence[str]) -> str:
    """What a step of each case takes, as a Markdown table. Raises DataError."""
    lines = ["| objective | seconds a step | sampling | teacher | training |", "|---|---|---|---|---|"]
    for case in cases:
        folder = folder_of(out, f"timed {case}", 0)
        shutil.rmtree(folder, ignore_errors=True)
        more = [f"run.dir={folder}", f"run.steps={TIMED}", "eval.path=null"]
        start([*overrides_of(out, case, 0), *more])
        stages = seconds(read_run(folder))
        parts = [stages[f"seconds/{name}"] for name in ("rollout", "teacher", "train")]
        cells = [case, *(f"{value:.2f}" for value in (sum(stages.values()), *parts))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(runs: Mapping[str, list[RunData]]) -> str:
    """Mean over the seeds of the final figures, with the lowest and the highest, as a Markdown table."""
    lines = [
        "| objective | runs | accuracy | best on the way | reverse KL per byte |",
        "|---|---|---|---|---|",
    ]
    for case, group in runs.items():
        accuracy = [float(run.series(ACCURACY).finite().values[-1]) for run in group]
        best = [float(run.series(ACCURACY).finite().values.max()) for run in group]
        kl = [float(run.series(REVERSE_KL).finite().values[-1]) for run in group]
        cells = [
            case,
            str(len(group)),
            f"{100 * np.mean(accuracy):.1f} % ({100 * min(accuracy):.1f} to {100 * max(accuracy):.1f})",
            f"{100 * np.mean(best):.1f} %",
            f"{np.mean(kl):.3f} ({min(kl):.3f} to {max(kl):.3f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Mapping[str, list[RunData]]) -> str:
    """Final accuracy and reverse KL per byte of every run, as an SVG file's text."""

    def last(key: str) -> dict[str, list[float]]:
        return {
            case: [float(run.series(key).finite().values[-1]) for run in group]
            for case, group in runs.items()
        }

    columns = {
        "held-out accuracy, %": last(ACCURACY),
        "held-out reverse KL, nats per byte": last(REVERSE_KL),
    }
    return standalone(dot_plot("ablation", "Final accuracy and reverse KL per byte by objective", columns))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare objectives on the toy pair.")
    commands = parser.add_subparsers(dest="command", required=True)
    run, report, timed = (commands.add_parser(name) for name in ("run", "report", "time"))
    for one in (run, report, timed):
        one.add_argument("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each on its share of the processors"
    )
    for one in (run, timed):
        one.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {'; '.join(CASES)}")
    report.add_argument("--svg", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        cases = getattr(arguments, "cases", None) or list(CASES)
        if unknown := sorted(set(cases) - set(CASES)):
            raise DataError(f"got the case {unknown[0]!r}, expected one of: {'; '.join(CASES)}")
        if arguments.command == "run":
            train_all(arguments.out, cases, arguments.seeds, arguments.jobs)
        elif arguments.command == "time":
            print(time_all(arguments.out, cases))
        else:
            runs = read_cases(arguments.out)
            if arguments.svg is not None:
                write_atomically(arguments.svg, draw(runs).encode())
            print(table(runs))
    except JaxDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
