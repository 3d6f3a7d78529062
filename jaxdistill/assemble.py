"""`RunConfig` -> `Run`: the only place that builds things.

Everything that can be wrong with a config is found before the run folder is touched: data, tokenizers,
weights, mesh, and a teacher that answers. Only then is anything written.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import yaml
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.batch import Batch
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.collect import Collector
from jaxdistill.compiles import CompileCounter
from jaxdistill.config import dump
from jaxdistill.errors import ConfigError
from jaxdistill.evaluation import Evaluator, References, StudentLogprobs
from jaxdistill.inputs import Inputs, Student, read_inputs
from jaxdistill.loop import Run
from jaxdistill.manifest import check_texts, count_parameters, write_manifest
from jaxdistill.metrics import MetricsLog, RowFile, SampleLog, Stopwatch, make_trackers
from jaxdistill.model_folders import model_folder
from jaxdistill.optimizer import learning_rate, make_optimizer
from jaxdistill.packing import lengthened
from jaxdistill.parallel import processes
from jaxdistill.parallel.rules import padded_rows, place_batch
from jaxdistill.pipeline import Pipeline
from jaxdistill.planner import memory_plan
from jaxdistill.records import Origin, Prompt, Rollout
from jaxdistill.rewards import Rewards
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import check_run_folder, open_run_folder
from jaxdistill.samplers import (
    LocalSampler,
    LocalSamplerConfig,
    MixedSampler,
    Sampler,
    SGLangSampler,
    TeacherSampler,
)
from jaxdistill.scoring import Scoring
from jaxdistill.skipped import SkippedBatches
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.stopping import Stop
from jaxdistill.students import Decoder, read_config, save_params
from jaxdistill.teachers import (
    EmbeddedConfig,
    ReplayConfig,
    ServedSettings,
    TeacherConfig,
    Teachers,
    build_all,
)
from jaxdistill.text import Tokenizer


@contextmanager
def assemble(config: RunConfig, stop: Stop | None = None, allowed: Collection[str] = ()) -> Iterator[Run]:
    """Build the run; on exit its teacher, files and background saves are closed, whatever happened.

    `stop` is what its caller listens with; without one nothing but an exception ends the run early.
    `allowed`: what a run that goes on may have changed (`open_run_folder`, `write_manifest`)."""
    check_run_folder(config.run.dir, dump(config), config.run.steps, allowed)  # before anything is loaded
    with ExitStack() as stack:
        teachers: Teachers | None = None
        with processes.together("the start of the run"):
            inputs = read_inputs(config)
            check_texts(config.run.dir, config, inputs, allowed)  # before a teacher takes its time
            if config.all_teachers:
                teachers = build_all(config.all_teachers, inputs.vocabularies.teachers, seed=config.run.seed)
                stack.callback(teachers.close)
        check_alike(config, inputs)
        compiles = CompileCounter()
        stack.callback(compiles.close)
        stopwatch = Stopwatch(lambda: compiles.here)
        folder = config.run.dir
        with processes.together("the run folder"):
            if processes.leads():
                stack.enter_context(open_run_folder(folder, dump(config), config.run.steps, allowed))
                write_manifest(folder, config, inputs, teachers, allowed)
        # What a run has once, process 0 writes; what there is of each process's rows, each for itself.
        once = folder if processes.leads() else None
        own = "" if processes.leads() else f"-{processes.index()}"
        schedule = learning_rate(config.optimizer, config.run.steps)
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        accumulation = config.optimizer.gradient_accumulation_steps
        graphdef = nnx.split(inputs.decoder, nnx.Param)[0]
        state, frozen = initial_state(inputs.decoder, optimizer, inputs.mesh)
        with processes.together("the meeting of the sampler's servers"):
            policy = build_sampler(config, inputs, graphdef)
            if isinstance(policy, SGLangSampler):
                stack.callback(policy.close)
                policy.check()
        scoring = None
        if teachers is not None and config.objective.needs_teacher:
            scoring = Scoring(
                teachers,
                inputs.tokenizer,
                stopwatch,
                signal=config.objective.signal,
                parts=config.objective.needs,
            )
        samplers: dict[Origin, Sampler] = {"student": policy, "reference": inputs.references}
        if teachers is not None:
            samplers["teacher"] = TeacherSampler(
                teachers, inputs.tokenizer, config.rollout, seed=config.run.seed
            )
        sampler = MixedSampler(samplers, config.origin_schedule, padded=isinstance(policy, LocalSampler))
        checkpoints = Checkpoints(folder, config.checkpoint)
        stack.callback(checkpoints.close)
        collector = Collector(
            sampler,
            scoring,
            config.buckets,
            padded_rows(sampler.schedule.rows, inputs.mesh, accumulation),
            stopwatch,
            rewards=None if config.reward is None else Rewards.build(config.reward),
        )
        batches = Pipeline(
            inputs.prompts,
            collector.sample,
            collector.finish,
            stopwatch,
            steps=config.run.steps,
            ahead=config.rollout.max_staleness,
            sample_behind=isinstance(policy, SGLangSampler),
        )
        stack.callback(batches.close)
        metrics = stack.enter_context(
            MetricsLog(
                once,
                total_steps=config.run.steps,
                progress=True,
                trackers=make_trackers(
                    once,
                    yaml.safe_load(dump(config)),
                    tensorboard=config.run.tensorboard,
                    projects=config.run.projects,
                ),
            )
        )
        yield Run(
            dir=folder,
            steps=config.run.steps,
            initial=state,
            frozen=frozen,
            train_step=make_train_step(
                graphdef,
                inputs.objective,
                optimizer,
                state,
                inputs.mesh,
                router_aux_coefficient=config.student.router_aux_coefficient,
                accumulation=accumulation,
            ),
            learning_rate=lambda step: float(np.asarray(schedule(step))),
            prompts=inputs.prompts,
            policy=policy,
            teachers=teachers,
            batches=batches,
            place=partial(place_alike, mesh=inputs.mesh),
            evaluator=build_evaluator(
                config, inputs, graphdef, inputs.heldout.prompts, inputs.heldout.references, teachers
            ),
            checkpoints=checkpoints,
            metrics=metrics,
            samples=SampleLog(once),
            quarantine=RowFile(folder / f"quarantine{own}.jsonl"),
            skipped=SkippedBatches(folder / f"skipped{own}", config.optimizer.max_skipped),
            stop=stop or Stop(),
            left_out=[
                one.kept() for one in [*inputs.left_out, *inputs.heldout.left_out] if processes.leads()
            ],
            example_every=None if inputs.heldout.prompts else config.eval.every,
            stopwatch=stopwatch,
        )


def build_sampler(
    config: RunConfig, inputs: Inputs, graphdef: nnx.GraphDef[Decoder]
) -> LocalSampler | SGLangSampler:
    """Who samples for the student, by `sampler.kind`; servers are not asked yet."""
    if isinstance(config.sampler, LocalSamplerConfig):
        return LocalSampler(graphdef, inputs.tokenizer, config.rollout, inputs.mesh, seed=config.run.seed)
    run = config.run.dir.absolute()
    return SGLangSampler(
        config.sampler,
        config.rollout,
        inputs.tokenizer,
        partial(
            save_params,
            config=inputs.decoder.config,
            lora=config.student.lora,
            source=model_folder(config.student.path),
            dtype=config.sampler.dtype,
        ),
        # Several runs may share the folder; the same one finds its own again.
        config.sampler.weights / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}",
        vocabulary=inputs.decoder.config.vocab_size,
        seed=config.run.seed,
    )


def place_alike(batch: Batch, mesh: Mesh) -> Batch:
    """A batch on the devices, as long in all processes as in the one that has the longest."""
    length = processes.agree_max("the length of a batch", batch.tokens.shape[1])
    return place_batch(lengthened(batch, length), mesh)


def check_alike(config: RunConfig, inputs: Inputs) -> None:
    """Raise `ConfigError` where processes of one run were given different configs or data, or would write the
    answers of a teacher into one folder."""
    said = {"config": dump(config), "data": inputs.prompts.fingerprint}
    for number, theirs in enumerate(processes.gather("the configs", said)):
        for what, value in said.items():
            if theirs[what] != value:
                raise ConfigError(
                    f"process {number} has another {what} than process {processes.index()}; all processes "
                    "of a run are given the same"
                )
    for one in config.all_teachers:
        if processes.count() > 1 and isinstance(one, ServedSettings) and one.record:
            raise ConfigError(
                f"teacher {one.name!r} records into {one.record}, which one process alone can write, and the "
                f"run has {processes.count()}; record with one process, or leave teacher.record out"
            )


def build_evaluator(
    config: RunConfig,
    student: Student,
    graphdef: nnx.GraphDef[Decoder],
    heldout: Sequence[Prompt],
    references: Sequence[Rollout],
    teachers: Teachers | None,
) -> Evaluator:
    """The evaluation of a config, as many rows at a time as a step has; without `references` none are
    measured."""
    rows = config.data.prompts_per_step * config.rollout.samples_per_prompt
    own = -(-rows // processes.count())
    scoring = None if teachers is None else Scoring(teachers, student.tokenizer, Stopwatch())
    measured = None
    if references:
        logprobs = StudentLogprobs(graphdef, student.mesh, config.buckets, own)
        measured = References(references, logprobs, scoring)
    return Evaluator(config.eval, heldout, scoring, config.run.steps, rows, measured)


class Plan(NamedTuple):
    """What `--dry-run` finds: what a run would be, and what keeps it from being one."""

    text: str
    obstacles: list[str]


def plan(config: RunConfig, device_memory: float | None = None, allowed: Collection[str] = ()) -> Plan:
    """A run of this config, checked: of the student's weights the files' headers; nothing is written,
    started or asked, and no weights are put on a device. `device_memory`: bytes of each device, for
    the plan of another machine; None for what the devices here say they have. `allowed` as in `assemble`."""
    inputs = read_inputs(config, shapes_only=True)
    memory = memory_plan(config, inputs, device_memory)
    lines = [
        dump(config).rstrip(),
        "---",
        student_plan(inputs),
        f"compute: {inputs.decoder.compute_dtype.name}, attention by {inputs.decoder.attention}",
        *map(teacher_plan, config.all_teachers, inputs.vocabularies.teachers),
        f"data: {inputs.prompts.rows} prompts, {len(inputs.heldout.prompts)} held out",
        f"batch: {config.origin_schedule.rows} rows, lengths {list(config.buckets)}",
        f"mesh: {dict(inputs.mesh.shape)} on {jax.devices()[0].device_kind}",
        *memory.lines,
        f"run: {config.run.steps} steps into {config.run.dir} (dry run: nothing was written)",
    ]
    obstacles = [] if memory.fits else ["it does NOT FIT into the memory of a device, as the plan says"]
    try:
        check_start(config, inputs, allowed)
    except ConfigError as error:
        obstacles.append(str(error))
    return Plan("\n".join(lines), obstacles)


def check_start(config: RunConfig, inputs: Inputs, allowed: Collection[str] = ()) -> None:
    """Raise the `ConfigError` with which a run of this config would be refused for what its folder holds."""
    check_run_folder(config.run.dir, dump(config), config.run.steps, allowed)
    check_texts(config.run.dir, config, inputs, allowed)


def student_plan(student: Student) -> str:
    """One line on the student that was read."""
    adapters = student.decoder.adapters
    trained = "" if adapters is None else f" ({count_parameters(adapters):,} of them trained)"
    return (
        f"student: {count_parameters(student.decoder):,} parameters{trained}, {student.tokenizer.vocab_size} "
        f"token ids, end of turn {student.tokenizer.roles['end_of_turn']}"
    )


def teacher_plan(config: TeacherConfig, tokenizer: Tokenizer) -> str:
    """One line on the configured teacher, after reading the files it needs here."""
    match config:
        case EmbeddedConfig():
            folder = model_folder(config.model, weights=False)
            where = f"{config.model}, {read_config(folder).num_layers} layers"
        case ReplayConfig():
            where = f"of {config.path} (not read)"
        case _:
            where = f"at {', '.join(config.endpoints)} (not asked)"
    return f"teacher: {config.name}, {config.kind} {where}, {tokenizer.vocab_size} token ids"
