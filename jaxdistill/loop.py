"""The run, on one screen."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxdistill.batch import Batch, Mean
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.collect import Collected
from jaxdistill.data import PromptStream
from jaxdistill.errors import CheckpointError, JaxDistillError, ProcessError, TeacherContractError
from jaxdistill.evaluation import Evaluator, samples_of
from jaxdistill.metrics import MetricsLog, RowFile, SampleLog, Stopwatch
from jaxdistill.parallel import processes
from jaxdistill.pipeline import Pipeline, staleness
from jaxdistill.records import Rollout
from jaxdistill.samplers import LocalSampler, SGLangSampler
from jaxdistill.scoring import Scored, distillation_metrics, unscored_rows
from jaxdistill.skipped import SkippedBatches
from jaxdistill.step import Metrics, TrainState
from jaxdistill.stopping import Stop, Stopped
from jaxdistill.teachers import Teachers

logger = logging.getLogger(__name__)

EXAMPLES = 8  # training responses in the sample table of a run without held-out prompts


@dataclass(frozen=True)
class Run:
    """Everything a run is made of; built by `assemble`. `frozen`: the parameters that are not trained, which
    with those of a state make the student. `example_every`: how often training responses go into the sample
    table, None where held-out ones do. `place` puts a batch on the devices. `quarantine`: responses that got
    no scores, and prompts that got no response; `left_out` comes before them, rows there is no room for."""

    dir: Path
    steps: int
    initial: TrainState
    frozen: Any
    train_step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    learning_rate: Callable[[int], float]
    prompts: PromptStream
    policy: LocalSampler | SGLangSampler
    teachers: Teachers | None
    batches: Pipeline
    place: Callable[[Batch], Batch]
    evaluator: Evaluator
    checkpoints: Checkpoints
    metrics: MetricsLog
    samples: SampleLog
    quarantine: RowFile
    left_out: Sequence[Mapping[str, Any]]
    skipped: SkippedBatches
    stop: Stop
    example_every: int | None
    stopwatch: Stopwatch


def train(run: Run) -> TrainState:
    """Train from the newest checkpoint (or the start) to the last step.

    A teacher that is gone or answers nonsense, a row that cannot be used, and a stop that was asked for end
    the run with a checkpoint of the step it ended at; everything else leaves the last periodic one. What ends
    it in one of several processes ends it in all, at the same step; one that is missing is named.
    """
    state = run.checkpoints.restore_or(run.initial, run.prompts)
    first = int(state.step)
    with processes.together("the logs of the run"):  # a service may refuse the run
        run.metrics.resume_at(first)
        run.samples.resume_at(first)
        run.quarantine.replace_from(first, () if first else run.left_out)
    with processes.together("the first push of the weights"), run.stop.at_once():
        run.policy.push(run.frozen | state.params, version=first)
    run.stopwatch.take()
    for step in range(first, run.steps):
        position = run.batches.position
        with saved_on_failure(run, step, state, position):
            evaluated = evaluate(run, run.frozen | state.params, step)
        if run.checkpoints.due(step, evaluated):
            save(run, step, state, position, evaluated)
        with saved_on_failure(run, step, state, position):
            with run.stop.at_once():
                collected = run.batches.take(step)
            set_aside(run, step, collected.rollouts, collected.scored)
            # Saving went on beside all that; no step is made before it is whole, so that a kill at any time
            # costs at most one interval.
            run.checkpoints.settle()
        if step == first:
            warn_of_cut(step, collected.rollouts)
        batch = run.place(collected.batch)
        with (
            processes.together(f"the update of step {step}"),
            processes.watched(f"the update of step {step}"),
            run.stopwatch.stage("train", variant=batch.tokens.shape),
        ):
            state, metrics = run.train_step(state, run.frozen, batch)
            metrics = jax.device_get(metrics)
        values = step_values(run, step, collected, metrics)
        run.metrics.log(step, values)
        if run.example_every is not None and step % run.example_every == 0:
            run.samples.log(step, samples_of(collected.rollouts[:EXAMPLES], collected.scored))
        # Apart: a push is a program over all processes, which none may miss.
        with saved_on_failure(run, step + 1, state, run.batches.position):
            run.skipped.note(step, collected.batch, values)
        with saved_on_failure(run, step + 1, state, run.batches.position), run.stop.at_once():
            run.policy.push(run.frozen | state.params, version=step + 1)
    position = run.batches.position
    with saved_on_failure(run, run.steps, state, position):
        evaluated = evaluate(run, run.frozen | state.params, run.steps)
    save(run, run.steps, state, position, evaluated)
    return state


@contextmanager
def saved_on_failure(run: Run, step: int, state: TrainState, position: Mapping[str, Any]) -> Iterator[None]:
    """What fails or is stopped here has not touched `state`, which is saved as the one before `step`. It ends
    alike in all processes; without one of them nothing can be saved."""
    try:
        with processes.together(f"step {step}", run.stop):
            yield
    except (JaxDistillError, Stopped) as error:
        if not isinstance(error, CheckpointError | ProcessError):
            save(run, step, state, position)
        raise


def save(
    run: Run,
    step: int,
    state: TrainState,
    position: Mapping[str, Any],
    evaluated: Mapping[str, float] | None = None,
) -> None:
    """Save the state before `step`; no step the checkpoint counts may lack its row of metrics."""
    run.metrics.flush(before=step)
    run.checkpoints.save(step, state, position, evaluated)


def evaluate(run: Run, params: Any, step: int) -> dict[str, float]:
    """Evaluate the pushed policy, whose weights are `params`, where it is due before `step` (else the result
    is empty); the values join row `step` of the metrics."""
    if not run.evaluator.due(step):
        return {}
    with run.stopwatch.stage("evaluate"), run.stop.at_once():
        evaluation = run.evaluator(run.policy, params, step)
    values = {f"eval/{name}": mean.value for name, mean in evaluation.metrics.items()}
    run.metrics.log(step, values)
    run.samples.log(step, evaluation.samples)
    if evaluation.scored is not None:
        set_aside(run, step, evaluation.scored.rollouts, evaluation.scored)
    return values


def set_aside(run: Run, step: int, rollouts: Sequence[Rollout], scored: Scored | None) -> None:
    """Keep the responses the teachers gave no scores for, and the prompts they did not answer, with the
    reason; the objective masks them. `scored` are the same rollouts, None where they are not scored.

    Raises `TeacherContractError` where they are too many to go on."""
    if run.teachers is None:
        return
    reasons = [one.unwritten for one in rollouts] if scored is None else [s.unscored for s in scored.scores]
    rows = unscored_rows(rollouts, reasons, run.teachers.routes)
    run.quarantine.append([{"step": step, **row} for row in rows])
    if scored is not None:
        run.teachers.check_share(scored.scores)
    elif rows and len(rows) == len(rollouts):
        raise TeacherContractError(
            f"none of {len(rows)} prompts got a response; the first: {rows[0]['detail']}"
        )


def warn_of_cut(step: int, rollouts: Sequence[Rollout]) -> None:
    """Say where no response of the student ended by itself, in any process: it learns nothing of how one
    ends, and a scorer gives all of them 0."""
    own = [one for one in rollouts if one.origin == "student"]
    counts = [len(own), sum(one.finished for one in own), max((len(one.response) for one in own), default=0)]
    made, finished, longest = zip(*processes.gather("the ends of the responses", counts), strict=True)
    if sum(made) and not sum(finished) and processes.leads():
        logger.warning(
            "step %d: none of the student's %d responses ended by itself, all were cut at "
            "rollout.max_new_tokens=%d; if it is to end its turns, raise that",
            step,
            sum(made),
            max(longest),
        )


def step_values(run: Run, step: int, collected: Collected, metrics: Mapping[str, Mean]) -> dict[str, float]:
    """One row of metrics.jsonl: over the rows of all processes, the times those of the slowest."""
    means = dict(collected.metrics) | {"staleness": staleness(collected, step)}
    if collected.scored is not None:
        means |= distillation_metrics(collected.scored, list(run.teachers.members) if run.teachers else [])
    counts = {} if run.teachers is None else run.teachers.take_counts()
    counts |= {f"sampler/{what}": float(count) for what, count in run.policy.take_counts().items()}
    counts["tokens"] = float(sum(len(rollout.response) for rollout in collected.rollouts))
    given = [one for one in collected.rollouts if one.origin != "student" and one.unwritten is None]
    counts |= {"cut_rows": float(sum(not one.finished for one in given))} if given else {}
    counts = {f"counts/{name}": Mean(count, 1.0) for name, count in counts.items()}
    totals = processes.summed(f"the metrics of step {step}", means | counts)
    counts = {name.removeprefix("counts/"): float(totals.pop(name).total) for name in counts}
    seconds, elapsed = run.stopwatch.take()
    times = {f"seconds/{name}": value for name, value in seconds.items()}
    times |= {"recompiles": float(run.stopwatch.recompiles), "spent": elapsed - seconds.get("evaluate", 0.0)}
    times |= {"batch_length": float(collected.batch.tokens.shape[1])}  # the longest one's is that of all
    times = processes.worst(f"the times of step {step}", times)
    values = {name: mean.value for name, mean in (dict(metrics) | totals).items()}
    return (
        values
        | {name: count for name, count in counts.items() if name != "tokens"}
        | {
            "learning_rate": float(run.learning_rate(int(values["updates"]))),
            "tokens_per_second": counts["tokens"] / times.pop("spent"),
            **times,
        }
    )
