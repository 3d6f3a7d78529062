"""The run, on one screen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxdistill.batch import Batch, Mean
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.collect import Collected, Collector
from jaxdistill.data import PromptStream
from jaxdistill.errors import JaxDistillError, NonFiniteError, TeacherContractError
from jaxdistill.evaluation import Evaluator, samples_of
from jaxdistill.metrics import MetricsLog, RowFile, SampleLog, Stopwatch
from jaxdistill.records import Rollout
from jaxdistill.samplers import Sampler
from jaxdistill.scoring import Scored, distillation_metrics, unscored_rows
from jaxdistill.step import Metrics, TrainState
from jaxdistill.teachers import Teachers

EXAMPLES = 8  # training responses in the sample table of a run without held-out prompts


@dataclass(frozen=True)
class Run:
    """Everything a run is made of; built by `assemble`. `frozen`: the parameters that are not trained, which
    with those of a state make the student. `example_every`: how often training responses go into the sample
    table, None where held-out ones do. `quarantine`: responses that got no scores, and prompts that got no
    response."""

    dir: Path
    steps: int
    initial: TrainState
    frozen: Any
    train_step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    learning_rate: Callable[[int], float]
    prompts: PromptStream
    policy: Sampler
    teachers: Teachers | None
    collect: Collector
    evaluator: Evaluator
    checkpoints: Checkpoints
    metrics: MetricsLog
    samples: SampleLog
    quarantine: RowFile
    example_every: int | None
    stopwatch: Stopwatch


def train(run: Run) -> TrainState:
    """Train from the newest checkpoint (or the start) to the last step.

    A teacher that is gone or answers nonsense, or a row that cannot be used, ends the run with a
    checkpoint of the step it stopped at; everything else leaves the last periodic one.
    """
    state = run.checkpoints.restore_or(run.initial, run.prompts)
    first = int(state.step)
    run.metrics.resume_at(first)
    run.samples.resume_at(first)
    run.quarantine.replace_from(first)
    run.policy.push(run.frozen | state.params, version=first)
    for step in range(first, run.steps):
        position = run.prompts.state()
        if run.checkpoints.due(step):
            run.metrics.flush()  # no step the checkpoint counts may lack its row
            run.checkpoints.save(step, state, position)
        try:
            if run.evaluator.due(step):
                evaluate(run, run.frozen | state.params, step)
            collected = run.collect(next(run.prompts), version=step)
            set_aside(run, step, collected.rollouts, collected.scored)
        except JaxDistillError:  # the state before the step is sound, whatever the data or teacher did
            run.metrics.flush()
            run.checkpoints.save(step, state, position)
            raise
        with run.stopwatch.stage("train", variant=collected.batch.tokens.shape):
            state, metrics = run.train_step(state, run.frozen, collected.batch)
            metrics = jax.device_get(metrics)
        run.policy.push(run.frozen | state.params, version=step + 1)
        run.metrics.log(step, step_values(run, step, collected, metrics))
        if run.example_every is not None and step % run.example_every == 0:
            run.samples.log(step, samples_of(collected.rollouts[:EXAMPLES], collected.scored))
    # Saved before the last evaluation: a teacher that is gone by then costs no step.
    run.metrics.flush()
    run.checkpoints.save(run.steps, state, run.prompts.state())
    if run.evaluator.due(run.steps):
        evaluate(run, run.frozen | state.params, run.steps)
    return state


def evaluate(run: Run, params: Any, step: int) -> None:
    """Evaluate the pushed policy, whose weights are `params`; its values join row `step` of the metrics."""
    with run.stopwatch.stage("evaluate"):
        evaluation = run.evaluator(run.policy, params, step)
    run.metrics.log(step, {f"eval/{name}": mean.value for name, mean in evaluation.metrics.items()})
    run.samples.log(step, evaluation.samples)
    if evaluation.scored is not None:
        set_aside(run, step, evaluation.scored.rollouts, evaluation.scored)


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
    elif len(rows) == len(rollouts):
        raise TeacherContractError(
            f"none of {len(rows)} prompts got a response; the first: {rows[0]['detail']}"
        )


def step_values(run: Run, step: int, collected: Collected, metrics: Mapping[str, Mean]) -> dict[str, float]:
    """One row of metrics.jsonl. Raises `NonFiniteError` if the loss or the gradient is not finite."""
    means = dict(metrics) | dict(collected.metrics)
    if collected.scored is not None:
        means |= distillation_metrics(collected.scored, list(run.teachers.members) if run.teachers else [])
    values = {name: mean.value for name, mean in means.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise NonFiniteError(
                f"{name} is {values[name]} at step {step}; the last checkpoint is of step "
                f"{run.checkpoints.latest()}: lower optimizer.learning_rate or optimizer.clip_norm, or look "
                "at the data of this step"
            )
    counts = {} if run.teachers is None else run.teachers.take_counts()
    seconds = run.stopwatch.take()
    spent = sum(value for name, value in seconds.items() if name != "evaluate")
    tokens = sum(len(rollout.response) for rollout in collected.rollouts)
    return (
        values
        | counts
        | {
            "learning_rate": float(run.learning_rate(step)),
            "tokens_per_second": tokens / spent,
            "recompiles": float(run.stopwatch.recompiles),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }
    )
